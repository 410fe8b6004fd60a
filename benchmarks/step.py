"""Compares a training step with the authors' step and with supervised training: ``python -m benchmarks.step``.

A step is forward, backward, clipping, optimiser and momentum network, on fixed random inputs:

* ``authors``: the authors' step in plain PyTorch (:mod:`benchmarks.authors`), on canvases of ``--cells`` cells;
* ``released``: the preset that computes the same, on the same canvases;
* ``matched``: the preset that computes only what enters the loss, on the same canvases;
* ``recompute``: ``matched`` with activation checkpointing;
* ``graph``, ``compile``: ``matched`` as a CUDA graph, which needs a GPU, and with torch.compile;
* ``bf16``: ``matched`` in bf16, regardless of ``--precision``. It is slower than fp32 on a CPU without bf16
  instructions; ``mcl doctor`` says whether it has them;
* ``budget``, ``budget_2x``: the preset of that name with its own canvas schedule, regardless of ``--cells``. All sizes
  are measured; a round is their mean, weighted by epochs;
* ``supervised``: torchvision's model at 224 px, regardless of ``--cells``, with which ``mcl budget`` compares;
  ``supervised_canvas``: the same at canvas size. Their steps are forward, backward and SGD.

Each contender has its own process. They take turns, one at a time, in rounds; each turn has an untimed step first.
Medians over rounds and the peak memory of each process are reported. FLOPs and saved bytes are counted
(``mcl.budget``).
"""

import contextlib
import ctypes
import dataclasses
import functools
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch.optim import SGD

from benchmarks import charts
from benchmarks.authors import Authors, AuthorsStep
from benchmarks.common import PRESETS, Result, argument_parser, finish, per_call, progress, rounds, summary, tables
from dali_pipelines.batch import MontageBatch, in_order
from dali_pipelines.geometry import STRIDE
from mcl import config
from mcl.budget import budget, count
from mcl.config import Config, TrainerConfig
from mcl.objectives import build
from mcl.train import arithmetic, memory
from mcl.train.optim import AUTOCAST
from mcl.train.step import TrainingStep
from mcl.train.trainer import resolve_device

Step = Callable[[int], object]
"""Runs a step on images, or canvases, with a side of so many pixels; inputs are made in the first step of a size."""


@dataclass(frozen=True)
class Setting:
    """Settings that all contenders share."""

    backbone: str
    cells: int  # of canvases; canvas schedules are not changed
    images: int  # per step
    precision: str  # trainer.precision
    device: str  # trainer.device
    tf32: bool = True  # trainer.tf32


Stage = dict[str, Any]
"""Epochs with images, or canvases, of one size: ``epochs``, ``side`` (pixels), and the counted values
``gflop_per_image`` and ``saved_bytes``, which autograd keeps for backward; supervised training has no
``saved_bytes``."""


@dataclass(frozen=True)
class Supervised:
    """torchvision's model with its classifier: cross-entropy, SGD with momentum and weight decay, channels_last."""

    setting: Setting
    side: int

    def stages(self) -> list[Stage]:
        """The stages to measure, with counted FLOPs; counting takes seconds."""
        flops = count.supervised(self.setting.backbone, self.side)
        return [{"epochs": 1, "side": self.side, "gflop_per_image": flops / 1e9}]

    def start(self) -> Step:
        """Makes the model."""
        setting, device = self.setting, resolve_device(self.setting.device)
        arithmetic.choose(TrainerConfig(tf32=setting.tf32))
        model = torchvision.models.get_model(setting.backbone).to(device, memory_format=torch.channels_last)
        lr = 0.1 * setting.images / 256
        optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4, foreach=True)
        scaler = torch.amp.GradScaler(device.type, enabled=setting.precision == "fp16")
        dtype = AUTOCAST.get(setting.precision)
        labels = torch.zeros(setting.images, dtype=torch.int64, device=device)
        pixels = functools.cache(lambda side: _noise(setting.images, side, seed=0).to(device))

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
    """A preset of this project, in one process: forward, backward, clipping, optimiser, momentum network."""

    config: Config
    plain: bool = False  # whether to run the authors' step in plain PyTorch, which computes the same as `released`

    def stages(self) -> list[Stage]:
        """As :meth:`Supervised.stages`.

        Raises:
            ConfigError: the batch does not fill whole canvases.
        """
        counted = ["epochs", "gflop_per_image", *([] if self.plain else ["saved_bytes"])]
        stages = budget(self.config, gpus=1)["stages"]
        return [{"side": stage["canvas"], **{key: stage[key] for key in counted}} for stage in stages]

    def start(self) -> Step:
        """Makes the model."""
        optim, device = self.config.optim, resolve_device(self.config.trainer.device)
        arithmetic.choose(self.config.trainer)
        update: Callable[[MontageBatch, MontageBatch, float, float], object]
        if self.plain:
            update = AuthorsStep(self.config, Authors(self.config.model, self.config.montage.cells).to(device))
        else:
            update = TrainingStep(self.config, build(self.config), device)
        images = self.config.trainer.global_batch
        lr = optim.base_lr * images / 256

        @functools.cache
        def views(side: int) -> tuple[MontageBatch, MontageBatch]:
            geometry = dataclasses.replace(self.config.montage, cells=side // STRIDE, schedule=())
            number = sum(geometry.canvases(images))
            query, key = (in_order(geometry, images, _noise(number, side, seed)) for seed in (0, 1))
            return query.to(device), key.to(device)

        return lambda side: update(*views(side), lr, optim.ema)


def _noise(images: int, side: int, seed: int) -> torch.Tensor:
    """Random values (images, 3, side, side), channels_last."""
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return pixels.contiguous(memory_format=torch.channels_last)


Contender = Supervised | Pretraining


def _preset(setting: Setting, name: str, *words: str, scheduled: bool = False) -> Pretraining:
    """A preset with the backbone, batch, precision, device and size of the setting, and with the overrides `words`.

    Args:
        scheduled: whether to keep the preset's canvas schedule.
    """
    common = [
        f"model.backbone={setting.backbone}",
        f"trainer.global_batch={setting.images}",
        f"trainer.precision={setting.precision}",
        f"trainer.device={setting.device}",
        f"trainer.tf32={setting.tf32}",
    ]
    sized = [] if scheduled else [f"montage.cells={setting.cells}"]
    return Pretraining(config.load(PRESETS / f"mcl_r50_fpn_100e_{name}.yaml", [*common, *sized, *words]))


CONTENDERS: dict[str, tuple[str, Callable[[Setting], Contender]]] = {
    "supervised": ("supervised, 224 px", lambda setting: Supervised(setting, 224)),
    "supervised_canvas": ("supervised, canvas size", lambda setting: Supervised(setting, STRIDE * setting.cells)),
    "authors": (
        "authors, plain PyTorch",
        lambda setting: dataclasses.replace(_preset(setting, "in1k_released", "trainer.recompute=false"), plain=True),
    ),
    "released": ("released", lambda setting: _preset(setting, "in1k_released", "trainer.recompute=false")),
    "matched": ("matched", lambda setting: _preset(setting, "in1k")),
    "recompute": ("matched, recompute", lambda setting: _preset(setting, "in1k", "trainer.recompute=true")),
    "graph": ("matched, CUDA graph", lambda setting: _preset(setting, "in1k", "trainer.cuda_graph=true")),
    "compile": ("matched, torch.compile", lambda setting: _preset(setting, "in1k", "trainer.compile=true")),
    "bf16": ("matched, bf16", lambda setting: _preset(setting, "in1k", "trainer.precision=bf16")),
    "budget": ("budget", lambda setting: _preset(setting, "budget", scheduled=True)),
    "budget_2x": ("budget_2x", lambda setting: _preset(setting, "budget_2x", scheduled=True)),
}
"""By key: the label in tables, and a function that creates the contender."""


def apart(contender: Contender) -> ProcessPoolExecutor:
    """A separate process for a contender, so that contenders do not share memory and its peak can be measured."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (contender,))


_step: Step  # the step of this process, which apart() created


def _start(contender: Contender) -> None:
    global _step
    _step = contender.start()


def seconds(side: int) -> float:
    """Seconds of a step on images, or canvases, with a side of so many pixels; runs in a process of :func:`apart`.

    An untimed step comes first. On a GPU the result is the mean of several steps. Free memory is then returned to the
    system, for the other processes.
    """
    _step(side)
    elapsed = per_call(lambda: _step(side), 10)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc's
    return elapsed


def peak() -> int:
    """Peak memory of a process of :func:`apart`, bytes: resident, or allocated by PyTorch on the GPU."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    return round(1e9 * memory.peak(device)["peak_memory_gb"])


Stages = Mapping[str, Sequence[Stage]]
"""The stages of each contender."""


def measure(
    contenders: Mapping[str, Contender], stages: Stages, repeat: int
) -> tuple[dict[str, list[list[float]]], dict[str, int]]:
    """Measures steps of all contenders, each in its own process.

    Returns:
        For each contender and stage, the seconds of a step in every round; and for each contender, its peak memory in
        bytes.
    """
    process = functools.cache(lambda name: apart(contenders[name]))
    entries = {f"{name}, {s['side']} px": (name, s["side"]) for name, each in stages.items() for s in each}

    def turn(entry: str, counts: bool) -> float:
        name, side = entries[entry]
        return process(name).submit(seconds, side).result()

    measured = rounds(list(entries), repeat, turn)
    peaks = {name: process(name).submit(peak).result() for name in contenders}
    return {name: [measured[f"{name}, {s['side']} px"] for s in each] for name, each in stages.items()}, peaks


def evaluate(
    stages: Stages, measured: Mapping[str, Sequence[Sequence[float]]], peaks: Mapping[str, int], images: int
) -> list[Result]:
    """One result per contender; ``seconds`` are per step.

    ``ratio_to_supervised`` is the time of a step divided by that of a supervised step at 224 px, ``counted_ratio`` the
    ratio of their FLOPs. ``faster_than_released`` is the speed relative to ``released``, ``saved_of_released`` the
    ratio of saved bytes. Ratios are left out if one of the two was not measured. Stages of a canvas schedule have the
    first two.

    Args:
        peaks: peak memory of each contender, bytes.
        images: images per step.
    """
    results = {}
    for name, each in stages.items():
        weights = [stage["epochs"] for stage in each]
        means = [statistics.fmean(times, weights) for times in zip(*measured[name], strict=True)]
        gflop = statistics.fmean([stage["gflop_per_image"] for stage in each], weights)
        result = summary(CONTENDERS[name][0], means, contender=name, gflop_per_image=gflop)
        result["images_per_s"] = images / result["seconds"]
        result["gflop_per_s"] = gflop * result["images_per_s"]
        result["peak_bytes"] = peaks[name]
        if "saved_bytes" in each[0]:
            result["saved_bytes"] = max(stage["saved_bytes"] for stage in each)
        if len(each) > 1:
            medians = map(statistics.median, measured[name])
            result["stages"] = [{**stage, "seconds": s} for stage, s in zip(each, medians, strict=True)]
        results[name] = result
    supervised, released = (results.get(name) for name in ("supervised", "released"))
    for result in results.values():
        if supervised is not None:
            for r in (result, *result.get("stages", [])):
                r["ratio_to_supervised"] = r["seconds"] / supervised["seconds"]
                r["counted_ratio"] = r["gflop_per_image"] / supervised["gflop_per_image"]
        if released is not None:
            result["faster_than_released"] = released["seconds"] / result["seconds"]
            if "saved_bytes" in result:
                result["saved_of_released"] = result["saved_bytes"] / released["saved_bytes"]
    return list(results.values())


_RATIOS = {
    "x supervised": "{ratio_to_supervised:.2f}x".format_map,
    "counted": "{counted_ratio:.2f}x".format_map,
}
_COLUMNS = {
    "what": itemgetter("name"),
    "images/s": itemgetter("images_per_s"),
    "spread": "{spread:.0%}".format_map,
    "GFLOP/s": itemgetter("gflop_per_s"),
    **_RATIOS,
    "faster than released": "{faster_than_released:.2f}x".format_map,
    "GB of activations": lambda r: f"{r['saved_bytes'] / 1e9:.2f}",
    "vs released": "{saved_of_released:.2f}x".format_map,
    "GB at peak": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
}
_STAGE_COLUMNS = {
    "what": "{name}, {side} px".format_map,
    "epochs": itemgetter("epochs"),
    "s per step": itemgetter("seconds"),
    **_RATIOS,
}


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    stages = [{"name": r["name"], **stage} for r in results for stage in r.get("stages", [])]
    return tables((results, _COLUMNS), (stages, _STAGE_COLUMNS))


def bars(results: Sequence[Result]) -> dict[str, list[charts.Bar]]:
    """Rows of the chart."""
    rows = {}
    for r in results:
        ours = not r["contender"].startswith(("supervised", "authors", "released"))
        notes = []
        if "ratio_to_supervised" in r and r["contender"] != "supervised":
            notes.append(f"{r['ratio_to_supervised']:.1f}× a supervised step")
        if "faster_than_released" in r and ours:
            notes.append(f"{r['faster_than_released']:.1f}× as fast as released")
        rows[r["name"]] = [charts.Bar(r["images_per_s"], ", ".join(notes), ours)]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    default = ["supervised", "released", "matched", "recompute", "budget", "budget_2x"]
    parser = argument_parser(__doc__, repeat=5)
    parser.add_argument("--backbone", default="resnet50", help="model.backbone")
    parser.add_argument("--cells", type=int, default=7, help="montage.cells; a canvas side has 32 times as many pixels")
    parser.add_argument("--images", type=int, default=32, help="images per step (trainer.global_batch)")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="trainer.precision")
    parser.add_argument("--no-tf32", action="store_false", dest="tf32", help="trainer.tf32=false")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="trainer.device")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=default, help="what to measure")
    options = parser.parse_args(arguments)
    setting = Setting(options.backbone, options.cells, options.images, options.precision, options.device, options.tf32)
    contenders = {name: CONTENDERS[name][1](setting) for name in options.contenders}
    stages = {name: contenders[name].stages() for name in progress(list(contenders), "counting FLOPs, {}".format)}
    results = evaluate(stages, *measure(contenders, stages, options.repeat), options.images)
    what = f"{setting.backbone}, {STRIDE * setting.cells} px, {setting.images} images per step, {setting.precision}"
    print(f"{what}\n\n{table(results)}")
    if options.plot:
        charts.bars(f"Images per second of training: {what}", bars(results), options.plot)
    finish(options, results)


if __name__ == "__main__":
    main()
