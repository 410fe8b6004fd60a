"""The loader beside what one would use without it: ``python -m benchmarks.loader --data data/photos4k``.

Unique source images per second, each shown in eight augmented views (two recipes, four levels, canvases of 224 px):

* ``decode``: DALI reads and decodes the files on the CPU, nothing else: the ceiling;
* ``fused``, ``stock``: mcl's loader with either engine, to normalised montages;
* ``released``: the authors' recipe, eight views of 224 px made by Pillow, in worker processes of a DataLoader;
* ``torchvision``: the same eight views by torchvision.transforms.v2 on tensors, likewise;
* ``lightly``: the same eight views by lightly's BYOL transforms, likewise.

What makes it fair:

* All take turns, one at a time, in rounds; what is reported are medians over rounds.
* Between turns nothing runs. A worker process is given the batches of a turn when the clock starts, and has none left
  when it stops. DALI, which works ahead, is built anew for every turn; the clock starts when its queue has been filled.
* All go through the steps of one plan, from files that the machine has in memory.
* T threads are T cores: the process and its workers are kept on them, helper threads included. DALI gets T threads, a
  DataLoader T workers of one thread each.
* The three other recipes end before normalising and tiling, which they leave to the device; ours include both. Ours cut
  views straight to the size of their tiles (``data.tile_sampling=direct``), 1.33 canvases of pixels per image and view
  instead of 4; that is part of what is compared.
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import charts
from benchmarks.common import Progress, Result, finish, parser, rounds, summary
from benchmarks.common import table as markdown_table
from benchmarks.loader_contenders import CONTENDERS, OURS, Job, Loader, Missing, Turn, cores, pinned
from dali_pipelines.loader import default_threads
from dali_pipelines.plan import Plan
from dali_pipelines.source import open_source
from mcl.config import AugmentConfig, ConfigError
from mcl.montage import Geometry, nearest_legal

_COLUMNS = {
    "what": itemgetter("name"),
    "images/s": itemgetter("images_per_s"),
    "spread": "{spread:.0%}".format_map,
    "x released": "{ratio:.2f}x".format_map,
    "scaling": "{scaling:.2f}x".format_map,
    "of decode's scaling": "{scaling_of_decode:.2f}x".format_map,
}
_SHARES = {
    "what": itemgetter("name"),
    "core-ms per image": lambda r: r["seconds"] * r["threads"] * 1e3,
    "decode": "{shares[decode]:.0%}".format_map,
    "augmentation": "{shares[augmentation]:.0%}".format_map,
    "wait": "{shares[wait]:.0%}".format_map,
}


class Entry(NamedTuple):
    """A contender with a number of threads."""

    contender: str
    threads: int

    def __str__(self) -> str:
        return f"{self.contender}, {self.threads} thread{'s' if self.threads > 1 else ''}"


Measured = Mapping[tuple[str, int], Sequence[Turn]]
"""Turns by contender and number of threads."""


def measure(
    job: Job, contenders: Sequence[str], threads: Sequence[int], repeat: int, seconds: float
) -> tuple[Measured, dict[str, str]]:
    """Turns of about so many seconds, but of at least one batch per thread.

    Returns:
        all turns but those of the warm-up round, and why contenders are missing.
    """
    loaders: dict[Entry, Loader] = {}
    missing: dict[str, str] = {}
    entries = [Entry(*entry) for entry in itertools.product(contenders, threads)]
    with ExitStack() as stack:
        with Progress(len(entries)) as progress:
            for entry in entries:
                progress.begin(f"starting {entry}")
                try:
                    loaders[entry] = CONTENDERS[entry.contender][1](job, entry.threads)
                    stack.callback(loaders[entry].close)
                except Missing as error:
                    missing[entry.contender] = str(error)
                progress.advance()
        batches = {entry: entry.threads for entry in loaders}

        def turn(entry: Entry, counts: bool) -> Turn:
            with pinned(cores(entry.threads)):
                taken = loaders[entry].turn(batches[entry])
            if not counts:
                batches[entry] = entry.threads * max(1, round(seconds / taken.seconds))
            return taken

        return rounds(list(loaders), repeat, turn), missing


def evaluate(measured: Measured) -> list[Result]:
    """One result per contender and number of threads; ``seconds`` are per image.

    ``ratio`` is to the released recipe with as many threads, ``scaling`` to the same contender with the fewest
    threads, ``scaling_of_decode`` is that over the scaling of decoding alone. Each is there where both sides are.
    """
    rates: dict[tuple[str, int], float] = {}
    results = []
    for (name, threads), each in measured.items():
        result = summary(str(Entry(name, threads)), [t.seconds / t.images for t in each])
        rates[name, threads] = 1 / result["seconds"]
        result |= {"contender": name, "threads": threads, "images_per_s": rates[name, threads]}
        if name in (*OURS, "decode"):
            result["core_seconds"] = float(np.median([t.core_seconds / t.images for t in each]))
        results.append(result)
    fewest = min((threads for _, threads in measured), default=1)
    decoding = {r["threads"]: r["core_seconds"] for r in results if r["contender"] == "decode"}
    for result in results:
        name, threads = result["contender"], result["threads"]
        if ("released", threads) in rates:
            result["ratio"] = rates[name, threads] / rates["released", threads]
        if threads > fewest:
            result["scaling"] = rates[name, threads] / rates[name, fewest]
            if decoding:
                result["scaling_of_decode"] = result["scaling"] * rates["decode", fewest] / rates["decode", threads]
        if name in OURS and decoding:
            result["shares"] = shares(result["seconds"] * threads, result["core_seconds"], decoding[threads])
    return results


def shares(available: float, used: float, decoding: float) -> dict[str, float]:
    """What the cores do while ours runs, as parts of 1. They wait when they are idle, or taken by other programs.

    Args:
        available: seconds per image, times cores.
        used: seconds that the cores worked, per image.
        decoding: the same of decoding alone.
    """
    parts = {"decode": decoding, "augmentation": used - decoding, "wait": available - used}
    return {name: seconds / available for name, seconds in parts.items()}


def prepare(options: argparse.Namespace) -> Job:
    """The job that was asked for, its files read once.

    Raises:
        SourceError: no images in ``--data``.
        ConfigError: images that only mcl can read, too few of them, a batch that fills no whole canvases, or too many
            threads.
    """
    for count in options.threads:
        cores(count)
    geometry = Geometry()
    if not geometry.legal(options.batch):
        near = " or ".join(map(str, nearest_legal(geometry, options.batch)))
        raise ConfigError(f"--batch: {options.batch} images fill no whole number of canvases; use {near}")
    source = open_source(str(options.data), key="--data")
    if source.paths is None:
        raise ConfigError(f"--data: {options.data} is no folder of files on a disk, which is all that others read")
    size = min(options.images or len(source), len(source))
    if size < options.batch:
        raise ConfigError(f"--batch: {options.batch} is more than the {size} images; lower it or add images")
    plan = Plan(seed=0, size=size, images=options.batch, geometry=geometry, augment=AugmentConfig())
    job = Job(source, source.paths[:size], plan)
    for path in job.paths:
        Path(path).read_bytes()
    return job


def table(results: Sequence[Result]) -> str:
    """What was measured, as Markdown."""
    ours = [r for r in results if "shares" in r]
    tables = [markdown_table(results, _COLUMNS)]
    return "\n\n".join([*tables, markdown_table(ours, _SHARES)] if ours else tables)


def bars(results: Sequence[Result]) -> dict[str, list[charts.Bar]]:
    """What the chart shows: a row per contender, a bar per number of threads."""
    rows: dict[str, list[charts.Bar]] = {}
    for r in results:
        note = str(Entry("", r["threads"]))[2:]
        if "ratio" in r and r["contender"] != "released":
            note += f"   {r['ratio']:.1f}× released"
        bar = charts.Bar(r["images_per_s"], note, r["contender"] in OURS)
        rows.setdefault(CONTENDERS[r["contender"]][0], []).append(bar)
    return rows


def report(job: Job, results: Sequence[Result], missing: Mapping[str, str]) -> str:
    """What was measured, and on what."""
    size = job.source.sizes[: job.plan.size].mean(0)
    kilobytes = np.mean([Path(path).stat().st_size for path in job.paths]) / 1e3
    lines = [
        f"{job.plan.size} files, on average {size[0]:.0f} x {size[1]:.0f} pixels and {kilobytes:.0f} kB; "
        f"batches of {job.plan.images}. Unique images per second, eight views each.",
        "",
        table(results),
    ]
    lines += ["", *(f"Not measured: {name}: {reason}" for name, reason in missing.items())]
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    job = prepare(options)
    measured, missing = measure(job, options.contenders, options.threads, options.repeat, options.seconds)
    results = evaluate(measured)
    print(report(job, results, missing))
    if options.plot:
        charts.bars("Unique images per second, eight augmented views each", bars(results), options.plot)
    finish(options, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = sorted({1, default_threads()})
    options = parser(__doc__, repeat=7)
    options.add_argument("--data", type=Path, default=Path("data/photos/train"), help="folder of images, or list file")
    options.add_argument("--images", type=int, default=0, help="use the first so many of them; 0: all")
    options.add_argument("--batch", type=int, default=128, help="images per batch")
    options.add_argument("--threads", type=int, nargs="+", default=default, help="cores")
    options.add_argument("--seconds", type=float, default=5, help="of a turn, at least one batch per thread")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who takes part")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
