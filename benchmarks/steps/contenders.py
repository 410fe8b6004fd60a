"""Training steps on fixed inputs of noise: of the presets, and of supervised training of the same backbone.

What a contender is made of can be sent to another process; the model is made by :meth:`Contender.start`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import torchvision
from torch.optim import SGD

from benchmarks.steps import Step
from dali_pipelines.batch import MontageBatch, in_order
from dali_pipelines.geometry import STRIDE, Geometry
from mcl import config
from mcl.budget import budget, count
from mcl.config import Config
from mcl.models import MCL, layers
from mcl.train.optim import AUTOCAST
from mcl.train.step import TrainingStep
from mcl.train.trainer import resolve_device

PRESETS = Path(__file__).parents[2] / "mcl" / "presets"


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    backbone: str
    cells: int  # of the canvases; canvas schedules keep their own
    images: int  # of a step
    precision: str  # as trainer.precision
    device: str  # as trainer.device


@dataclass(frozen=True)
class Stage:
    """Epochs with images, or canvases, of one size."""

    epochs: int
    side: int  # pixels
    gflop_per_image: float  # counted, of a step
    saved_bytes: int | None  # counted, that autograd keeps for backward; None: not counted


class Contender(Protocol):
    @property
    def plain(self) -> bool:
        """Whether it is measured as PyTorch comes: its own layers, memory as by default."""
        ...

    def stages(self) -> list[Stage]:
        """What is to be measured, counted beforehand: takes seconds.

        Raises:
            ConfigError: the setting makes no legal configuration.
        """
        ...

    def start(self) -> Step:
        """Makes the model. The inputs of a size are made at its first step."""
        ...


@dataclass(frozen=True)
class Supervised:
    """torchvision's model with its classifier: cross-entropy, SGD with momentum and weight decay, channels_last."""

    setting: Setting
    side: int
    ours: bool = False  # our layers, instead of PyTorch's
    plain: bool = False

    def stages(self) -> list[Stage]:
        return [Stage(1, self.side, count.supervised(self.setting.backbone, self.side) / 1e9, None)]

    def start(self) -> Step:
        setting, device = self.setting, resolve_device(self.setting.device)
        model = torchvision.models.get_model(setting.backbone).to(device, memory_format=torch.channels_last)
        if self.ours:
            layers.use(model)
        lr = 0.1 * setting.images / 256
        optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4, foreach=True)
        scaler = torch.amp.GradScaler(device.type, enabled=setting.precision == "fp16")
        dtype = AUTOCAST.get(setting.precision)

        @functools.cache
        def pixels(side: int) -> torch.Tensor:
            return _noise(setting.images, side, seed=0).to(device)

        labels = torch.zeros(setting.images, dtype=torch.int64, device=device)

        def step(side: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
                loss = F.cross_entropy(model(pixels(side)), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return step


@dataclass(frozen=True)
class Pretraining:
    """A preset of this project, in one process: forward, backward, clip, optimiser, momentum network."""

    config: Config
    plain: bool = False

    def stages(self) -> list[Stage]:
        return [
            Stage(s["epochs"], s["canvas"], s["gflop_per_image"], s["saved_bytes"])
            for s in budget(self.config, gpus=1)["stages"]
        ]

    def start(self) -> Step:
        trainer, optim, device = self.config.trainer, self.config.optim, resolve_device(self.config.trainer.device)
        model = MCL(self.config.model, self.config.montage)
        if self.plain:
            layers.use(model, ours=False)
        update = TrainingStep(self.config, model, device)
        lr = optim.base_lr * trainer.global_batch / 256

        @functools.cache
        def views(side: int) -> tuple[MontageBatch, MontageBatch]:
            geometry = dataclasses.replace(self.config.montage, cells=side // STRIDE, schedule=())
            query, key = (_view(geometry, trainer.global_batch, seed).to(device) for seed in (0, 1))
            return query, key

        return lambda side: update(*views(side), lr, optim.ema)


def _supervised(setting: Setting) -> Contender:
    return Supervised(setting, 224)


def _supervised_ours(setting: Setting) -> Contender:
    return Supervised(setting, 224, ours=True)


def _supervised_canvas(setting: Setting) -> Contender:
    return Supervised(setting, STRIDE * setting.cells)


def _preset(setting: Setting, name: str, *words: str, scheduled: bool = False, plain: bool = False) -> Contender:
    """A preset with the backbone, batch, precision and device of the setting, and with `words`."""
    common = [
        f"model.backbone={setting.backbone}",
        f"trainer.global_batch={setting.images}",
        f"trainer.precision={setting.precision}",
        f"trainer.device={setting.device}",
    ]
    sized = [] if scheduled else [f"montage.cells={setting.cells}"]
    return Pretraining(config.load(PRESETS / f"mcl_r50_fpn_100e_{name}.yaml", [*common, *sized, *words]), plain)


CONTENDERS: dict[str, Callable[[Setting], Contender]] = {
    "supervised": _supervised,
    "supervised_ours": _supervised_ours,
    "supervised_canvas": _supervised_canvas,
    "released": lambda setting: _preset(setting, "in1k_released", plain=True),
    "released_ours": lambda setting: _preset(setting, "in1k_released"),
    "matched": lambda setting: _preset(setting, "in1k"),
    "recompute": lambda setting: _preset(setting, "in1k", "trainer.recompute=true"),
    "bf16": lambda setting: _preset(setting, "in1k", "trainer.precision=bf16"),
    "budget": lambda setting: _preset(setting, "budget", scheduled=True),
    "budget_2x": lambda setting: _preset(setting, "budget_2x", scheduled=True),
}

NAMES = {
    "supervised": "supervised, 224 px",
    "supervised_canvas": "supervised, canvas size",
    "supervised_ours": "supervised, 224 px, our layers",
    "released_ours": "released, our layers",
    "recompute": "matched, recompute",
    "bf16": "matched, bf16",
}
"""In words, where the key is not it."""


def _view(geometry: Geometry, images: int, seed: int) -> MontageBatch:
    return in_order(geometry, images, _noise(sum(geometry.canvases(images)), geometry.canvas, seed))


def _noise(images: int, side: int, seed: int) -> torch.Tensor:
    """(images, 3, side, side), channels_last."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, side, side, generator=generator)
    return pixels.contiguous(memory_format=torch.channels_last)
