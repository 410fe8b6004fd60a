"""Speed, waiting time and time left with a simulated clock; means and failures of given outputs."""

import math

import pytest
import torch

from mcl.objectives import Output
from mcl.records.meters import Meter, Stopwatch
from mcl.records.metrics import eta
from mcl.records.timers import HostClock, Timer


def test_stopwatch() -> None:
    """Four steps of ten images: the first takes 10 s, since it fills the pipelines; the others take 2 s, with 0.5 s of
    waiting."""
    now = 0.0
    stopwatch = Stopwatch(steps=10, phases=Timer(HostClock(lambda: now)), clock=lambda: now)
    for seconds in (10.0, 2.0):
        with stopwatch.waiting():
            now += 0.5
        with stopwatch.saving():
            now += 0.25
        now += seconds - 0.75
        stopwatch.lap(10)
    record = stopwatch.read()
    assert record["images_per_s"] == pytest.approx(20 / 12)
    assert record["data_wait"] == pytest.approx(1 / 12)
    assert record["saving"] == pytest.approx(0.5 / 12)
    assert record["eta_s"] == pytest.approx(8 * 2.0)  # the pace does not include the first step
    for _ in range(2):
        now += 2.0
        stopwatch.lap(10)
    shares = {"data_wait": 0, "saving": 0}
    assert stopwatch.read() == {"images_per_s": pytest.approx(5), **shares, "eta_s": pytest.approx(6 * 2.0)}


SCORES = ("positive", "negative")


def output(losses: list[list[float]]) -> Output:
    values = torch.tensor(losses, dtype=torch.float32)
    return Output(values.sum(), values, {"positive": values / 10, "negative": -values / 10})


def test_meter_means_over_steps_and_directions() -> None:
    meter = Meter(2, SCORES, torch.device("cpu"))
    meter.add(0, output([[1, 2], [3, 4]]), torch.tensor(5.0))
    meter.add(1, output([[2, 2], [2, 2]]), torch.tensor(7.0))
    record = meter.read()
    assert (record["loss"], record["grad_norm"]) == (9, 6)
    assert record["loss_level"] == [2, 2.5]
    assert record["positive"] == pytest.approx([0.2, 0.25])
    assert record["negative"] == pytest.approx([-0.2, -0.25])
    meter.add(2, output([[0, 0], [0, 0]]), torch.tensor(1.0))
    assert meter.read()["loss"] == 0
    assert meter.failure() is None


def test_meter_remembers_the_first_failure() -> None:
    meter = Meter(3, SCORES, torch.device("cpu"))
    meter.add(6, output([[1, 1, 1], [1, 1, 1]]), torch.tensor(1.0))
    meter.add(7, output([[1, math.nan, 1], [1, 1, math.inf]]), torch.tensor(1.0))
    meter.add(8, output([[math.nan] * 3] * 2), torch.tensor(1.0))
    assert meter.failure() == (7, [1, 2])


def test_an_infinite_gradient_fails_unless_the_loss_is_scaled() -> None:
    for scaled, failure in ((False, (4, [])), (True, None)):
        meter = Meter(1, SCORES, torch.device("cpu"), scaled)
        meter.add(4, output([[1], [1]]), torch.tensor(math.inf))
        assert meter.failure() == failure
    assert meter.read()["grad_norm"] == 0


def test_skipped_steps_are_counted_and_count_for_no_mean() -> None:
    meter = Meter(2, SCORES, torch.device("cpu"), skips=True)
    meter.add(0, output([[1, 2], [3, 4]]), torch.tensor(5.0))
    for step in (1, 2):
        meter.add(step, output([[math.nan, 1], [math.inf, 1]]), torch.tensor(math.nan))
    assert meter.skipped_in_a_row() == 2
    meter.add(3, output([[1, 2], [3, 4]]), torch.tensor(7.0))
    assert (meter.skipped_in_a_row(), meter.failure()) == (0, None)
    record = meter.read()
    assert (record["skipped"], record["loss"], record["grad_norm"], record["loss_level"]) == (2, 10, 6, [2, 3])
    meter.add(4, output([[math.inf, 1], [1, 1]]), torch.tensor(1.0))  # not skipped, although its loss is infinite
    assert meter.failure() == (4, [0])
    assert meter.read()["skipped"] == 0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03")])
def test_time_left_in_words(seconds: float, text: str) -> None:
    assert eta(seconds) == text
