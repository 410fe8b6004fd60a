"""Retrieval: does a tile find the image it came from? It is what MCL teaches, so it moves first.

In fresh montages every tile of every level looks, by its region feature through projector and predictor, for its own
image among the gallery's momentum targets of the other view. Chance is 1 / gallery.
"""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import nearest_legal
from dali_pipelines.loader import MontageLoader
from dali_pipelines.source import Source
from mcl.config import Config, ConfigError
from mcl.evaluation.statistics import fresh_statistics
from mcl.models import MCL

_FRESH = 1 << 62  # added to the seed: crops and montages that training never drew
_STATISTICS_BATCHES = 8


class Levelwise(nn.Module):
    """A copy of a model whose online FPN and head have BatchNorm statistics of their own for every level.

    In training each level is normalised by its own batch; one running mean over the levels would fit none of them.
    """

    def __init__(self, model: MCL) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.fpns = nn.ModuleList(copy.deepcopy(model.online.fpn) for _ in model.online.ratios)
        self.heads = nn.ModuleList(copy.deepcopy(model.online.head) for _ in model.online.ratios)

    def forward(self, *views: MontageBatch) -> list[list[Tensor]]:
        """Lets all BatchNorms see the views of a step; returns the predictions."""
        self.targets(views)
        return self.predictions(views)

    def targets(self, views: Sequence[MontageBatch]) -> list[Tensor]:
        """As :meth:`MCL.targets`."""
        return self.model.targets(views)

    def predictions(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """As :meth:`MCL.predictions`, with the populations of ``compute: matched``."""
        return [
            [predict(z) for predict, z in zip(self.model.predictors, self._embeddings(view), strict=True)]
            for view in views
        ]

    def positives(self, view: MontageBatch) -> list[Tensor]:
        """As :meth:`MCL.positives`."""
        return self.model.positives(view)

    def _embeddings(self, view: MontageBatch) -> list[Tensor]:
        encoder, levels = self.model.online, range(len(view.canvas_counts))
        features = zip(*(f.split(view.canvas_counts) for f in encoder.backbone(view.pixels)), strict=True)
        maps = [fpn(own, [i])[0] for i, fpn, own in zip(levels, self.fpns, features, strict=True)]
        regions = view.regions()
        tiles = encoder.pool(maps, levels, regions, view.cells).split([len(b) for b in regions])
        return [head(own) for head, own in zip(self.heads, tiles, strict=True)]


@dataclass(frozen=True)
class Scores:
    """Top-1 accuracy per level: mean over galleries, and its standard error."""

    levels: list[float]
    errors: list[float]


@torch.no_grad()
def top1(model: Levelwise, query: MontageBatch, key: MontageBatch) -> Tensor:
    """Share of the tiles, per level, whose nearest target is their own image's; both directions. (L,)."""
    views = (query, key)
    banks = [F.normalize(targets.float(), dim=1) for targets in reversed(model.targets(views))]
    hits = []
    for view, predictions, bank in zip(views, model.predictions(views), banks, strict=True):
        rows = model.positives(view)
        hits.append(
            torch.stack(
                [
                    ((F.normalize(p.float(), dim=1) @ bank.t()).argmax(1) == r).float().mean()
                    for p, r in zip(predictions, rows, strict=True)
                ]
            )
        )
    return torch.stack(hits).mean(0)


def check_gallery(config: Config, source: Source) -> None:
    """Raises ConfigError for too few images, or a gallery that makes no legal montage."""
    gallery = config.evaluation.gallery
    if not config.montage.legal(gallery):
        near = ", ".join(map(str, nearest_legal(config.montage, gallery)))
        raise ConfigError(
            f"evaluation.gallery: {gallery} images fill no whole number of canvases; nearest legal: {near}"
        )
    if len(source) < gallery:
        raise ConfigError(f"evaluation.gallery: {source.root} has only {len(source)} images, fewer than {gallery}")


def retrieval(models: Sequence[MCL], config: Config, source: Source, device: torch.device) -> list[Scores]:
    """Scores models on the same montages of `source`; their BatchNorm statistics are re-estimated on others first.

    Raises:
        ConfigError: too few images for a gallery, or a gallery that makes no legal montage.
    """
    check_gallery(config, source)
    seed = (config.trainer.seed + _FRESH) % 2**63
    plan = config.plan(len(source), config.evaluation.gallery, geometry=config.montage.final, seed=seed)
    scored = [Levelwise(model).to(device, torch.float32) for model in models]
    data = dataclasses.replace(config.data, max_bad_fraction=1.0)  # training has listed and judged the bad files
    with MontageLoader(source, plan, data, gpu=device.index) as loader:
        batches = (tuple(view.to(device, torch.float32) for view in pair) for pair in loader)
        with contextlib.ExitStack() as stack:
            for model in scored:
                stack.enter_context(fresh_statistics(model))
            for query, key in itertools.islice(batches, _STATISTICS_BATCHES):
                for model in scored:
                    model(query, key)
        tables = [
            torch.stack([top1(model, query, key) for model in scored])
            for query, key in itertools.islice(batches, config.evaluation.galleries)
        ]
    scores = torch.stack(tables, 1)  # (models, galleries, L)
    errors = scores.std(1) / scores.shape[1] ** 0.5
    return [Scores(*row) for row in zip(scores.mean(1).tolist(), errors.tolist(), strict=True)]
