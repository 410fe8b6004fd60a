"""What the cells of :mod:`benchmarks.transfer` say together: a table, and which differences exceed the noise.

A result of a method has ``kind`` method, ``name``, ``seeds``, of every measure ``values`` (by seed), ``mean`` and
``sd`` (None with one seed), and means of ``supervised_epochs`` and of the hours of processes, ``pretraining_hours`` and
``finetuning_hours``. One of a pair has ``kind`` difference, ``name``, ``ours``, ``theirs``, ``seeds``, and of every
measure ``mean``, ``low``, ``high`` and ``exceeds_noise`` (the last three None with one seed).
"""

import functools
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from benchmarks.common import Result, tables
from mcl.finetune.repeats import paired as difference

MEASURES = {"box AP50": ("box", "AP50"), "box AP": ("box", "AP"), "mask AP": ("mask", "AP")}
_WORDS = {
    True: "Exceed the noise (the interval excludes 0)",
    False: "Do not exceed the noise",
    None: "A single seed, which says nothing of noise",
}


def evaluate(cells: Sequence[Result], methods: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Result]:
    """Results of the methods and pairs that there are cells of.

    Args:
        methods, pairs: in the order of the results.
    """
    by_seed = {name: {c["seed"]: c for c in cells if c["method"] == name} for name in methods}
    by_seed = {name: dict(sorted(each.items())) for name, each in by_seed.items() if each}
    results = [_method(name, each) for name, each in by_seed.items()]
    for ours, theirs in pairs:
        seeds = sorted(by_seed.get(ours, {}).keys() & by_seed.get(theirs, {}).keys())
        if seeds:
            result = {"kind": "difference", "name": f"{ours} - {theirs}", "ours": ours, "theirs": theirs}
            a, b = ([by_seed[name][seed] for seed in seeds] for name in (ours, theirs))
            differences = {measure: difference(_values(a, measure), _values(b, measure)) for measure in MEASURES}
            results.append({**result, "seeds": seeds, **differences})
    return results


def _values(cells: Sequence[Result], measure: str) -> list[float]:
    of, name = MEASURES[measure]
    return [cell[of][name] for cell in cells]


def _method(name: str, by_seed: Mapping[int, Result]) -> Result:
    cells = list(by_seed.values())
    result: Result = {"kind": "method", "name": name, "seeds": list(by_seed)}
    for measure in MEASURES:
        values = _values(cells, measure)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        result[measure] = {"values": values, "mean": statistics.fmean(values), "sd": deviation}
    result["supervised_epochs"] = statistics.fmean(cell["supervised_epochs"] for cell in cells)
    for stage in ("pretraining", "finetuning"):
        spent = [cell["hours"][stage]["cpu"] if cell["hours"][stage] else 0.0 for cell in cells]
        result[f"{stage}_hours"] = statistics.fmean(spent)
    return result


def table(results: Sequence[Result]) -> str:
    """Methods, differences, and what can be said of them, as Markdown."""
    methods, differences = ([r for r in results if r["kind"] == kind] for kind in ("method", "difference"))
    costs = {
        "costs, supervised epochs": "{supervised_epochs:.1f}".format_map,
        "core-hours: pre-training": "{pretraining_hours:.2f}".format_map,
        "fine-tuning": "{finetuning_hours:.2f}".format_map,
    }
    seeds = {"seeds": lambda r: len(r["seeds"])}
    spreads, intervals = (
        {measure: functools.partial(write, measure) for measure in MEASURES} for write in (_spread, _interval)
    )
    written = tables(
        (methods, {"pre-training": itemgetter("name"), **seeds, **spreads, **costs}),
        (differences, {"difference, by seed": itemgetter("name"), **seeds, **intervals}),
    )
    return "\n\n".join(filter(None, [written, _words(differences)])) or "No cell has been run."


def _spread(measure: str, result: Result) -> str:
    values: Mapping[str, Any] = result[measure]
    deviation = "" if values["sd"] is None else f" ± {values['sd']:.1f}"
    return f"{values['mean']:.1f}{deviation}"


def _interval(measure: str, result: Result) -> str:
    values: Mapping[str, Any] = result[measure]
    interval = "" if values["low"] is None else f" ({values['low']:+.1f} to {values['high']:+.1f})"
    return f"{values['mean']:+.1f}{interval}"


def _words(differences: Sequence[Result]) -> str:
    """Which differences are more than noise."""
    lines = []
    if any(len(r["seeds"]) > 1 for r in differences):
        lines.append("± is the standard deviation over seeds; in brackets, 95% intervals of the mean (paired t).")
    for exceeds, words in _WORDS.items():
        found = []
        for r in differences:
            measures = [measure for measure in MEASURES if r[measure]["exceeds_noise"] is exceeds]
            some = f" ({', '.join(measures)})" if len(measures) < len(MEASURES) else ""
            found += [r["name"] + some] if measures else []
        if found:
            lines.append(textwrap.fill(f"{words}: {'; '.join(found)}.", 120, break_on_hyphens=False))
    return "\n".join(lines)
