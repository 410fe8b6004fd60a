"""Times the phases of a step, with the host's or the GPU's clock."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch


class HostClock:
    """The host's clock, for CPUs, where work is done when its call returns."""

    def __init__(self, time: Callable[[], float] = time.perf_counter) -> None:
        self.now = time

    def seconds(self, start: float, end: float) -> float:
        return end - start


class DeviceClock:
    """Events in the current CUDA stream, which measure when the GPU executes work, not when the host queues it."""

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds between two events; waits until the GPU has reached `end`."""
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


class Timer:
    """Adds up the times of named phases; only reading waits for the device.

    Args:
        clock: the host's clock or the device's.
    """

    def __init__(self, clock: HostClock | DeviceClock) -> None:
        self._clock = clock
        self._spans: list[tuple[str, Any, Any]] = []

    @classmethod
    def on(cls, device: torch.device) -> "Timer":
        """A timer with the right clock for a device."""
        return cls(DeviceClock() if device.type == "cuda" else HostClock())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the work that is done, or queued, in the context."""
        start = self._clock.now()
        yield
        self._spans.append((name, start, self._clock.now()))

    def read(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            total[name] += self._clock.seconds(start, end)
        self._spans.clear()
        return dict(total)
