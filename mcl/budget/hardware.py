"""Duration of a budget: published throughputs, measurements of the run itself, and the speed that the loader needs.

Estimates assume that MCL reaches the FLOP/s of the cited supervised ResNet-50 training on the same hardware, and that
nodes of 8 GPUs scale without loss. They do not replace measurements.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcl.budget.count import Stage
from mcl.config import Config, Trait, all_keys, from_dict, value
from mcl.records.metrics import read
from mcl.train import checkpoint

IMAGENET = 1_281_167
"""Training images of ImageNet-1k; the default number of images per epoch."""

GATE = 19_000
"""Images per second that DALI's own test requires of one H100: decode, random crop and resize to a view of 224 px."""

GATE_SOURCE = "NVIDIA/DALI qa/TL1_decoder_perf/test.sh: H100 on x86, 70 CPU threads, hardware decoder share 0.12"

NODE = 8
"""GPUs per machine in the published measurements."""


@dataclass(frozen=True)
class Yardstick:
    """Supervised ResNet-50 training at 224 px, images per second."""

    hardware: str
    one: float  # on one GPU
    node: float  # on NODE GPUs
    source: str
    precisions: tuple[str, ...] = ("bf16", "fp16")  # values of trainer.precision that it applies to

    def images_per_s(self, gpus: int) -> float:
        """Images per second on one GPU, or on whole nodes."""
        return self.one if gpus == 1 else self.node * gpus / NODE


_EXAMPLES = "NVIDIA DeepLearningExamples, PyTorch ResNet-50 v1.5, AMP, 1 and 8 GPUs"
_MLPERF = 28.7 / 13.466  # minutes of NVIDIA's closed submissions: 8 A100 in round 2.0, 8 H100 in round 3.0
YARDSTICKS = (
    Yardstick("A100", 2_470, 16_621, f"{_EXAMPLES}: DGX A100 80 GB"),
    Yardstick(
        *("H100", 2_470 * _MLPERF, 16_621 * _MLPERF),
        "derived, rough: A100 times 28.7 min / 13.466 min (MLPerf Training, ResNet-50 on 8 GPUs, rounds 2.0 and 3.0)",
    ),
    Yardstick("V100", 1_200, 8_322, f"{_EXAMPLES}: DGX-1 16 GB; in fp16, for it has no instructions for bf16"),
    Yardstick("A100", 938, 7_248, f"{_EXAMPLES.replace('AMP', 'TF32')}: DGX A100 80 GB", ("fp32",)),
)
GPUS = (1, NODE, 4 * NODE)

_BENCHMARK_VIEWS = 2 * (1 + 1 / 4 + 1 / 16 + 1 / 64)
"""Views of 224 px per image in the loader benchmark: both views, four levels, each cut out at its own size."""
_BENCHMARK = Path(__file__).with_name("loader.json")


@dataclass(frozen=True)
class Speed:
    """Throughput of GPUs, or of the device of a run."""

    kind: str  # measured or estimate
    hardware: str
    gpus: int
    flops_per_s: float  # of all GPUs together
    source: str


def measurement(config: Config, flops: Mapping[int, float]) -> Speed | None:
    """The throughput of the run in the run folder, if its configuration computes the same; None without records.

    Args:
        config: configuration of the run.
        flops: FLOPs per image, by ``montage.cells``; records with other values are ignored.

    Raises:
        CheckpointError: the folder has checkpoints, but none can be read.
    """
    folder = config.run_folder
    records = [r for r in read(folder / "metrics.jsonl") if r["kind"] == "train" and "images_per_s" in r]
    state = checkpoint.latest(folder / "checkpoints") if records else None
    if state is None:
        return None
    before = from_dict(state["config"])
    decisive = [k.name for k in all_keys() if Trait.DECIDES_SPEED in k.traits and Trait.AT_START not in k.traits]
    if any(value(before, name) != value(config, name) for name in decisive):
        return None
    cells = [config.montage.at(math.ceil(r["epoch"]) - 1).cells for r in records]
    rates = [r["images_per_s"] * flops[c] for r, c in zip(records, cells, strict=True) if c in flops]
    if not rates:
        return None
    device, processes = state["environment"]["device"], state["environment"]["world_size"]
    return Speed("measured", device, processes, statistics.median(rates), str(folder / "metrics.jsonl"))


def loading_on_cpu(path: Path = _BENCHMARK) -> dict[str, Any] | None:
    """Cost of the fused engine on a CPU, from this project's benchmark; None without its results.

    Returns:
        decode_s (core-seconds to decode an image), view_s (core-seconds to make a view of 224 px from it), views (per
        image in the benchmark), threads, cpu, source.
    """
    report = json.loads(path.read_text()) if path.exists() else {"results": []}
    fused = [r for r in report["results"] if r.get("contender") == "fused"]
    if not fused:
        return None
    most = max(fused, key=lambda r: int(r["threads"]))
    seconds, decode = most["threads"] / most["images_per_s"], most["shares"]["decode"]
    return {
        "decode_s": seconds * decode,
        "view_s": seconds * (1 - decode) / _BENCHMARK_VIEWS,
        "views": _BENCHMARK_VIEWS,
        "threads": most["threads"],
        "cpu": report["environment"]["cpu"],
        "source": f"{path.parent.parent.name}/{path.parent.name}/{path.name}",
    }


def yardsticks(precision: str) -> list[Yardstick]:
    """Yardsticks for a ``trainer.precision``."""
    return [yardstick for yardstick in YARDSTICKS if precision in yardstick.precisions]


def times(
    stages: Sequence[Stage],
    images: int,
    supervised: float,
    precision: str,
    measured: Speed | None = None,
    cpu: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Speed and duration by hardware and number of GPUs, measured (first) and estimated.

    Args:
        stages: stages of the configuration.
        images: images per epoch.
        supervised: FLOPs per image of a supervised ResNet-50 step at 224 px.
        precision: value of ``trainer.precision``; without published throughputs for it, there are no estimates.
        measured: replaces the estimate for its device and number of processes.
        cpu: result of :func:`loading_on_cpu`.
    """
    speeds = [measured] if measured else []
    for yardstick in yardsticks(precision):
        for gpus in GPUS:
            if not (measured and yardstick.hardware in measured.hardware and gpus == measured.gpus):
                rate = yardstick.images_per_s(gpus) * supervised
                speeds.append(Speed("estimate", yardstick.hardware, gpus, rate, yardstick.source))
    return [_row(speed, stages, images, cpu) for speed in speeds]


def _row(speed: Speed, stages: Sequence[Stage], images: int, cpu: Mapping[str, Any] | None) -> dict[str, Any]:
    epochs = sum(stage.epochs for stage in stages)
    seconds = images * sum(stage.epochs * stage.flops for stage in stages) / speed.flops_per_s
    needed = [(speed.flops_per_s / stage.flops / speed.gpus, stage.views) for stage in stages]  # images per s and GPU
    gate = max(rate * max(1, views) / GATE for rate, views in needed)
    cores = max(rate * (cpu["decode_s"] + cpu["view_s"] * views) for rate, views in needed) if cpu else None
    return {
        "kind": speed.kind,
        "hardware": speed.hardware,
        "gpus": speed.gpus,
        "images_per_s": images * epochs / seconds,
        "hours": seconds / 3600,
        "gpu_hours": seconds / 3600 * speed.gpus,
        "tflop_per_s_per_gpu": speed.flops_per_s / speed.gpus / 1e12,
        "loader_images_per_s_per_gpu": max(rate for rate, _ in needed),
        "gate_share": gate if "H100" in speed.hardware else None,
        "cpu_cores_per_gpu": cores,
        "source": speed.source,
    }
