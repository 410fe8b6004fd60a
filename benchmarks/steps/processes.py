"""Steps in processes of their own: one has the memory at a time, and what it needs can be found out."""

import contextlib
import ctypes
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from mcl.allocator import keep_freed_memory

from benchmarks.steps import Step


class Work(Protocol):
    """What can be sent to another process and started there."""

    @property
    def plain(self) -> bool:
        """Whether memory is handed out as the C library does it by default, not as the trainer has it."""
        ...

    def start(self) -> Step: ...


class Apart:
    """Work in a process of its own, which ends with this one."""

    def __init__(self, work: Work) -> None:
        self._process = _fresh()
        self._process.submit(_begin, work).result()

    def step(self, side: int) -> None:
        """Does a step on images, or canvases, of so many pixels."""
        self._process.submit(_go_on, side).result()

    @contextlib.contextmanager
    def awake(self, side: int) -> Iterator[None]:
        """Steps of this size find their memory in place meanwhile; then what is free goes back, for other processes."""
        self.step(side)
        yield
        self._process.submit(_give_back).result()


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


def _give_back() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _peak() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss: Linux hands a parent's peak down to the process that it starts.
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024
