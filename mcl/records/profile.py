"""Profiles some steps: a trace of all operators and kernels, and a table of their total times."""

import contextlib
import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mcl import distributed
from mcl.records.metrics import log, rewrite

_SKIPPED = 3
"""Steps before the profiler starts. In these, pipelines fill, cuDNN chooses its algorithms and graphs are captured."""
_WARMUP = 2
"""Steps that the profiler discards, since it is slow at first."""
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a GPU's activities in a trace."""


@contextlib.contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Profiles some steps of the first process, after a few others.

    Args:
        folder: folder for ``trace.json.gz``, which chrome://tracing and Perfetto read, and ``table.txt``.
        steps: number of steps to profile; 0 for none.

    Yields:
        A function to call after every step.
    """
    if not steps or distributed.rank():
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=_SKIPPED, warmup=_WARMUP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=lambda p: _write(folder, p)) as profiler:
        yield profiler.step
    if profiler.step_num <= _SKIPPED + _WARMUP:
        log.warning("trainer.profile: no profile, since the run ended within its first %d steps", _SKIPPED + _WARMUP)


def _write(folder: Path, profiler: profile) -> None:
    """Writes the files; an error is logged and does not end the run."""
    try:
        folder.mkdir(exist_ok=True)
        trace = folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        idle = idle_share(trace)
        by = "self_cpu_time_total" if idle is None else "self_device_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=-1, max_name_column_width=100)
        said = "" if idle is None else f"The GPU was idle {idle:.1%} of the time.\n\n"
        rewrite(folder / "table.txt", f"{said}{table}\n")
        log.info("profile: %s", folder)
    except (OSError, RuntimeError, MemoryError) as error:
        log.warning("no profile: %s", error)


def idle_share(trace: Path) -> float | None:
    """Share of the time between the start of a trace's first kernel and the end of its last in which the GPU was idle.

    Args:
        trace: compressed JSON, as :meth:`torch.profiler.profile.export_chrome_trace` writes it.

    Returns:
        The share, or None if there was no activity on a GPU.
    """
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in _ON_GPU)
    if not spans:
        return None
    ends = list(itertools.accumulate((end for _, end in spans), max))  # streams overlap
    idle = sum(max(0.0, start - end) for (start, _), end in zip(spans[1:], ends, strict=False))
    return float(idle / (ends[-1] - spans[0][0]))
