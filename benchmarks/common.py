"""Shared parts of benchmarks: rounds of turns, the machine, results as JSON, tables, and comparison with a baseline.

Results are medians over rounds. In a round every contender has one turn, so that disturbances of the machine affect all
contenders equally. Spread is the interquartile range relative to the median.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "mcl" / "presets"

Result = dict[str, Any]
T = TypeVar("T")
V = TypeVar("V")

_LONG = 30.0  # seconds


def progress(items: Sequence[T], what: Callable[[T], str], per_line: int = 1) -> Iterator[T]:
    """Yields the items; prints the current one and the time left on stderr.

    In a terminal this is a bar; elsewhere it is a line for every `per_line` items, and one after each long item.
    """
    start, said, total = time.monotonic(), 0.0, len(items)
    shape = "{desc}{n_fmt} of {total_fmt} done, {elapsed} elapsed, {remaining} left"
    with tqdm(total=total, smoothing=0, leave=False, disable=not sys.stderr.isatty()) as bar:
        for done, item in enumerate(items):
            now, name = time.monotonic(), what(item)
            bar.set_description(name)
            if bar.disable and (done % per_line == 0 or now - said > _LONG):
                line = tqdm.format_meter(done, total, now - start, prefix=f"{name}: ", bar_format=shape)
                print(line, file=sys.stderr, flush=True)
                said = now
            yield item
            bar.update()


def rounds(names: Sequence[T], repeat: int, turn: Callable[[T, bool], V], shown: bool = True) -> dict[T, list[V]]:
    """Results of each contender's turns in `repeat` rounds, after one round of warm-up.

    The order rotates, so that no contender always comes first.

    Args:
        names: the contenders.
        repeat: number of rounds that count.
        turn: runs a turn, given the contender's name and whether the turn counts.
        shown: whether progress is shown.
    """

    def describe(entry: tuple[T, int]) -> str:
        name, number = entry
        return f"round {number} of {repeat}, {name}" if number else f"warm-up, {name}"

    values: dict[T, list[V]] = {name: [] for name in names}
    order = [(names[(number + k) % len(names)], number) for number in range(repeat + 1) for k in range(len(names))]
    for name, number in progress(order, describe, len(names)) if shown else order:
        value = turn(name, number > 0)
        if number:
            values[name].append(value)
    return values


def interleave(functions: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Seconds of a call of each function in every round, without showing progress."""
    return rounds(list(functions), repeat, lambda name, _: per_call(functions[name]), shown=False)


def timed(function: Callable[[], object], times: int = 1) -> float:
    """Seconds of `times` calls. If there is a GPU, waits for it before and after."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize()
    return time.perf_counter() - start


def per_call(function: Callable[[], object], times: int = 20) -> float:
    """Seconds of a call; on a GPU, the mean of `times` calls, so that synchronising has little influence."""
    times = times if torch.cuda.is_available() else 1
    return timed(function, times) / times


def summary(name: str, seconds: Sequence[float], **more: Any) -> Result:
    """One entry of the results."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    times = {"seconds": median, "spread": (high - low) / median, "n": len(seconds), "rounds": list(seconds)}
    return {"name": name, **times, **more}


def environment(*libraries: str) -> dict[str, Any]:
    """The machine and the versions of libraries.

    Args:
        libraries: further libraries, besides those that all benchmarks use.
    """
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {}
    for name in ("torch", "torchvision", "nvidia-dali-cuda130", "pillow", "lightly", *libraries):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": model[1] if model else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def argument_parser(description: str | None, repeat: int, plot: bool = True) -> argparse.ArgumentParser:
    """Parser with the options of every benchmark. Exits if torchrun started this process, since benchmarks are for one
    process.

    Args:
        description: the docstring of the script.
        repeat: default number of rounds.
        plot: whether the benchmark draws a chart.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(
            "benchmarks measure a single process; start them without torchrun. metrics.jsonl has the speed of a run"
        )
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=repeat, help="number of rounds")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--gate", type=Path, help="earlier results: fail if a median is slower than in these")
    parser.add_argument("--tolerance", type=float, default=5, help="for --gate: allowed slowdown, in percent")
    if plot:
        parser.add_argument("--plot", type=Path, help="PNG file to write a chart of the results to")
    return parser


def finish(options: argparse.Namespace, results: Sequence[Result]) -> None:
    """Writes the JSON file and applies the gate, if requested; exits with status 1 if the gate fails."""
    if options.json:
        config = {key: str(portable(v)) if isinstance(v, Path) else v for key, v in vars(options).items()}
        report = {"environment": environment(), "config": config, "results": list(results)}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.gate:
        failures = slower(results, json.loads(options.gate.read_text())["results"], options.tolerance)
        if failures:
            sys.exit("\n".join(failures))


def slower(results: Sequence[Result], baseline: Sequence[Result], tolerance: float) -> list[str]:
    """Messages about results that are slower than the baseline by more than `tolerance` percent, or missing."""
    now = {r["name"]: r["seconds"] for r in results}
    failures = []
    for before in baseline:
        name, limit = before["name"], before["seconds"] * (1 + tolerance / 100)
        if name not in now:
            failures.append(f"{name}: in the baseline, but not measured")
        elif now[name] > limit:
            percent = 100 * (now[name] / before["seconds"] - 1)
            failures.append(f"{name}: {now[name]:.4g} s, {percent:.0f}% slower than {before['seconds']:.4g} s")
    return failures


def tables(*parts: tuple[Sequence[Result], Mapping[str, Callable[[Result], object]]]) -> str:
    """Tables as Markdown, without empty tables and empty columns.

    Args:
        parts: for each table, the results, which are its rows, and by header a function from a result to a cell, such
            as ``"{ratio:.2f}x".format_map``. A cell is empty if the function raises KeyError.
    """
    made = []
    for results, columns in parts:
        cells: dict[str, list[object]] = {}
        for header, make in columns.items():
            for row, result in enumerate(results):
                with contextlib.suppress(KeyError):
                    cells.setdefault(header, [""] * len(results))[row] = make(result)
        made += [markdown(list(cells), list(zip(*cells.values(), strict=True)))] if results else []
    return "\n\n".join(made)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as Markdown; floats are formatted by :func:`digits`."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(digits(c) if isinstance(c, float) else str(c) for c in row) + " |")
    return "\n".join(lines)


def digits(value: float) -> str:
    """Formats with three significant digits, or more before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def portable(path: Path) -> Path:
    """The path relative to the checkout, if it is inside."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
