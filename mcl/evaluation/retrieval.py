"""Retrieval: the share of tiles whose own image is the nearest. It is the objective of MCL, so it improves before
downstream accuracy does.

The embeddings of tiles on new montages, after projector and predictor, are compared with the momentum network's targets
of a gallery of images in the other view, at the same levels as in training. Chance is 1 / gallery.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import nearest_legal
from dali_pipelines.loader import MontageLoader, default_threads
from dali_pipelines.source import Source
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.evaluation.features import Progress
from mcl.models import Encoder
from mcl.objectives import OBJECTIVES, Objective

_FRESH = 1 << 62  # added to the seed, so that crops and montages differ from those of training
_STATISTICS_BATCHES = 8


class LevelwiseEncoder(nn.Module):
    """An encoder that computes as with ``compute: matched``, but has separate BatchNorm statistics of FPN and head for
    every level; with ``assembly: stack``, of the backbone, too.

    In training each level is normalised by its own batch, so running statistics over all levels would fit none of them.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        each = encoder.ratios if encoder.assembly == "stack" else ()  # its backbone, too, processes one level at a time
        self.backbones = nn.ModuleList(copy.deepcopy(encoder.backbone) for _ in each)
        self.fpns = nn.ModuleList(copy.deepcopy(encoder.fpn) for _ in encoder.ratios)
        self.heads = nn.ModuleList(copy.deepcopy(encoder.head) for _ in encoder.ratios)

    def forward(self, *views: MontageBatch) -> list[list[Tensor]]:
        """As :meth:`Encoder.forward`."""
        return [self._embeddings(view) for view in views]

    def _embeddings(self, view: MontageBatch) -> list[Tensor]:
        if self.backbones:
            stacked = enumerate(view.stacked())
            return [self.heads[i](self.fpns[i](self.backbones[i](tiles), [i])[0]) for i, tiles in stacked]
        levels = range(len(view.canvas_counts))
        features = zip(*(f.split(view.canvas_counts) for f in self.encoder.backbone(view.pixels)), strict=True)
        maps = [self.fpns[i](own, [i])[0] for i, own in zip(levels, features, strict=True)]
        regions = view.regions()
        tiles = self.encoder.pool(maps, levels, regions, view.cells).split([len(b) for b in regions])
        return [self.heads[i](own) for i, own in zip(levels, tiles, strict=True)]


def _levelwise(model: Objective) -> Objective:
    """A copy whose encoders are :class:`LevelwiseEncoder`."""
    model = copy.deepcopy(model)
    model.add_module("online", LevelwiseEncoder(model.online))
    model.add_module("target", LevelwiseEncoder(model.target))
    return model


class _All(nn.ModuleList):
    """Calls several models with the same views."""

    def forward(self, views: Sequence[MontageBatch]) -> None:
        model: Any
        for model in self:
            model.matches(*views)


def check_gallery(config: Config, source: Source) -> None:
    """Raises ConfigError if the objective has no targets, images are too few, or a gallery does not fill canvases."""
    if not OBJECTIVES[config.objective].retrieves:
        raise ConfigError(
            f"objective: {config.objective} has no targets, which retrieval needs; use knn or "
            "linear, and remove retrieval from evaluation.at_end"
        )
    gallery = config.evaluation.gallery
    if not config.montage.legal(gallery):
        near = ", ".join(map(str, nearest_legal(config.montage, gallery)))
        raise ConfigError(
            f"evaluation.gallery: {gallery} images do not fill a whole number of canvases; nearest legal: {near}"
        )
    if len(source) < gallery:
        raise ConfigError(f"evaluation.gallery: {source.root} has only {len(source)} images, fewer than {gallery}")


def retrieval(
    models: Sequence[Objective], config: Config, source: Source, device: torch.device, progress: Progress = lambda: None
) -> list[tuple[list[float], list[float]]]:
    """Scores models on the same montages of `source`, after re-estimating their BatchNorm statistics on other montages.

    Galleries are divided among the processes, and do not depend on the number of processes.

    Returns:
        For each model, the top-1 accuracy of every level, averaged over galleries, and its standard error.

    Raises:
        ConfigError: see :func:`check_gallery`.
    """
    check_gallery(config, source)
    world, rank, count = distributed.world_size(), distributed.rank(), config.evaluation.galleries
    most, first, end = -(-count // world), rank * count // world, (rank + 1) * count // world
    with distributed.alone():
        tables = list(_tables(models, config, source, device, (first, end, most), progress))
    scores = torch.cat([part for parts in distributed.gather_objects(tables) for part in parts])
    means, errors = scores.mean(0), scores.std(0) / count**0.5  # (models, L)
    return list(zip(means.tolist(), errors.tolist(), strict=True))


def _tables(
    models: Sequence[Objective],
    config: Config,
    source: Source,
    device: torch.device,
    galleries: tuple[int, int, int],
    progress: Progress,
) -> Iterator[Tensor]:
    """Accuracies (1, models, L) on galleries first .. end - 1; all processes take the same number of steps."""
    seed = (config.trainer.seed + _FRESH) % 2**63
    plan = config.plan(len(source), config.evaluation.gallery, geometry=config.montage.final, seed=seed)
    scored = [_levelwise(model).to(device, torch.float32) for model in models]
    data = dataclasses.replace(config.data, max_bad_fraction=1.0)  # the limit was checked in training
    threads = data.threads or default_threads(distributed.local_world_size())
    first, end, most = galleries
    with MontageLoader(source, plan, data, gpu=device.index, threads=threads) as loader:

        def batches(start: int, steps: int) -> Iterator[list[MontageBatch]]:
            if loader.position != start:
                loader.load_state_dict({"position": start, "bad": {}})
            for pair in itertools.islice(loader, steps):
                progress()
                yield [view.to(device, torch.float32) for view in pair]

        # update_bn passes the first entry of a list to the model.
        update_bn(([views] for views in batches(0, _STATISTICS_BATCHES)), _All(scored).eval())
        for query, key in batches(_STATISTICS_BATCHES + first, end - first):
            yield torch.stack([model.matches(query, key).mean(0) for model in scored]).cpu()[None]
        for _ in range(most - (end - first)):
            progress()
