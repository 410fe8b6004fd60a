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

from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source
from mcl.config import Config, ConfigError
from mcl.evaluation.statistics import fresh_statistics
from mcl.models import MCL, Encoder
from mcl.montage import MontageBatch, nearest_legal

_FRESH = 1 << 62  # added to the seed: crops and montages that training never drew
_STATISTICS_BATCHES = 8


class LevelwiseEncoder(nn.Module):
    """An encoder whose FPN and head have BatchNorm statistics of their own for every level.

    In training each level is normalised by its own batch; one running mean over the levels would fit none of them.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.fpns = nn.ModuleList(copy.deepcopy(encoder.fpn) for _ in encoder.ratios)
        self.heads = nn.ModuleList(copy.deepcopy(encoder.head) for _ in encoder.ratios)

    def forward(
        self, images: Tensor, canvases: Sequence[int], boxes: Sequence[Sequence[Tensor]], cells: int, compute: str
    ) -> list[list[Tensor]]:
        """As :meth:`Encoder.forward` of one view, with the populations of ``compute: matched``."""
        (regions,) = boxes
        features = zip(*(f.split(list(canvases)) for f in self.encoder.backbone(images)), strict=True)
        levels = range(len(canvases))
        maps = [fpn(own, [i])[0] for i, fpn, own in zip(levels, self.fpns, features, strict=False)]
        tiles = self.encoder.pool(maps, levels, regions, cells).split([len(b) for b in regions])
        return [[head(own) for head, own in zip(self.heads, tiles, strict=False)]]


@dataclass(frozen=True)
class Scores:
    """Top-1 accuracy per level: mean over galleries, and its standard error."""

    levels: list[float]
    errors: list[float]


@torch.no_grad()
def top1(model: MCL, query: MontageBatch, key: MontageBatch) -> Tensor:
    """Share of the tiles, per level, whose nearest target is their own image's; both directions. (L,)."""
    views = (query, key)
    banks = [F.normalize(targets.float(), dim=1) for targets in reversed(model.targets(views))]
    hits = []
    for view, predictions, bank in zip(views, model.predictions(views), banks, strict=True):
        rows = model.sources(view)
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
    plan = Plan(
        seed=(config.trainer.seed + _FRESH) % 2**63,
        size=len(source),
        images=config.evaluation.gallery,
        geometry=config.montage.final,
        augment=config.augment,
        tile_sampling=config.data.tile_sampling,
    )
    models = [copy.deepcopy(model) for model in models]
    data = dataclasses.replace(config.data, max_bad_fraction=1.0)  # training has listed and judged the bad files
    with MontageLoader(source, plan, data, gpu=device.index) as loader:
        batches = (tuple(view.to(device, torch.float32) for view in pair) for pair in loader)
        with contextlib.ExitStack() as stack:
            for model in models:
                model.online = LevelwiseEncoder(model.online)  # type: ignore[assignment]
                model.to(device, torch.float32)
                stack.enter_context(fresh_statistics(model))
            for query, key in itertools.islice(batches, _STATISTICS_BATCHES):
                for model in models:
                    model(query, key)
        tables = [
            torch.stack([top1(model, query, key) for model in models])
            for query, key in itertools.islice(batches, config.evaluation.galleries)
        ]
    scores = torch.stack(tables, 1)  # (models, galleries, L)
    errors = scores.std(1) / scores.shape[1] ** 0.5
    return [Scores(*row) for row in zip(scores.mean(1).tolist(), errors.tolist(), strict=True)]
