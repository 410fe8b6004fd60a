"""Differences between methods that were run with the same seeds, and intervals that hold for all of them together."""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import scipy.stats

from benchmarks.common import Result
from mcl.finetune.repeats import RESOLUTION

Key = TypeVar("Key", bound=Hashable)


def differences(
    values: Mapping[Key, Mapping[int, float]], pairs: Sequence[tuple[Key, Key]], variance: float, freedom: int
) -> list[Result | None]:
    """Differences, with 95% intervals that hold together: Student's t, corrected by Bonferroni.

    The noise is taken to have the same variance everywhere.

    Args:
        values: by method and seed.
        pairs: methods; of every pair, the second is subtracted from the first, over the seeds that both have.
        variance, freedom: of the noise (see :func:`noise`).

    Returns:
        For every pair ``mean``, its standard ``error``, ``low`` and ``high`` of the interval, and ``exceeds_noise``,
        whether it excludes 0; with one seed in common all but the mean are None. None: no seed in common.
    """
    common = [sorted(values[ours].keys() & values[theirs].keys()) for ours, theirs in pairs]
    several = sum(len(seeds) > 1 for seeds in common)
    found: list[Result | None] = []
    for (ours, theirs), seeds in zip(pairs, common, strict=True):
        if not seeds:
            found.append(None)
            continue
        mean = statistics.fmean(values[ours][seed] - values[theirs][seed] for seed in seeds)
        one: Result = {"mean": mean, "error": None, "low": None, "high": None, "exceeds_noise": None}
        if len(seeds) > 1 and freedom:
            one["error"] = (2 * variance / len(seeds)) ** 0.5
            half = max(float(scipy.stats.t.ppf(1 - 0.025 / several, freedom)) * one["error"], RESOLUTION)
            one |= {"low": mean - half, "high": mean + half, "exceeds_noise": abs(mean) > half}
        found.append(one)
    return found


def noise(values: Mapping[Key, Mapping[int, float]]) -> tuple[float, int]:
    """Variance and degrees of freedom of what is left if a value is an effect of the method plus one of the seed."""
    cells = [(method, seed) for method, own in values.items() for seed in own]
    if not cells:
        return 0.0, 0
    columns = [*dict.fromkeys(method for method, _ in cells), *sorted({seed for _, seed in cells})]
    design = np.array([[column in (cell[0], cell[1]) for column in columns] for cell in cells], float)
    observed = np.array([values[method][seed] for method, seed in cells])
    effects, _, rank, _ = np.linalg.lstsq(design, observed)
    freedom = len(cells) - int(rank)
    # Rounded, because the last digits depend on the processor.
    return round(float(np.sum((observed - design @ effects) ** 2)) / max(1, freedom), 9), freedom
