"""What all benchmarks share: interleaved timing, the machine, results as JSON, and a gate against an earlier result.

Results are medians over rounds; a round calls everything that is compared once, so that what disturbs the machine
disturbs all alike. Spread is the interquartile range relative to the median.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = dict[str, Any]
T = TypeVar("T")


def turns(names: Sequence[T], repeat: int, warmup: int = 1) -> Iterator[tuple[T, bool]]:
    """Whose turn it is, and whether it counts: `repeat` rounds after `warmup` ones.

    The order rotates, so that none always comes first.
    """
    for turn in range(-warmup, repeat):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            yield name, turn >= 0


def interleave(
    functions: dict[str, Callable[[], object]],
    repeat: int,
    warmup: int = 1,
    around: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Seconds of every call, in the order of :func:`turns`.

    Args:
        around: made of a name, it is entered before each call of that function and left after it, and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for name, counts in turns(list(functions), repeat, warmup):
        with around(name):
            synchronize()
            start = time.perf_counter()
            functions[name]()
            synchronize()
            end = time.perf_counter()
        if counts:
            seconds[name].append(end - start)
    return seconds


def race(
    case: str, forwards: dict[str, Callable[[], object]], backwards: dict[str, Callable[[], object]], repeat: int
) -> list[Result]:
    """Results of each, by name: forward and backward together, and their ratio to the first's."""
    with torch.no_grad():
        forward = interleave(forwards, repeat)
    backward = interleave(backwards, repeat)
    results = []
    for name, seconds in forward.items():
        both = [a + b for a, b in zip(seconds, backward[name], strict=True)]
        results.append(summary(f"{case}: {name}", both, forward=statistics.median(seconds)))
    return [{**result, "ratio": result["seconds"] / results[0]["seconds"]} for result in results]


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
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in _read("/proc/cpuinfo").splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": {
            name: _version(name) for name in ("torch", "torchvision", "nvidia-dali-cuda130", "pillow", "lightly")
        },
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ends this process if it is one of several, which none can measure."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(
            "benchmarks measure a single process; start them without torchrun. A run's own speed is in its metrics"
        )
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--repeat", type=int, default=7, help="rounds")
    options.add_argument("--json", type=Path, help="file to write the results to")
    options.add_argument("--gate", type=Path, help="earlier results: fail where a median is slower than there")
    options.add_argument("--tolerance", type=float, default=5, help="by so many percent")
    return options


def finish(options: argparse.Namespace, results: Sequence[Result]) -> None:
    """Writes the JSON file and applies the gate that were asked for; exits with status 1 if it fails."""
    if options.json:
        config = {k: _portable(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        report = {"environment": environment(), "config": config, "results": list(results)}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
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


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers get three digits."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in row) + " |")
    return "\n".join(lines)


def _portable(path: Path) -> str:
    """A path as it is in any checkout."""
    root = Path(__file__).parents[1]
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
