"""Compares the loader with the usual alternatives: ``python -m benchmarks.loader --data data/photos4k``.

Measures unique source images per second. Each is shown in eight augmented views (two views, four levels, canvases of
224 px):

* ``decode``: DALI only reads and decodes the files, on the CPU; this is the upper bound for CPUs;
* ``fused``, ``stock``: mcl's loader with either engine, up to normalised montages; ``fused_gpu``, ``stock_gpu``: the
  same on a GPU, including decoding;
* ``released``: the authors' recipe, eight views of 224 px made by Pillow in worker processes of a DataLoader;
* ``torchvision``: the same eight views, made by torchvision.transforms.v2 on tensors, also in a DataLoader;
* ``lightly``: the same eight views, made by lightly's BYOL transforms, also in a DataLoader.

Rules for a fair comparison:

* All contenders take turns, one at a time, in rounds, and medians over rounds are reported.
* Nothing runs between turns. A worker process gets the batches of a turn when the clock starts, and has none left when
  it stops. DALI, which prepares batches in advance, is built again for every turn; the clock starts when its queue is
  full.
* All contenders process the steps of the same plan, from files that are in the page cache.
* T threads means T cores: the process and its workers, with all helper threads, are pinned to T cores. DALI gets T
  threads, a DataLoader T workers with one thread each.
* The three other recipes end before normalisation and tiling, which they leave to the device; ours include both. Ours
  crop views directly to the size of their tiles (``data.tile_sampling=direct``), which is 1.33 canvases of pixels per
  image and view instead of 4. This is part of the comparison.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import charts
from benchmarks.common import Result, argument_parser, finish, rounds, summary, tables
from benchmarks.loader_contenders import CONTENDERS, OURS, Job, Missing, Take, Turn, cores, pinned
from dali_pipelines.geometry import Geometry, nearest_legal
from dali_pipelines.loader import default_threads
from dali_pipelines.plan import Plan
from dali_pipelines.source import open_source
from mcl.config import AugmentConfig, ConfigError

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


def measure(
    job: Job, contenders: Sequence[str], threads: Sequence[int], repeat: int, seconds: float
) -> tuple[dict[Entry, list[Turn]], dict[str, str]]:
    """Runs turns of about `seconds` seconds, with at least one batch per thread.

    Returns:
        All turns except those of the warm-up round, and the reasons why contenders are missing.
    """
    loaders: dict[Entry, Take] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        for entry in itertools.starmap(Entry, itertools.product(contenders, threads)):
            try:
                loaders[entry] = stack.enter_context(CONTENDERS[entry.contender][1](job, entry.threads))
            except Missing as error:
                missing[entry.contender] = str(error)
        batches = {entry: entry.threads for entry in loaders}

        def turn(entry: Entry, counts: bool) -> Turn:
            with pinned(cores(entry.threads)):
                taken = loaders[entry](batches[entry])
            if not counts:
                batches[entry] = entry.threads * max(1, round(seconds / taken.seconds))
            return taken

        return rounds(list(loaders), repeat, turn), missing


def evaluate(measured: Mapping[Entry, Sequence[Turn]]) -> list[Result]:
    """One result per contender and number of threads; ``seconds`` are per image.

    ``ratio`` is the speed relative to the released recipe with as many threads, ``scaling`` that relative to the same
    contender with the fewest threads, ``scaling_of_decode`` the latter divided by the scaling of decoding alone. Ratios
    are left out if one of the two was not measured. ``shares`` tell how ours uses the cores, as parts of 1; ``wait`` is
    time in which cores are idle or used by other programs.
    """
    results = {}
    for entry, each in measured.items():
        result = summary(str(entry), [t.seconds / t.images for t in each])
        result |= {"contender": entry.contender, "threads": entry.threads, "images_per_s": 1 / result["seconds"]}
        if entry.contender in (*OURS, "decode"):
            result["core_seconds"] = statistics.median(t.core_seconds / t.images for t in each)
        results[entry] = result
    rates = {entry: result["images_per_s"] for entry, result in results.items()}
    fewest = min((entry.threads for entry in results), default=1)
    for (name, threads), result in results.items():
        decode = results.get(Entry("decode", threads))
        if Entry("released", threads) in rates:
            result["ratio"] = result["images_per_s"] / rates[Entry("released", threads)]
        if threads > fewest:
            result["scaling"] = result["images_per_s"] / rates[Entry(name, fewest)]
            if decode:
                result["scaling_of_decode"] = (
                    result["scaling"] * rates[Entry("decode", fewest)] / decode["images_per_s"]
                )
        if name in OURS and decode:
            available, used, decoding = result["seconds"] * threads, result["core_seconds"], decode["core_seconds"]
            parts = {"decode": decoding, "augmentation": used - decoding, "wait": available - used}
            result["shares"] = {part: seconds / available for part, seconds in parts.items()}
    return list(results.values())


def prepare(data: Path, images: int, batch: int, threads: Sequence[int]) -> Job:
    """The requested job. Reads all files once, so that they are in the page cache.

    Raises:
        SourceError: there are no images in ``--data``.
        ConfigError: only mcl can read the images, there are too few, the batch does not fill whole canvases, or there
            are too many threads.
    """
    for count in threads:
        cores(count)
    geometry = Geometry()
    if not geometry.legal(batch):
        near = " or ".join(map(str, nearest_legal(geometry, batch)))
        raise ConfigError(f"--batch: {batch} images do not fill a whole number of canvases; use {near}")
    source = open_source(str(data), key="--data")
    if source.paths is None:
        raise ConfigError(f"--data: {data} is not a folder of files on a disk; other loaders cannot read it")
    size = min(images or len(source), len(source))
    if size < batch:
        raise ConfigError(f"--batch: {batch} is more than the {size} images; lower it or add images")
    plan = Plan(seed=0, size=size, images=batch, geometry=geometry, augment=AugmentConfig())
    job = Job(source, source.paths[:size], plan)
    for path in job.paths:
        Path(path).read_bytes()
    return job


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    return tables((results, _COLUMNS), ([r for r in results if "shares" in r], _SHARES))


def bars(results: Sequence[Result]) -> dict[str, list[charts.Bar]]:
    """Rows of the chart: one per contender, with one bar per number of threads."""
    rows: dict[str, list[charts.Bar]] = {}
    for r in results:
        note = r["name"].partition(", ")[2]  # the number of threads
        if "ratio" in r and r["contender"] != "released":
            note += f"   {r['ratio']:.1f}× released"
        bar = charts.Bar(r["images_per_s"], note, r["contender"].startswith(OURS))
        rows.setdefault(CONTENDERS[r["contender"]][0], []).append(bar)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    default = sorted({1, default_threads()})
    parser = argument_parser(__doc__, repeat=7)
    parser.add_argument("--data", type=Path, default=Path("data/photos/train"), help="folder of images, or list file")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="use only the first N images; 0: all")
    parser.add_argument("--batch", type=int, default=128, help="images per batch")
    parser.add_argument("--threads", type=int, nargs="+", default=default, help="numbers of threads, and of cores")
    parser.add_argument("--seconds", type=float, default=5, help="length of a turn, at least one batch per thread")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="what to measure")
    options = parser.parse_args(arguments)
    job = prepare(options.data, options.images, options.batch, options.threads)
    measured, missing = measure(job, options.contenders, options.threads, options.repeat, options.seconds)
    results = evaluate(measured)
    width, height = job.source.sizes[: job.plan.size].mean(0)[:2]
    kilobytes = np.mean([Path(path).stat().st_size for path in job.paths]) / 1e3
    print(
        f"{job.plan.size} files, on average {width:.0f} x {height:.0f} pixels and {kilobytes:.0f} kB; "
        f"batches of {job.plan.images}. Unique images per second, eight views each.\n\n{table(results)}\n"
    )
    for name, reason in missing.items():
        print(f"Not measured: {name}: {reason}")
    if options.plot:
        charts.bars("Unique images per second, eight augmented views each", bars(results), options.plot)
    finish(options, results)


if __name__ == "__main__":
    main()
