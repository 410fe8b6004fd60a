"""Phases with a simulated clock, their shares in a run, and events of a GPU, for which nobody waits too early."""

import contextlib

import pytest
import torch

from mcl.records.meters import Stopwatch
from mcl.records.timers import HostClock, Timer


class Clock:
    """A host's clock that tests advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_phases_add_up_by_name_and_start_anew_when_read(clock: Clock) -> None:
    timer = Timer(HostClock(clock))
    for seconds in (1.0, 2.0):
        with timer.phase("forward"):
            clock.now += seconds
        clock.now += 100  # between phases
        with timer.phase("backward"):
            clock.now += 2 * seconds
    assert timer.read() == {"forward": 3, "backward": 6}
    assert timer.read() == {}


def test_phases_may_lie_within_each_other(clock: Clock) -> None:
    timer = Timer(HostClock(clock))
    with timer.phase("step"):
        clock.now += 1
        with timer.phase("forward"):
            clock.now += 2
    assert timer.read() == {"step": 3, "forward": 2}


def test_a_phase_that_fails_is_not_counted(clock: Clock) -> None:
    timer = Timer(HostClock(clock))
    with contextlib.suppress(ZeroDivisionError), timer.phase("forward"):
        clock.now += 1
        raise ZeroDivisionError
    assert timer.read() == {}


def test_the_stopwatch_reports_phases_as_shares_of_the_time_since_it_was_read(clock: Clock) -> None:
    timer = Timer(HostClock(clock))
    stopwatch = Stopwatch(steps=8, phases=timer, clock=clock)
    for forward, expected in ((3.0, 0.3), (1.0, 0.125)):
        with stopwatch.waiting():
            clock.now += 2
        with timer.phase("forward"):
            clock.now += forward
        with timer.phase("optimizer"):
            clock.now += 4
        clock.now += 1
        stopwatch.lap(16)
        record = stopwatch.read()
        assert record["forward"] == pytest.approx(expected)
        assert record["data_wait"] == pytest.approx(2 / (7 + forward))
        assert record["optimizer"] == pytest.approx(4 / (7 + forward))


class Gpu:
    """A GPU that executes work later than the host queues it: `time`, in milliseconds, is when it reaches an event."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits = 0

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    """Replaces torch.cuda.Event."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._at: float | None = None
        self._waited = False

    def record(self) -> None:
        assert self._at is None
        self._at = self._gpu.time

    def synchronize(self) -> None:
        assert self._at is not None
        self._waited = True
        self._gpu.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        assert end._waited, "the GPU may not have come by yet"
        assert self._at is not None
        assert end._at is not None
        return end._at - self._at


def test_the_gpus_clock_is_waited_for_by_reading_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    timer = Timer.on(torch.device("cuda"))
    for milliseconds in (250, 500):
        with timer.phase("forward"):
            gpu.time += milliseconds
        gpu.time += 1000
    assert gpu.waits == 0
    assert timer.read() == {"forward": 0.75}
    assert gpu.waits == 2


def test_a_gpu_that_is_busy_while_the_host_waits_does_not_wait_for_data(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """The host may wait for the GPU in the loader, which limits how far it is ahead."""
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    stopwatch = Stopwatch(steps=2, phases=Timer.on(torch.device("cuda")), clock=clock)
    with stopwatch.waiting():
        clock.now += 3
    clock.now += 1
    stopwatch.lap(16)
    assert stopwatch.read()["data_wait"] == 0
    with stopwatch.waiting():
        gpu.time += 2000  # milliseconds; canvases are late, although the host does not wait for them
    clock.now += 4
    stopwatch.lap(16)
    assert stopwatch.read()["data_wait"] == 0.5
