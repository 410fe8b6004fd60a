"""Steps in processes of their own: to find out what they need, and to let them be as PyTorch comes."""

import contextlib
import ctypes
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.steps import Step
from mcl.allocator import keep_freed_memory


class Work(Protocol):
    """What can be sent to another process and started there."""

    @property
    def plain(self) -> bool:
        """Whether memory is handed out as the C library does it by default, not as the trainer has it."""
        ...

    def start(self) -> Step: ...


def apart(work: Work) -> Step:
    """Starts work in a process of its own, which ends with this one."""
    process = _fresh()
    process.submit(_begin, work).result()
    return lambda side: process.submit(_go_on, side).result()


@contextlib.contextmanager
def room() -> Iterator[None]:
    """Meanwhile the kernel has what this process keeps of freed memory, for another one; then it is kept again."""
    before = _status("VmRSS")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    given = before - _status("VmRSS")
    yield
    torch.empty(max(0, given), dtype=torch.uint8).fill_(1)


def peak(work: Work, side: int) -> int:
    """Bytes at the peak of a fresh process that starts and does one step: resident, or allocated by PyTorch on the GPU.

    Args:
        side: of its images or canvases, pixels.
    """
    with _fresh() as process:
        process.submit(_begin, work).result()
        process.submit(_go_on, side).result()
        return process.submit(_peak).result()


def _fresh() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


_step: Step | None = None  # of this process


def _begin(work: Work) -> None:
    global _step
    if not work.plain:
        keep_freed_memory()
    _step = work.start()


def _go_on(side: int) -> None:
    assert _step is not None
    _step(side)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: Linux hands a parent's peak down to the process that it starts.
    return _status("VmHWM")


def _status(line: str) -> int:
    """Bytes, of this process."""
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
