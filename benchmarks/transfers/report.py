"""What cells say together: a result per method, one per pair of methods that are compared, both as a table and words.

A result of a method has ``kind`` method, ``name``, ``seeds``, of every measure ``values`` (by seed), ``mean`` and
``sd`` (None with one seed), and means of ``supervised_epochs`` and of the hours of processes, ``pretraining_hours`` and
``finetuning_hours``. One of a pair has ``kind`` difference, ``name``, ``ours``, ``theirs``, ``seeds``, and of every
measure ``mean``, ``low``, ``high`` and ``exceeds_noise`` (the last three None with one seed).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import Result, markdown
from benchmarks.transfers.methods import METHODS, Cell
from benchmarks.transfers.statistics import deviation, paired

MEASURES = {"box AP50": ("box", "AP50"), "box AP": ("box", "AP"), "mask AP": ("mask", "AP")}
PAIRS = (
    *((name, "random") for name in METHODS if name != "random"),
    ("mcl-all", "moco"),
    ("mcl-backbone", "moco"),
    ("mcl-fpn", "mcl-backbone"),  # what the FPN adds, then the head, then both
    ("mcl-all", "mcl-fpn"),
    ("mcl-all", "mcl-backbone"),
)


def evaluate(cells: Mapping[Cell, Result]) -> list[Result]:
    """Results of the methods and pairs that there are cells of."""
    methods = {name: {c.seed: r for c, r in sorted(cells.items(), key=_seed) if c.method == name} for name in METHODS}
    results = [_method(name, by_seed) for name, by_seed in methods.items() if by_seed]
    pairs = [(_difference(a, b, methods[a], methods[b])) for a, b in PAIRS]
    return results + [pair for pair in pairs if pair is not None]


def _seed(item: tuple[Cell, Result]) -> int:
    return item[0].seed


def _values(by_seed: Mapping[int, Result], measure: str) -> dict[int, float]:
    of, name = MEASURES[measure]
    return {seed: result[of][name] for seed, result in by_seed.items()}


def _method(name: str, by_seed: Mapping[int, Result]) -> Result:
    result: Result = {"kind": "method", "name": name, "seeds": list(by_seed)}
    for measure in MEASURES:
        values = list(_values(by_seed, measure).values())
        result[measure] = {"values": values, "mean": statistics.fmean(values), "sd": deviation(values)}
    cells = by_seed.values()
    result["supervised_epochs"] = statistics.fmean(cell["supervised_epochs"] for cell in cells)
    for stage in ("pretraining", "finetuning"):
        spent = [cell["hours"][stage]["cpu"] if cell["hours"][stage] else 0.0 for cell in cells]
        result[f"{stage}_hours"] = statistics.fmean(spent)
    return result


def _difference(a: str, b: str, ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> Result | None:
    result: Result = {"kind": "difference", "name": f"{a} - {b}", "ours": a, "theirs": b}
    for measure in MEASURES:
        difference = paired(_values(ours, measure), _values(theirs, measure))
        if difference is None:
            return None
        low, high = difference.interval or (None, None)
        result["seeds"] = list(difference.seeds)
        result[measure] = {
            "mean": difference.mean,
            "low": low,
            "high": high,
            "exceeds_noise": difference.exceeds_noise,
        }
    return result


def table(results: Sequence[Result]) -> str:
    """Methods, differences, and what can be said of them, as Markdown."""
    methods = [r for r in results if r["kind"] == "method"]
    if not methods:
        return "No cell has been run."
    parts = [
        markdown(
            ["pre-training", "seeds", *MEASURES, "costs, supervised epochs", "core-hours: pre-training", "fine-tuning"],
            [
                (
                    r["name"],
                    len(r["seeds"]),
                    *(_spread(r[measure]) for measure in MEASURES),
                    f"{r['supervised_epochs']:.1f}",
                    *(f"{r[f'{stage}_hours']:.2f}" for stage in ("pretraining", "finetuning")),
                )
                for r in methods
            ],
        )
    ]
    differences = [r for r in results if r["kind"] == "difference"]
    if differences:
        rows = [(r["name"], len(r["seeds"]), *(_interval(r[measure]) for measure in MEASURES)) for r in differences]
        parts += [markdown(["difference, by seed", "seeds", *MEASURES], rows), _words(differences)]
    return "\n\n".join(parts)


def _spread(values: Mapping[str, Any]) -> str:
    deviation = "" if values["sd"] is None else f" ± {values['sd']:.1f}"
    return f"{values['mean']:.1f}{deviation}"


def _interval(values: Mapping[str, Any]) -> str:
    interval = "" if values["low"] is None else f" ({values['low']:+.1f} to {values['high']:+.1f})"
    return f"{values['mean']:+.1f}{interval}"


def _words(differences: Sequence[Result]) -> str:
    """Which differences are more than noise."""
    said = [(r["name"], measure, r[measure]["exceeds_noise"]) for r in differences for measure in MEASURES]
    lines = []
    if any(exceeds is not None for _, _, exceeds in said):
        lines.append("± is the standard deviation over seeds; in brackets, 95% intervals of the mean (paired t).")
    for exceeds, words in (
        (True, "Exceed the noise (the interval excludes 0): {}."),
        (False, "Do not exceed the noise: {}."),
        (None, "A single seed, which says nothing of noise: {}."),
    ):
        found: dict[str, list[str]] = {}
        for name, measure, value in said:
            if value is exceeds:
                found.setdefault(name, []).append(measure)
        if found:
            each = [f"{name} ({', '.join(m)})" if len(m) < len(MEASURES) else name for name, m in found.items()]
            lines.append(words.format("; ".join(each)))
    return "\n".join(lines)


def report(cells: Mapping[Cell, Result], results: Sequence[Result]) -> Result:
    """As other benchmarks write it: the environment is that of the newest cell, ``others`` names cells that had another
    machine or other versions."""
    environments = {cell.name: result["environment"] for cell, result in cells.items()}
    newest = max(environments.values(), key=lambda environment: str(environment["date"]))
    config = {"protocol": next(iter(cells.values()))["protocol"], "cells": sorted(environments)}
    others = sorted(name for name, environment in environments.items() if _machine(environment) != _machine(newest))
    return {"environment": newest, "config": {**config, "others": others}, "results": list(results)}


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in environment.items() if key not in ("commit", "date")}
