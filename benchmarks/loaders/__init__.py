"""What :mod:`benchmarks.loader` compares: ``pipelines`` run in this process, ``workers`` in processes of a DataLoader.

Every batch of a contender shows the images of the next step of one plan, the same for all.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dali_pipelines.plan import Plan
from dali_pipelines.source import Source
from mcl.config import ConfigError


class Missing(ValueError):
    """A contender that is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Job:
    """What is loaded, and how it is augmented."""

    source: Source
    paths: tuple[str, ...]  # of the images that the plan shows
    plan: Plan

    def batch(self, step: int) -> list[int]:
        """The images of a step, without those that are known to be broken."""
        return [int(i) for i in self.plan.samples(step, self.source.bad)]


@dataclass(frozen=True)
class Turn:
    """What some batches took."""

    images: int
    seconds: float
    core_seconds: float  # of this process and all its threads, not of other processes


class Loader(ABC):
    """One contender with a number of threads (or worker processes); idle before and after every turn."""

    @abstractmethod
    def turn(self, batches: int) -> Turn:
        """Loads so many batches, a multiple of the number of threads."""

    def close(self) -> None:
        """Ends what outlives a turn."""
        return None


def cores(threads: int) -> list[int]:
    """The first ones that this process may use.

    Raises:
        ConfigError: it may not use so many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 0 < threads <= len(allowed):
        raise ConfigError(f"--threads: {threads} is not between 1 and the {len(allowed)} cores of this process")
    return allowed[:threads]


@contextmanager
def pinned(to: Sequence[int]) -> Iterator[None]:
    """Keeps this thread, and those that it starts meanwhile, on some cores, and PyTorch to one thread."""
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, to)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)
