"""What all benchmarks share: rounds of turns, the machine, results as JSON, tables, and a gate against earlier results.

Results are medians over rounds. In a round every contender has one turn, so that whatever disturbs the machine disturbs
all of them alike. Spread is the interquartile range relative to the median.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
PRESETS = ROOT / "configs" / "pretrain"

Result = dict[str, Any]
T = TypeVar("T")
V = TypeVar("V")


class Progress:
    """Says on stderr what is being measured, how much is done, and how long the rest will take.

    A bar on a terminal, lines elsewhere.

    Args:
        total: turns, or whatever is counted.
        per_line: how many of them a line stands for; those that take long have a line of their own.
        shown: whether anything is said.
    """

    _LONG = 30.0  # seconds

    def __init__(self, total: int, per_line: int = 1, shown: bool = True) -> None:
        self._total, self._per_line, self._done = total, per_line, 0
        self._start, self._said = time.monotonic(), 0.0
        self._bar = tqdm(total=total, smoothing=0, leave=False, disable=not (shown and sys.stderr.isatty()))
        self._lines = shown and self._bar.disable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def begin(self, what: str) -> None:
        """Names what begins now."""
        now = time.monotonic()
        self._bar.set_description(what)
        if self._lines and (self._done % self._per_line == 0 or now - self._said > self._LONG):
            shape = "{desc}{n_fmt} of {total_fmt} done, {elapsed} elapsed, {remaining} left"
            line = tqdm.format_meter(self._done, self._total, now - self._start, prefix=f"{what}: ", bar_format=shape)
            print(line, file=sys.stderr, flush=True)
            self._said = now

    def advance(self) -> None:
        """Counts what began last as done."""
        self._done += 1
        self._bar.update()


def rounds(names: Sequence[T], repeat: int, turn: Callable[[T, bool], V], shown: bool = True) -> dict[T, list[V]]:
    """What the turns of each contender returned in `repeat` rounds, after one round of warm-up.

    The order rotates, so that no contender always comes first.

    Args:
        turn: takes a turn; its arguments are the name and whether the turn counts.
        shown: whether progress is shown.
    """
    values: dict[T, list[V]] = {name: [] for name in names}
    with Progress(len(names) * (repeat + 1), per_line=len(names), shown=shown) as progress:
        for number in range(repeat + 1):
            for k in range(len(names)):
                name = names[(number + k) % len(names)]
                progress.begin(f"round {number} of {repeat}, {name}" if number else f"warm-up, {name}")
                value = turn(name, number > 0)
                progress.advance()
                if number:
                    values[name].append(value)
    return values


def interleave(functions: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """Seconds of the calls of each function, in rounds that show no progress."""
    return rounds(list(functions), repeat, lambda name, _: timed(functions[name]), shown=False)


def timed(function: Callable[[], object], times: int = 1) -> float:
    """Seconds of `times` calls. Waits for the GPU, where there is one, before and after."""
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Waits for the GPU where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(name: str, seconds: Sequence[float], **more: Any) -> Result:
    """One entry of the results."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
    times = {"seconds": median, "spread": (high - low) / median, "n": len(seconds), "rounds": list(seconds)}
    return {"name": name, **times, **more}


def environment() -> dict[str, Any]:
    """The machine and the versions that results depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": model[1] if model else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            name: _version(name) for name in ("torch", "torchvision", "nvidia-dali-cuda130", "pillow", "lightly")
        },
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def parser(description: str | None, repeat: int, plot: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; ends this process if it is one of several, which none can measure.

    Args:
        description: the docstring of the script.
        repeat: rounds by default.
        plot: whether the benchmark draws a chart.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(
            "benchmarks measure a single process; start them without torchrun. A run's own speed is in its metrics"
        )
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeat", type=int, default=repeat, help="rounds")
    options.add_argument("--json", type=Path, help="file to write the results to")
    options.add_argument("--gate", type=Path, help="earlier results: fail where a median is slower than there")
    options.add_argument("--tolerance", type=float, default=5, help="by so many percent")
    if plot:
        options.add_argument("--plot", type=Path, help="PNG file to draw the results to")
    return options


def finish(options: argparse.Namespace, results: Sequence[Result]) -> None:
    """Writes the JSON file and applies the gate that were asked for; exits with status 1 if it fails."""
    if options.json:
        config = {key: str(portable(v)) if isinstance(v, Path) else v for key, v in vars(options).items()}
        report = {"environment": environment(), "config": config, "results": list(results)}
        write(options.json, json.dumps(report, indent=1) + "\n")
    if options.gate:
        failures = slower(results, json.loads(options.gate.read_text())["results"], options.tolerance)
        if failures:
            sys.exit("\n".join(failures))


def slower(results: Sequence[Result], baseline: Sequence[Result], tolerance: float) -> list[str]:
    """What is slower than the baseline by more than `tolerance` percent, or missing, in words."""
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


def table(results: Sequence[Result], columns: Mapping[str, Callable[[Result], object]]) -> str:
    """A row per result, as Markdown; a column that no result has a value for is left out.

    Args:
        columns: by header, what makes a cell of a result, such as ``"{ratio:.2f}x".format_map``; a cell is empty where
            that raises KeyError.
    """
    cells = {header: [_cell(make, result) for result in results] for header, make in columns.items()}
    filled = {header: column for header, column in cells.items() if any(cell != "" for cell in column)}
    return markdown(list(filled), list(zip(*filled.values(), strict=True)))


def _cell(make: Callable[[Result], object], result: Result) -> object:
    try:
        return make(result)
    except KeyError:
        return ""


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats are written by :func:`digits`."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(digits(c) if isinstance(c, float) else str(c) for c in row) + " |")
    return "\n".join(lines)


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def portable(path: Path) -> Path:
    """Relative to the checkout, where it lies in it."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def write(path: Path, text: str) -> None:
    """Writes a file; whatever happens, `path` holds the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
