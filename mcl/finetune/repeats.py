"""Fine-tuning with several seeds: mean AP, and its difference from that of another fine-tuning."""

import copy
import gc
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from mcl import distributed
from mcl.config import ConfigError
from mcl.records.metrics import rewrite

RESULTS = "repeats.json"
TABLE = "repeats.md"

RESOLUTION = 0.1
"""Percent to which AP is rounded. An interval extends at least this far to either side of the mean."""

_FREE = ("weights", "parts", "randomness")
"""Sections of a configuration that may differ between compared runs."""

Result = dict[str, Any]


def finetune(config: Any, count: int, compare: Path | None = None) -> str:
    """Fine-tunes with several seeds, starting at ``randomness.seed``, each in its own folder: ``seed-0``, ...

    Writes ``repeats.json`` and ``repeats.md`` after each run. Finished runs are not repeated.

    Args:
        config: MMEngine's configuration.
        count: number of seeds.
        compare: folder of repeats to compare with.

    Returns:
        The table; empty in all processes but the first.

    Raises:
        ConfigError: the other folder has no repeats with these seeds; see also :func:`mcl.finetune.finetune`.
    """
    from mcl.finetune import hooks, metric, resume, training

    if count < 1 or config.get("test"):
        raise ConfigError("--repeats: must be at least 1, and without test=true")
    folder = Path(config.output) / config.name
    seeds = range(config.randomness.seed, config.randomness.seed + count)
    other = _read(compare, seeds) if compare else None
    records, text = {}, ""
    for number, seed in enumerate(seeds):
        own = copy.deepcopy(config)
        own.update(output=str(folder), name=f"seed-{seed}", work_dir=str(folder / f"seed-{seed}"))
        own.experiment_name, own.randomness.seed = own.name, seed
        training.finetune(own, hooks.Repeat(number, count))
        gc.collect()  # frees GPU memory: a runner and its hooks refer to each other
        if distributed.rank() == 0:
            run = Path(own.work_dir)
            records[seed] = metric.read(run)[-1]
            _, sections = resume.newest(resume.checkpoints(run))
            digests = {key: hashlib.sha256(text.encode()).hexdigest()[:12] for key, text in sections.items()}
            result = {"name": config.name, **summary(records), "sections": digests}
            if other and (compared := difference(result, other)):
                result["compared"] = {"with": str(compare), **compared}
            text = table(result, other)
            rewrite(folder / RESULTS, json.dumps(result, indent=1) + "\n")
            rewrite(folder / TABLE, text)
    return text


def _read(folder: Path, seeds: Sequence[int]) -> Result:
    try:
        other: Result = json.loads((folder / RESULTS).read_text())
        other["seeds"], other["ap"], other["sections"]
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: not a JSON object
        raise ConfigError(f"--compare: {folder} has no {RESULTS}; name the folder of mcl finetune --repeats") from None
    if not set(seeds).intersection(other["seeds"]):
        raise ConfigError(
            f"--compare: {folder} has the seeds {_list(other['seeds'])}, none of {_list(seeds)}; set randomness.seed"
        )
    return other


def summary(records: Mapping[int, Mapping[str, Any]]) -> Result:
    """Summarises evaluations by seed.

    Returns:
        ``seeds``, ``step``, and ``ap``, by kind (box, mask) and measure: ``values`` by seed (None if there are no such
        objects), their ``mean``, and their standard deviation ``sd`` (None for a single value).
    """
    first = next(iter(records.values()))
    aps = {
        kind: {name: _moments([record[kind][name] for record in records.values()]) for name in measures}
        for kind, measures in first.items()
        if isinstance(measures, Mapping)
    }
    return {"seeds": list(records), "step": first["step"], "ap": aps}


def _moments(values: Sequence[float | None]) -> Result:
    there = [value for value in values if value is not None]
    mean = statistics.fmean(there) if there else None
    return {"values": list(values), "mean": mean, "sd": statistics.stdev(there) if len(there) > 1 else None}


def difference(ours: Result, theirs: Result) -> Result:
    """Ours minus theirs, over common seeds.

    Returns:
        ``seeds`` that both have, ``ap`` by kind and measure (see :func:`paired`), and the ``differing`` sections of
        their configurations. Empty if they have no seed in common.
    """
    seeds = [seed for seed in ours["seeds"] if seed in theirs["seeds"]]
    if not seeds:
        return {}
    aps: Result = {}
    for kind, measures in ours["ap"].items():
        for name, own in measures.items():
            other = theirs["ap"].get(kind, {}).get(name)
            pairs = [(_of(own, ours, seed), _of(other, theirs, seed)) for seed in seeds] if other else []
            pairs = [pair for pair in pairs if None not in pair]
            aps.setdefault(kind, {})[name] = paired(*zip(*pairs, strict=True)) if pairs else None
    keys = ours["sections"].keys() | theirs["sections"].keys()
    differing = [key for key in keys - set(_FREE) if ours["sections"].get(key) != theirs["sections"].get(key)]
    return {"seeds": seeds, "ap": aps, "differing": sorted(differing)}


def _of(measure: Result, result: Result, seed: int) -> Any:
    return measure["values"][result["seeds"].index(seed)]


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Result:
    """Compares ours minus theirs, seed by seed, by a paired t-test.

    Returns:
        ``mean`` of the difference, its standard ``error``, its 95% interval from ``low`` to ``high``, and
        ``exceeds_noise``, whether the interval excludes 0. With one seed, all but the mean are None.
    """
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return {"mean": mean, "error": None, "low": None, "high": None, "exceeds_noise": None}
    error = statistics.stdev(values) / n**0.5
    half = max(float(scipy.stats.t.ppf(0.975, n - 1)) * error, RESOLUTION)
    return {"mean": mean, "error": error, "low": mean - half, "high": mean + half, "exceeds_noise": abs(mean) > half}


def table(result: Result, other: Result | None = None) -> str:
    """Markdown table of repeats; with `other`, also of these and the difference."""
    compared = result.get("compared")
    head = [f"AP after {result['step']} steps", f"{result['name']}, seeds {_list(result['seeds'])}"]
    if other and compared:
        head += [f"{compared['with']}, seeds {_list(other['seeds'])}", "difference", "its 95% interval"]
    lines = [head, ["---"] * len(head)]
    for kind, measures in result["ap"].items():
        for name, own in measures.items():
            row = [f"{kind} {name}", _spread(own)]
            if other and compared:
                of = compared["ap"][kind][name] or {"mean": None}
                interval = f"{of['low']:+.1f} to {of['high']:+.1f}" if of.get("error") is not None else "-"
                row += [_spread(other["ap"].get(kind, {}).get(name)), _spread(of, "+"), interval]
            lines.append(row)
    words = ["± is the standard deviation over seeds."]
    if compared:
        words.append(
            f"For the difference, by seed ({_list(compared['seeds'])}), it is the standard error of the mean; the "
            "interval is that of a paired t-test."
        )
        if compared["differing"]:
            words.append(f"Besides weights, their configurations differ in {_list(compared['differing'])}.")
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *words]) + "\n"


def _spread(measure: Result | None, sign: str = "") -> str:
    if measure is None or measure["mean"] is None:
        return "-"
    deviation = measure.get("sd", measure.get("error"))
    return f"{measure['mean']:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
