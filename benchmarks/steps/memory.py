"""What a training step needs, seen from outside: the peak of a process that does nothing else."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.steps import Step
from mcl.allocator import keep_freed_memory


class Work(Protocol):
    """What can be sent to another process and started there."""

    def start(self) -> Step: ...


def peak(work: Work, side: int) -> int:
    """Bytes at the peak of a fresh process that starts and does one step: resident, or allocated by PyTorch on the GPU.

    Args:
        side: of its images or canvases, pixels.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, work, side).result()


def _peak(work: Work, side: int) -> int:
    keep_freed_memory()
    work.start()(side)
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: Linux hands a parent's peak down to the process that it starts.
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
