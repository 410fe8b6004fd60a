"""Kernels that take a run's time, and the device's idle time: ``python -m benchmarks.profile CONFIG key=value``.

Profiles steps of the trainer with images of the loader, after a few others. On a CPU, operators are shown instead of
kernels.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Result, argument_parser, finish, markdown, timed
from benchmarks.end_to_end import DEMO, prepare
from mcl.config import Config
from mcl.train.trainer import Trainer

KINDS = {
    "loading": r"dali|nvjpeg|nvimgcodec|montage|make_tiles|halve",
    "communication": r"nccl|gloo",
    "BatchNorm": r"batch_norm|bn_fw|bn_bw",
    "ours, other": r"mcl::|region_pool|lars_|ema_|partial_squares|finish_norms",
    "convolutions and matrix products": (
        r"conv|gemm|xmma|cutlass|wgrad|dgrad|implicit|cudnn|nvjet|::mm|addmm|matmul|linear"
    ),
    "copies": r"memcpy|memset|copy|catarray|::cat|::to\b",
    "other": "",
}
"""Kinds of kernels; a kernel is of the first kind whose expression matches its name."""
_COLUMNS = {
    "kernel": itemgetter("name"),
    "share": "{share:.1%}".format_map,
    "ms per step": itemgetter("ms"),
    "calls": itemgetter("calls"),
}
_WARM_UP = 5


def measure(config: Config, steps: int) -> list[Result]:
    """Profiles some steps; returns the results of :func:`evaluate`."""
    trainer = Trainer(config)
    on_gpu = trainer.device.type == "cuda"

    def step() -> None:
        trainer.train_step(*next(trainer.loader))
        trainer.step += 1

    with trainer.loader:
        timed(step, _WARM_UP)
        # On a GPU the host's operators are not profiled: this would slow the host down, and the GPU would wait.
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            seconds = timed(step, steps)
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [(e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == device]
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [(r.key, getattr(r, own), r.count) for r in profiler.key_averages() if r.device_type == device]
    return evaluate(kernels, spans, seconds, steps, config.trainer.global_batch)


def evaluate(
    kernels: Iterable[tuple[str, float, int]],
    spans: Iterable[tuple[float, float]],
    seconds: float,
    steps: int,
    images: int,
) -> list[Result]:
    """A result for the step, then one for each kernel, the longest first.

    The step has ``idle``, the share of its time in which the device was idle, and ``kinds``, the shares of the device's
    time by kinds of kernels.

    Args:
        kernels: name, microseconds and calls of each kernel, over all steps.
        spans: start and end of the device's activities, microseconds.
        seconds: duration of all steps, on the host's clock.
        steps: number of steps.
        images: images per step.
    """
    ordered = sorted(kernels, key=itemgetter(1), reverse=True)
    total = sum(time for _, time, _ in ordered) or 1
    kinds: dict[str, float] = defaultdict(float)
    for name, time, _ in ordered:
        kinds[next(k for k, words in KINDS.items() if re.search(words, name, re.IGNORECASE))] += time / total
    whole = {"name": "step", "seconds": seconds / steps, "images_per_s": steps * images / seconds}
    whole |= {
        "idle": max(0.0, 1 - busy(spans) / 1e6 / seconds),
        "kinds": dict(sorted(kinds.items(), key=itemgetter(1), reverse=True)),
    }
    rows = [
        {
            "name": name,
            "seconds": time / steps / 1e6,
            "ms": time / steps / 1e3,
            "calls": calls / steps,
            "share": time / total,
        }
        for name, time, calls in ordered
        if time > 0
    ]
    return [whole, *rows]


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def table(results: Sequence[Result], most: int = 20) -> str:
    """The results as Markdown, with the longest kernels."""
    step, *kernels = results
    kinds = markdown(["idle", *step["kinds"]], [[f"{part:.1%}" for part in (step["idle"], *step["kinds"].values())]])
    rows = [[make(kernel) for make in _COLUMNS.values()] for kernel in kernels[:most]]
    return f"{kinds}\n\n{markdown(list(_COLUMNS), [[str(row[0])[:100], *row[1:]] for row in rows])}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, repeat=1, plot=False)
    parser.add_argument("config", type=Path, nargs="?", default=DEMO, help="YAML file; default: the demo's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.root=FOLDER")
    parser.add_argument("--steps", type=int, default=5, help="number of profiled steps")
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config, _ = prepare(options.config, [*options.overrides, f"output={folder}"], 0)
        results = measure(config, options.steps)
    print(f"{results[0]['images_per_s']:.0f} images/s under the profiler\n\n{table(results)}")
    finish(options, results)


if __name__ == "__main__":
    main()
