"""Profile of some steps: a trace of every operator and kernel, and a table of their total times."""

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
"""Steps before the profiler starts, in which pipelines fill, cuDNN chooses its algorithms and graphs are recorded."""
_WARMUP = 2
"""Steps in which it runs and keeps nothing, since it is slow at first."""
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what a GPU does in a trace."""


@contextlib.contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Profiles some steps of the first process, after a few others; what is around them goes on undisturbed.

    Args:
        folder: where ``trace.json.gz``, for chrome://tracing and Perfetto, and ``table.txt`` are written.
        steps: how many; none for 0.

    Yields:
        What to call after every step.
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
    """Share of the time, from the first kernel of a trace to the end of the last, in which the GPU did nothing.

    Args:
        trace: compressed JSON, as :meth:`torch.profiler.profile.export_chrome_trace` writes it.

    Returns:
        None where no GPU did anything.
    """
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in _ON_GPU)
    if not spans:
        return None
    ends = list(itertools.accumulate((end for _, end in spans), max))  # streams overlap
    idle = sum(max(0.0, start - end) for (start, _), end in zip(spans[1:], ends, strict=False))
    return float(idle / (ends[-1] - spans[0][0]))
