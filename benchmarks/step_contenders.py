"""Training steps on fixed inputs of noise, of the presets and of supervised training of the same backbone.

A contender can be sent to another process, where :meth:`Contender.start` makes its model; see :class:`Apart`.
"""

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F
import torchvision
from torch.optim import SGD

from benchmarks.common import PRESETS, synchronize, timed
from mcl import config, montage
from mcl.budget import budget, count
from mcl.config import Config
from mcl.models import MCL
from mcl.montage import STRIDE, MontageBatch
from mcl.optim import AUTOCAST
from mcl.step import TrainingStep
from mcl.trainer import resolve_device

Step = Callable[[int], object]
"""Does a step on images, or canvases, of so many pixels."""


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

    def stages(self) -> list[Stage]:
        return [Stage(1, self.side, count.supervised(self.setting.backbone, self.side) / 1e9, None)]

    def start(self) -> Step:
        setting, device = self.setting, resolve_device(self.setting.device)
        model = torchvision.models.get_model(setting.backbone).to(device, memory_format=torch.channels_last)
        lr = 0.1 * setting.images / 256
        optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4, foreach=True)
        scaler = torch.amp.GradScaler(device.type, enabled=setting.precision == "fp16")
        dtype = AUTOCAST.get(setting.precision)
        labels = torch.zeros(setting.images, dtype=torch.int64, device=device)

        @functools.cache
        def pixels(side: int) -> torch.Tensor:
            return _noise(setting.images, side, seed=0).to(device)

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

    def stages(self) -> list[Stage]:
        return [
            Stage(s["epochs"], s["canvas"], s["gflop_per_image"], s["saved_bytes"])
            for s in budget(self.config, gpus=1)["stages"]
        ]

    def start(self) -> Step:
        trainer, optim, device = self.config.trainer, self.config.optim, resolve_device(self.config.trainer.device)
        update = TrainingStep(self.config, MCL(self.config.model, self.config.montage), device)
        lr, images = optim.base_lr * trainer.global_batch / 256, trainer.global_batch

        @functools.cache
        def views(side: int) -> tuple[MontageBatch, MontageBatch]:
            geometry = dataclasses.replace(self.config.montage, cells=side // STRIDE, schedule=())
            number = sum(geometry.canvases(images))
            query, key = (montage.in_order(geometry, images, _noise(number, side, seed)) for seed in (0, 1))
            return query.to(device), key.to(device)

        return lambda side: update(*views(side), lr, optim.ema)


def _preset(name: str, *words: str, scheduled: bool = False) -> Callable[[Setting], Contender]:
    """A preset with the backbone, batch, precision, device and size of the setting, and with `words`.

    Args:
        scheduled: it keeps the sizes of its own canvas schedule.
    """

    def make(setting: Setting) -> Contender:
        common = [
            f"model.backbone={setting.backbone}",
            f"trainer.global_batch={setting.images}",
            f"trainer.precision={setting.precision}",
            f"trainer.device={setting.device}",
        ]
        sized = [] if scheduled else [f"montage.cells={setting.cells}"]
        return Pretraining(config.load(PRESETS / f"mcl_r50_fpn_100e_{name}.yaml", [*common, *sized, *words]))

    return make


CONTENDERS: dict[str, tuple[str, Callable[[Setting], Contender]]] = {
    "supervised": ("supervised, 224 px", lambda setting: Supervised(setting, 224)),
    "supervised_canvas": ("supervised, canvas size", lambda setting: Supervised(setting, STRIDE * setting.cells)),
    "released": ("released", _preset("in1k_released")),
    "matched": ("matched", _preset("in1k")),
    "recompute": ("matched, recompute", _preset("in1k", "trainer.recompute=true")),
    "bf16": ("matched, bf16", _preset("in1k", "trainer.precision=bf16")),
    "budget": ("budget", _preset("budget", scheduled=True)),
    "budget_2x": ("budget_2x", _preset("budget_2x", scheduled=True)),
}
"""By key, each in words, and what makes it."""


def _noise(images: int, side: int, seed: int) -> torch.Tensor:
    """(images, 3, side, side), channels_last."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, side, side, generator=generator)
    return pixels.contiguous(memory_format=torch.channels_last)


class Apart:
    """A contender in a process of its own, so that one has the memory at a time and its peak can be found out."""

    def __init__(self, contender: Contender) -> None:
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._process.submit(_start, contender).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.shutdown()

    def seconds(self, side: int) -> float:
        """Of a step on images, or canvases, of so many pixels, after one that is not timed."""
        return self._process.submit(_seconds, side).result()

    def peak(self, side: int) -> int:
        """Bytes at the peak of the process after another step: resident, or allocated by PyTorch on the GPU."""
        return self._process.submit(_peak, side).result()


_step: Step | None = None  # of this process


def _start(contender: Contender) -> None:
    global _step
    _step = contender.start()


def _seconds(side: int) -> float:
    assert _step is not None
    _step(side)
    elapsed = timed(functools.partial(_step, side))
    # What is free goes back, for the other processes.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc's
    return elapsed


def _peak(side: int) -> int:
    assert _step is not None
    _step(side)
    synchronize()
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: Linux hands a parent's peak down to the process that it starts.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
