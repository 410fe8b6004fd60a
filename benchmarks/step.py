"""A training step beside the authors' way and beside supervised training: ``python -m benchmarks.step``.

A step is forward, backward, clip, optimiser and momentum network, on fixed inputs of noise:

* ``released``: the preset of that name, at canvases of ``--cells`` cells, with PyTorch as it comes, which the authors'
  code would run on: its layers, and memory as the C library hands it out by default, where all others keep it;
* ``released_ours``: the same with our layers, and kept memory;
* ``matched``: the preset, at the same canvases;
* ``recompute``: ``matched`` with activation checkpointing;
* ``bf16``: ``matched`` in bf16, whatever ``--precision``; slower than fp32 on a CPU without bf16 instructions, of which
  ``mcl doctor`` tells;
* ``budget``, ``budget_2x``: the preset of that name at every size of its own canvas schedule, whatever ``--cells``; a
  round is the mean of its sizes, weighted by their epochs;
* ``supervised``: torchvision's model at 224 px, whatever ``--cells``: what ``mcl budget`` compares with;
  ``supervised_canvas``: the same at canvas size; ``supervised_ours``: with our layers. Forward, backward, SGD.

Each has a process of its own. All take turns, one at a time, in rounds, with a step before the one that is timed; what
is reported are medians over rounds. FLOPs and saved bytes are counted (``mcl.budget``); with ``--memory`` a fresh
process per contender does one step, the largest, and tells its peak.
"""

import argparse
import functools
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import compress
from pathlib import Path

from benchmarks import bars
from benchmarks.common import Result, finish, interleave, markdown, parser, summary
from benchmarks.loaders.chart import rate
from benchmarks.steps import processes
from benchmarks.steps.contenders import CONTENDERS, NAMES, Contender, Setting, Stage
from dali_pipelines.geometry import STRIDE

Stages = dict[str, list[Stage]]
"""What each contender is measured at."""

Measured = dict[str, list[list[float]]]
"""Of each contender, for each of its stages, the seconds of a step in every round."""


def measure(contenders: dict[str, Contender], stages: Stages, repeat: int) -> Measured:
    """A step of every contender at each of its stages, round by round."""
    apart = {name: processes.Apart(each) for name, each in contenders.items()}
    sizes = {f"{name}, {stage.side} px": (name, stage.side) for name, each in stages.items() for stage in each}
    turns = {turn: functools.partial(apart[name].step, side) for turn, (name, side) in sizes.items()}

    def awake(turn: str) -> AbstractContextManager[None]:
        name, side = sizes[turn]
        return apart[name].awake(side)

    seconds = interleave(turns, repeat, around=awake)
    return {name: [seconds[f"{name}, {stage.side} px"] for stage in each] for name, each in stages.items()}


def evaluate(stages: Stages, measured: Measured, peaks: dict[str, int], images: int) -> list[Result]:
    """One result per contender; ``seconds`` are per step.

    ``ratio_to_supervised`` is the time of a step over that of a supervised one at 224 px, ``counted_ratio`` the same of
    their FLOPs; ``faster_than_released`` is how many times, ``saved_of_released`` the part of its saved bytes. Each is
    there where both sides are. The stages of a canvas schedule have the first two.

    Args:
        peaks: bytes, of those whose peak was measured.
        images: of a step.
    """
    results = {}
    for name, each in stages.items():
        weights = [stage.epochs for stage in each]
        rounds = [statistics.fmean(times, weights) for times in zip(*measured[name], strict=True)]
        result = summary(NAMES.get(name, name), rounds, contender=name)
        gflop = statistics.fmean([stage.gflop_per_image for stage in each], weights)
        images_per_s = images / result["seconds"]
        result |= {"images_per_s": images_per_s, "gflop_per_image": gflop, "gflop_per_s": gflop * images_per_s}
        saved = [stage.saved_bytes for stage in each if stage.saved_bytes is not None]
        result |= {"saved_bytes": max(saved)} if saved else {}
        result |= {"peak_bytes": peaks[name]} if name in peaks else {}
        if len(each) > 1:
            result["stages"] = [
                {
                    "side": stage.side,
                    "epochs": stage.epochs,
                    "seconds": statistics.median(times),
                    "gflop_per_image": stage.gflop_per_image,
                }
                for stage, times in zip(each, measured[name], strict=True)
            ]
        results[name] = result
    _compare(results)
    return list(results.values())


def _compare(results: dict[str, Result]) -> None:
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


def table(results: Sequence[Result]) -> str:
    """What was measured, as Markdown."""
    header = [
        "what",
        "images/s",
        "spread",
        "GFLOP/s",
        "x supervised",
        "counted",
        "faster than released",
    ]
    rows = [
        (
            r["name"],
            rate(r["images_per_s"]),
            f"{r['spread']:.0%}",
            rate(r["gflop_per_s"]),
            *(
                f"{r[key]:.2f}x" if key in r else ""
                for key in ("ratio_to_supervised", "counted_ratio", "faster_than_released")
            ),
            f"{r['saved_bytes'] / 1e9:.2f}" if "saved_bytes" in r else "",
            f"{r['saved_of_released']:.2f}x" if "saved_of_released" in r else "",
            f"{r['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in r else "",
        )
        for r in results
    ]
    header += ["GB saved", "of released's", "GB at peak"]
    there = [any(row[i] for row in rows) for i in range(len(header))]  # who is not compared with has no column
    tables = [markdown(list(compress(header, there)), [tuple(compress(row, there)) for row in rows])]
    stages = [(r["name"], stage) for r in results for stage in r.get("stages", [])]
    if stages:
        rows = [
            (
                f"{name}, {s['side']} px",
                s["epochs"],
                f"{s['seconds']:.3g}",
                *(f"{s[key]:.2f}x" if key in s else "" for key in ("ratio_to_supervised", "counted_ratio")),
            )
            for name, s in stages
        ]
        tables.append(markdown(["what", "epochs", "s per step", "x supervised", "counted"], rows))
    return "\n\n".join(tables)


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Writes the chart."""
    chart = []
    for r in results:
        notes = []
        if "ratio_to_supervised" in r and r["contender"] != "supervised":
            notes.append(f"{r['ratio_to_supervised']:.1f}× a supervised step")
        ours = not r["contender"].startswith(("supervised", "released"))
        if "faster_than_released" in r and ours:
            notes.append(f"{r['faster_than_released']:.1f}× as fast as released")
        chart.append(bars.Bar(r["name"], r["images_per_s"], ", ".join(notes), ours))
    bars.draw(title, chart, path)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    setting = Setting(options.backbone, options.cells, options.images, options.precision, options.device)
    contenders = {name: CONTENDERS[name](setting) for name in options.contenders}
    stages = {name: contender.stages() for name, contender in contenders.items()}
    peaks = {}
    if options.memory:
        for name, contender in contenders.items():
            peaks[name] = processes.peak(contender, max(stage.side for stage in stages[name]))
    results = evaluate(stages, measure(contenders, stages, options.repeat), peaks, options.images)
    what = f"{setting.backbone}, {STRIDE * setting.cells} px, {setting.images} images per step, {setting.precision}"
    print(f"{what}\n\n{table(results)}")
    if options.plot:
        draw(results, f"Images per second of training: {what}", options.plot)
    finish(options, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = ["supervised", "supervised_ours", "released", "matched", "recompute", "budget", "budget_2x"]
    options = parser(__doc__ or "")
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.set_defaults(repeat=5)
    options.add_argument("--backbone", default="resnet50", help="model.backbone")
    options.add_argument("--cells", type=int, default=7, help="montage.cells: canvases of 32 times as many pixels")
    options.add_argument("--images", type=int, default=32, help="of a step (trainer.global_batch)")
    options.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="trainer.precision")
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="trainer.device")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=default, help="who takes part")
    options.add_argument("--memory", action="store_true", help="measure peaks in fresh processes")
    options.add_argument("--plot", type=Path, help="PNG file to draw the results to")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
