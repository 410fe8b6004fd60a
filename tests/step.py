"""Training steps small enough for tests, and views for them like those of the loader."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from mcl import config, objectives
from mcl.config import Config
from mcl.train.step import TrainingStep
from tests.conftest import random_view

SMALL: dict[str, Any] = {
    "montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 2]},
    "model": {"backbone": "resnet18", "width": 16, "head_convs": 1, "hidden": 32, "loss_weights": [0.5, 0.5]},
    "optim": {"clip_norm": 0},
    "trainer": {"global_batch": 4, "precision": "fp32"},
}
FOUR_LEVELS = (
    "montage.ratios=[1,2,4,8]",
    "montage.images_per_canvas=[1,2,2,2]",
    "model.loss_weights=[0.4,0.3,0.2,0.1]",
)
ONE_LEVEL = ("montage.ratios=[1]", "montage.images_per_canvas=[1]", "model.loss_weights=[1]")


def configure(*words: str) -> Config:
    return config.override(config.from_dict(SMALL), words)


def build(cfg: Config, device: torch.device | None = None) -> TrainingStep:
    """A step on a device, by default the CPU, for a model that always has the same weights."""
    torch.manual_seed(0)
    return TrainingStep(cfg, objectives.build(cfg), device or torch.device("cpu"))


def views(cfg: Config, first_seed: int = 1, world: int = 1) -> tuple[MontageBatch, MontageBatch]:
    """Query and key view of random pixels for one of `world` processes."""
    images = cfg.images_per_rank(world)
    dtype = torch.float64 if cfg.trainer.precision == "fp64" else torch.float32
    return tuple(  # type: ignore[return-value]
        dataclasses.replace(
            v,
            pixels=v.pixels.contiguous(memory_format=torch.channels_last),
            query_counts=cfg.montage.query_canvases(images),
        )
        for v in (random_view(cfg.montage, images, first_seed + side, dtype) for side in range(2))
    )


def normalize_parts(model: nn.Module, canvases: Sequence[int], parts: int) -> None:
    """Makes every BatchNorm normalise each part of the canvases, or of the tiles of a level, separately, as with
    gradient accumulation over micro-batches."""

    def in_groups(module: nn.Module) -> None:
        whole = module.forward

        def by_parts(x: Tensor) -> Tensor:
            levels = x.split(list(canvases)) if len(x) == sum(canvases) else [x]
            groups = zip(*(level.chunk(parts) for level in levels), strict=True)
            done = [whole(torch.cat(group)).split([len(piece) for piece in group]) for group in groups]
            return torch.cat([piece for level in zip(*done, strict=True) for piece in level])

        def forward(
            x: Tensor, counts: Sequence[int] = (), residual: Tensor | None = None, relu: bool = False
        ) -> Tensor:
            y = torch.cat([by_parts(rows) for rows in x.split(list(counts) or len(x))])
            y = y if residual is None else y + residual
            return y.relu() if relu else y

        module.forward = forward

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            in_groups(module)
