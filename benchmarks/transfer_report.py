"""What the cells of :mod:`benchmarks.transfer` say together: tables, and which differences exceed the noise.

A result of a method at a cost has ``kind`` method, ``name``, ``seeds``, ``epochs``, ``supervised_epochs``, mean
core-hours by stage, and of every measure that was run ``values`` (by seed), ``mean`` and ``sd`` (None with one seed).
One of a pair has ``kind`` difference, ``name``, ``ours``, ``theirs``, ``seeds``, ``supervised_epochs`` of ours, and of
every measure what :func:`benchmarks.intervals.differences` says. One of ``kind`` rank correlation has ``name``, a
measure, its Spearman correlation ``rho`` with the box AP over the ``cells`` that have both, and the same without random
weights and second detectors of a pre-training, ``rho_trained`` and ``trained``. None is what was not run.
"""

import itertools
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import scipy.stats

from benchmarks import intervals
from benchmarks.common import Result, tables
from benchmarks.transfer_protocol import METHODS

MEASURES: dict[str, tuple[str, ...]] = {
    "cutouts kNN": ("cutouts", "accuracy"),
    "cutouts linear": ("cutouts", "linear_accuracy"),
    "voc15 kNN": ("voc15", "accuracy"),
    "voc15 linear": ("voc15", "linear_accuracy"),
    "box AP50": ("finetuning", "box", "AP50"),
    "box AP": ("finetuning", "box", "AP"),
    "mask AP": ("finetuning", "mask", "AP"),
}
"""In percent, by where they stand among a cell's measures."""

PLOTTED = ("cutouts linear", "voc15 linear", "box AP")
_Key = tuple[str, float]
"""Method and cost."""
_HOURS = ("pretraining", "cutouts", "voc15", "finetuning")
_MISSING = "not run"
_WORDS = """± is the standard deviation over seeds. In brackets: 95% intervals, which hold for all differences of a
column together. Bold: the interval excludes 0."""


@dataclass(frozen=True)
class Study:
    """Methods at costs, of which `pairs` are compared at every cost; each method is also compared over costs."""

    methods: tuple[str, ...]
    costs: tuple[float, ...]
    pairs: tuple[tuple[str, str], ...]


def value(cell: Result, measure: str) -> float | None:
    """Percent; None if it was not run."""
    stage, *path = MEASURES[measure]
    found = cell["measures"].get(stage)
    for key in path if found is not None else ():
        found = found[key]
    return found if found is None or stage == "finetuning" else 100 * found


def evaluate(cells: Sequence[Result], study: Study, own: Collection[str]) -> list[Result]:
    """Results of all methods and costs of a study, run or not, of its pairs that were, and of the measures' ranks.

    Args:
        cells: of all studies; noise and ranks are those of all of them.
        own: methods of this study alone; other costs are shown where one of these was run.
    """
    costs = sorted({*study.costs} | {cell["cost"] for cell in cells if cell["method"] in own})
    by_seed: dict[_Key, dict[int, Result]] = {}
    for name in study.methods:
        for cost in [0] if name == "random" else costs:
            own = [cell for cell in cells if (cell["method"], cell["cost"]) == (name, cost)]
            by_seed[name, cost] = {cell["seed"]: cell for cell in sorted(own, key=itemgetter("seed"))}
    compared: list[tuple[_Key, _Key]]
    compared = [((a, cost), (b, cost if b != "random" else 0)) for cost in costs for a, b in study.pairs]
    costly = [name for name in study.methods if name != "random"]
    compared += [((name, high), (name, low)) for low, high in itertools.pairwise(costs) for name in costly]
    compared = [(ours, theirs) for ours, theirs in compared if by_seed[ours].keys() & by_seed[theirs].keys()]
    found = [_difference(*pair, by_seed) for pair in compared]
    for measure in MEASURES:
        values: dict[_Key, dict[int, float]] = {key: {} for key in by_seed}
        for cell in cells:
            if (own_value := value(cell, measure)) is not None:
                values.setdefault((cell["method"], cell["cost"]), {})[cell["seed"]] = own_value
        noise = intervals.noise({key: v for key, v in values.items() if _has_its_own(key[0]) or key[0] == "random"})
        for result, difference in zip(found, intervals.differences(values, compared, *noise), strict=True):
            result[measure] = difference
    return [
        *(_method(_name(*key), list(each.values())) for key, each in by_seed.items()),
        *found,
        *filter(None, (_correlation(cells, measure) for measure in MEASURES if MEASURES[measure][0] != "finetuning")),
    ]


def _name(method: str, cost: float) -> str:
    return f"{method}, {cost:g}x" if cost else method


def _method(name: str, cells: Sequence[Result]) -> Result:
    result: Result = {"kind": "method", "name": name, "seeds": [cell["seed"] for cell in cells]}
    for key in ("epochs", "supervised_epochs"):
        result[key] = statistics.fmean(cell[key] for cell in cells) if cells else None
    for stage in _HOURS:
        spent = [cell["hours"][stage]["cpu"] for cell in cells if stage in cell["hours"]]
        result[f"{stage}_hours"] = statistics.fmean(spent) if spent else None
    for measure in MEASURES:
        values = [v for cell in cells if (v := value(cell, measure)) is not None]
        sd = statistics.stdev(values) if len(values) > 1 else None
        result[measure] = {"values": values, "mean": statistics.fmean(values), "sd": sd} if values else None
    return result


def _difference(ours: _Key, theirs: _Key, by_seed: Mapping[_Key, Mapping[int, Result]]) -> Result:
    """All but its measures."""
    names, seeds = [_name(*ours), _name(*theirs)], sorted(by_seed[ours].keys() & by_seed[theirs].keys())
    result: Result = {"kind": "difference", "name": " - ".join(names), "ours": names[0], "theirs": names[1]}
    spent = statistics.fmean(by_seed[ours][seed]["supervised_epochs"] for seed in seeds)
    return {**result, "seeds": seeds, "supervised_epochs": spent}


def _correlation(cells: Sequence[Result], measure: str) -> Result | None:
    pairs = [(value(cell, measure), value(cell, "box AP"), cell["method"]) for cell in cells]
    pairs = [pair for pair in pairs if None not in pair]
    trained = [pair for pair in pairs if _has_its_own(pair[2])]
    if len(trained) < 3:
        return None
    rho, rho_trained = (
        float(scipy.stats.spearmanr([pair[0] for pair in some], [pair[1] for pair in some]).statistic)
        for some in (pairs, trained)
    )
    counts = {"cells": len(pairs), "trained": len(trained)}
    return {"kind": "rank correlation", "name": measure, "rho": rho, "rho_trained": rho_trained, **counts}


def _has_its_own(method: str) -> bool:
    """Whether there is a pre-training for it, which is of no other method."""
    return METHODS[method].trains and not METHODS[method].of


def table(results: Sequence[Result]) -> str:
    """Methods, what they cost, differences and rank correlations, as Markdown."""
    kinds = ("method", "difference", "rank correlation")
    methods, differences, correlations = ([r for r in results if r["kind"] == kind] for kind in kinds)
    seeds = {"seeds": lambda r: len(r["seeds"])}
    costs: dict[str, Callable[[Result], object]] = {
        "epochs": partial(_number, "epochs", ".0f"),
        "costs, supervised epochs": partial(_number, "supervised_epochs", ".1f"),
        "core-hours: pre-training": partial(_number, "pretraining_hours", ".3f"),
        "probe, cutouts": partial(_number, "cutouts_hours", ".3f"),
        "probe, voc15": partial(_number, "voc15_hours", ".3f"),
        "fine-tuning": partial(_number, "finetuning_hours", ".3f"),
    }
    spreads, differing = ({measure: partial(write, measure) for measure in MEASURES} for write in (_spread, _interval))
    written = tables(
        (methods, {"pre-training": itemgetter("name"), **seeds, **spreads}),
        ([r for r in methods if r["seeds"]], {"pre-training": itemgetter("name"), **costs}),
        (differences, {"difference, by seed": itemgetter("name"), **seeds, **differing}),
        (
            correlations,
            {
                "rank correlation with box AP": itemgetter("name"),
                "cells": itemgetter("cells"),
                "Spearman": "{rho:.2f}".format_map,
                "pre-trainings": itemgetter("trained"),
                "Spearman, pre-trainings": "{rho_trained:.2f}".format_map,
            },
        ),
    )
    return f"{written}\n\n{_WORDS}"


def _number(key: str, form: str, result: Result) -> str:
    return "-" if result[key] is None else f"{result[key]:{form}}"


def _spread(measure: str, result: Result) -> str:
    values = result[measure]
    if values is None:
        return _MISSING
    seeds = len(values["values"])
    fewer = f" ({seeds} seed{'s' * (seeds > 1)})" * (seeds < len(result["seeds"]))
    return f"{values['mean']:.1f}" + ("" if values["sd"] is None else f" ± {values['sd']:.1f}") + fewer


def _interval(measure: str, result: Result) -> str:
    values = result[measure]
    if values is None:
        return _MISSING
    if values["low"] is None:
        return f"{values['mean']:+.1f}"
    text = f"{values['mean']:+.1f} ({values['low']:+.1f} to {values['high']:+.1f})"
    return f"**{text}**" if values["exceeds_noise"] else text


def gains(results: Sequence[Result]) -> dict[str, dict[str, list[tuple[float, Any]]]]:
    """What is plotted: by measure and method, for every cost the cost and the difference to random weights."""
    panels: dict[str, dict[str, list[tuple[float, Any]]]] = {}
    for r in results:
        for measure in PLOTTED if r["kind"] == "difference" and r["theirs"] == "random" else ():
            if r[measure] is not None:
                lines = panels.setdefault(measure, {})
                lines.setdefault(r["ours"].partition(",")[0], []).append((r["supervised_epochs"], r[measure]))
    return panels
