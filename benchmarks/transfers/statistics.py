"""Means, and differences between methods that ran with the same seeds."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t distribution with 1 to 9 degrees of freedom; beyond, the last one, which is wider."""


RESOLUTION = 0.1
"""Percent, to which an AP is rounded: no interval is narrower than this to either side."""


@dataclass(frozen=True)
class Difference:
    """Of one method to another, by seed."""

    seeds: tuple[int, ...]
    mean: float
    interval: tuple[float, float] | None  # 95%, by a paired t-test; None with a single seed

    @property
    def exceeds_noise(self) -> bool | None:
        """Whether the interval excludes 0; None where there is none."""
        if self.interval is None:
            return None
        low, high = self.interval
        return low > 0 or high < 0


def deviation(values: list[float]) -> float | None:
    """Standard deviation of a sample; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs, over the seeds that both have; None where there are none.

    Args:
        ours, theirs: a value by seed.
    """
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean, spread, n = statistics.fmean(differences), deviation(differences), len(seeds)
    if spread is None:
        return Difference(seeds, mean, None)
    half = max(T[min(n - 1, len(T)) - 1] * spread / math.sqrt(n), RESOLUTION)
    return Difference(seeds, mean, (mean - half, mean + half))
