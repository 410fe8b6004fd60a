"""A training step beside the authors' way and beside supervised training: ``python -m benchmarks.step``.

A step is forward, backward, clip, optimiser and momentum network, on fixed inputs of noise:

* ``released``: the preset of that name, at canvases of ``--cells`` cells: the authors' way;
* ``matched``: the preset, at the same canvases;
* ``recompute``: ``matched`` with activation checkpointing;
* ``bf16``: ``matched`` in bf16, whatever ``--precision``; slower than fp32 on a CPU without bf16 instructions, of which
  ``mcl doctor`` tells;
* ``budget``, ``budget_2x``: the preset of that name at every size of its own canvas schedule, whatever ``--cells``; a
  round is the mean of its sizes, weighted by their epochs;
* ``supervised``: torchvision's model at 224 px, whatever ``--cells``: what ``mcl budget`` compares with;
  ``supervised_canvas``: the same at canvas size. Forward, backward, SGD.

Each has a process of its own. All take turns, one at a time, in rounds, with a step before the one that is timed; what
is reported are medians over rounds. FLOPs and saved bytes are counted (``mcl.budget``); with ``--memory`` a fresh
process per contender does one step, the largest, and tells its peak.
"""

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence
from operator import itemgetter

from benchmarks import charts
from benchmarks.common import Progress, Result, digits, finish, parser, rounds, summary
from benchmarks.common import table as markdown_table
from benchmarks.step_contenders import CONTENDERS, Apart, Contender, Setting, Stage
from mcl.montage import STRIDE

Stages = Mapping[str, Sequence[Stage]]
"""What each contender is measured at."""

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
    "GB saved": lambda r: f"{r['saved_bytes'] / 1e9:.2f}",
    "of released's": "{saved_of_released:.2f}x".format_map,
    "GB at peak": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
}
_STAGE_COLUMNS = {
    "what": "{name}, {side} px".format_map,
    "epochs": itemgetter("epochs"),
    "s per step": itemgetter("seconds"),
    **_RATIOS,
}


def prepare(contenders: Mapping[str, Contender], memory: bool) -> tuple[dict[str, list[Stage]], dict[str, int]]:
    """Counts what is to be measured and, if asked to, measures peaks of memory in fresh processes.

    Returns:
        Stages, and bytes, of each contender.

    Raises:
        ConfigError: the setting makes no legal configuration.
    """
    stages, peaks = {}, {}
    with Progress(len(contenders)) as progress:
        for name, contender in contenders.items():
            progress.begin(f"counting FLOPs{' and measuring memory' * memory}, {name}")
            stages[name] = contender.stages()
            if memory:
                with Apart(contender) as apart:
                    peaks[name] = apart.peak(max(stage.side for stage in stages[name]))
            progress.advance()
    return stages, peaks


def measure(contenders: Mapping[str, Contender], stages: Stages, repeat: int) -> dict[str, list[list[float]]]:
    """Of each contender, for each of its stages, the seconds of a step in every round."""
    apart = functools.cache(lambda name: Apart(contenders[name]))
    sizes = {f"{name}, {stage.side} px": (name, stage.side) for name, each in stages.items() for stage in each}

    def turn(label: str, counts: bool) -> float:
        name, side = sizes[label]
        return apart(name).seconds(side)

    seconds = rounds(list(sizes), repeat, turn)
    return {name: [seconds[f"{name}, {stage.side} px"] for stage in each] for name, each in stages.items()}


def evaluate(
    stages: Stages, measured: Mapping[str, Sequence[Sequence[float]]], peaks: Mapping[str, int], images: int
) -> list[Result]:
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
        means = [statistics.fmean(times, weights) for times in zip(*measured[name], strict=True)]
        result = summary(CONTENDERS[name][0], means, contender=name)
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


def _compare(results: Mapping[str, Result]) -> None:
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
    stages = [{"name": r["name"], **stage} for r in results for stage in r.get("stages", [])]
    tables = [markdown_table(results, _COLUMNS)]
    return "\n\n".join([*tables, markdown_table(stages, _STAGE_COLUMNS)] if stages else tables)


def bars(results: Sequence[Result]) -> dict[str, list[charts.Bar]]:
    """What the chart shows."""
    rows = {}
    for r in results:
        ours = not r["contender"].startswith(("supervised", "released"))
        notes = []
        if "ratio_to_supervised" in r and r["contender"] != "supervised":
            notes.append(f"{digits(r['ratio_to_supervised'])}× a supervised step")
        if "faster_than_released" in r and ours:
            notes.append(f"{r['faster_than_released']:.1f}× as fast as released")
        rows[r["name"]] = [charts.Bar(r["images_per_s"], ", ".join(notes), ours)]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    setting = Setting(options.backbone, options.cells, options.images, options.precision, options.device)
    contenders = {name: CONTENDERS[name][1](setting) for name in options.contenders}
    stages, peaks = prepare(contenders, options.memory)
    results = evaluate(stages, measure(contenders, stages, options.repeat), peaks, options.images)
    what = f"{setting.backbone}, {STRIDE * setting.cells} px, {setting.images} images per step, {setting.precision}"
    print(f"{what}\n\n{table(results)}")
    if options.plot:
        charts.bars(f"Images per second of training: {what}", bars(results), options.plot)
    finish(options, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = ["supervised", "released", "matched", "recompute", "budget", "budget_2x"]
    options = parser(__doc__, repeat=5)
    options.add_argument("--backbone", default="resnet50", help="model.backbone")
    options.add_argument("--cells", type=int, default=7, help="montage.cells: canvases of 32 times as many pixels")
    options.add_argument("--images", type=int, default=32, help="of a step (trainer.global_batch)")
    options.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="trainer.precision")
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="trainer.device")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=default, help="who takes part")
    options.add_argument("--memory", action="store_true", help="measure peaks in fresh processes")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
