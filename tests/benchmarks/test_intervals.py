"""Differences and their intervals, against SciPy's paired test and by hand."""

import pytest
import scipy.stats

from benchmarks import intervals


def test_two_methods_have_the_interval_of_a_paired_t_test() -> None:
    """2, 4, 3: mean 3, standard deviation 1, so 3 ± 4.3027 / sqrt(3)."""
    values = {"a": {0: 12.0, 1: 24.0, 2: 33.0}, "b": {2: 30.0, 0: 10.0, 1: 20.0}}
    (difference,) = intervals.differences(values, [("a", "b")], *intervals.noise(values))
    assert difference is not None
    assert (difference["mean"], difference["exceeds_noise"]) == (3, True)
    assert (difference["low"], difference["high"]) == pytest.approx((0.51586, 5.48414), abs=1e-5)
    paired = scipy.stats.ttest_rel([12.0, 24.0, 33.0], [10.0, 20.0, 30.0]).confidence_interval()
    assert (difference["low"], difference["high"]) == pytest.approx((paired.low, paired.high))


def test_all_methods_tell_the_noise_and_all_differences_hold_together() -> None:
    """Without effects of method and seed, 1, -1, 0, 0, -1, 1 are left over: 4 on 2 x 1 degrees of freedom."""
    values = {"a": {0: 11.0, 1: 19.0}, "b": {0: 30.0, 1: 40.0}, "c": {0: 49.0, 1: 61.0}, "d": {7: 0.0}}
    assert intervals.noise({method: values[method] for method in "abc"}) == pytest.approx((2, 2))
    first, second, none = intervals.differences(values, [("b", "a"), ("c", "a"), ("d", "a")], 2, 2)
    assert first is not None
    assert second is not None
    assert none is None
    # Standard error sqrt(2 * 2 / 2), and Student's t for 0.05 / 2 / 2: two differences, two sides.
    half = 2**0.5 * scipy.stats.t.ppf(0.9875, 2)
    assert (first["mean"], second["mean"]) == (20, 40)
    assert (second["low"], second["high"]) == pytest.approx((40 - half, 40 + half))


def test_noise_of_what_is_missing() -> None:
    """The model of the cells that are there: b of seed 1 is missing, so nothing but a and c say what noise is."""
    values = {"a": {0: 11.0, 1: 19.0}, "b": {0: 30.0}, "c": {0: 49.0, 1: 61.0}}
    assert intervals.noise(values) == pytest.approx(intervals.noise({"a": values["a"], "c": values["c"]}))
    assert intervals.noise({"a": {}, "b": {}}) == (0, 0)


def test_what_rounding_can_make_is_noise() -> None:
    """Differences of 0.1 each time, between values that are rounded to it."""
    ours, theirs = {0: 5.1, 1: 5.2, 2: 5.3}, {0: 5.0, 1: 5.1, 2: 5.2}
    values = {"a": ours, "b": theirs}
    (difference,) = intervals.differences(values, [("a", "b")], *intervals.noise(values))
    assert difference is not None
    assert (difference["low"], difference["high"]) == pytest.approx((0.0, 0.2))


def test_a_single_seed_has_no_interval() -> None:
    values = {"a": {0: 5.0, 1: 9.0}, "b": {0: 2.0}, "c": {0: 1.0, 1: 2.0}}
    difference = {"mean": 3.0, "error": None, "low": None, "high": None, "exceeds_noise": None}
    assert intervals.differences(values, [("a", "b")], 1, 1) == [difference]
