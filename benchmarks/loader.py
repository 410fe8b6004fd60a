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
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.common import Result, finish, markdown, parser, summary, turns
from benchmarks.loaders import Job, Loader, Missing, Turn, chart, cores, pinned
from benchmarks.loaders.pipelines import Decode, Montages
from benchmarks.loaders.workers import Workers, lightly, released, torchvision_v2
from dali_pipelines.geometry import Geometry, nearest_legal
from dali_pipelines.loader import default_threads
from dali_pipelines.plan import Plan
from dali_pipelines.source import open_source
from mcl.config import AugmentConfig, ConfigError

CONTENDERS: dict[str, Callable[[Job, int], Loader]] = {
    "decode": Decode,
    "fused": functools.partial(Montages, engine="fused"),
    "stock": functools.partial(Montages, engine="stock"),
    "released": functools.partial(Workers, recipe=released),
    "torchvision": functools.partial(Workers, recipe=torchvision_v2),
    "lightly": functools.partial(Workers, recipe=lightly),
}
OURS = ("fused", "stock")

Measured = dict[tuple[str, int], list[Turn]]
"""Turns of a contender with a number of threads."""


def measure(
    job: Job, contenders: Sequence[str], threads: Sequence[int], repeat: int, seconds: float
) -> tuple[Measured, dict[str, str]]:
    """Turns of about so many seconds, but of at least one batch per thread.

    Returns:
        all turns but those of the warm-up round, and why contenders are missing.
    """
    loaders: dict[tuple[str, int], Loader] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        for name in contenders:
            for count in threads:
                try:
                    loader = CONTENDERS[name](job, count)
                except Missing as error:
                    missing[name] = str(error)
                else:
                    loaders[name, count] = loader
                    stack.callback(loader.close)
        measured: Measured = {key: [] for key in loaders}
        batches = {(name, count): count for name, count in loaders}
        for key, counts in turns(list(loaders), repeat):
            name, count = key
            with pinned(cores(count)):
                turn = loaders[key].turn(batches[key])
            if counts:
                measured[key].append(turn)
            else:
                batches[key] = count * max(1, round(seconds / turn.seconds))
    return measured, missing


def evaluate(measured: Measured) -> list[Result]:
    """One result per contender and number of threads; ``seconds`` are per image.

    ``ratio`` is to the released recipe with as many threads, ``scaling`` to the same contender with the fewest
    threads, ``scaling_of_decode`` is that over the scaling of decoding alone. Each is there where both sides are.
    """
    rates: dict[tuple[str, int], float] = {}
    results = []
    for (name, threads), each in measured.items():
        plural = "s" if threads > 1 else ""
        result = summary(f"{name}, {threads} thread{plural}", [t.seconds / t.images for t in each])
        rates[name, threads] = 1 / result["seconds"]
        core_seconds = float(np.median([t.core_seconds / t.images for t in each]))
        results.append(
            result
            | {"contender": name, "threads": threads, "images_per_s": rates[name, threads]}
            | ({"core_seconds": core_seconds} if name in (*OURS, "decode") else {})
        )
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
    rows = [
        (
            r["name"],
            chart.rate(r["images_per_s"]),
            f"{r['spread']:.0%}",
            *(f"{r[key]:.2f}x" if key in r else "" for key in ("ratio", "scaling", "scaling_of_decode")),
        )
        for r in results
    ]
    tables = [markdown(["what", "images/s", "spread", "x released", "scaling", "of decode's scaling"], rows)]
    ours = [r for r in results if "shares" in r]
    if ours:
        rows = [
            (r["name"], r["seconds"] * r["threads"] * 1e3, *(f"{part:.0%}" for part in r["shares"].values()))
            for r in ours
        ]
        tables.append(markdown(["what", "core-ms per image", "decode", "augmentation", "wait"], rows))
    return "\n\n".join(tables)


def report(job: Job, results: Sequence[Result], missing: dict[str, str]) -> str:
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
        chart.draw(results, options.plot)
    finish(options, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    default = sorted({1, default_threads()})
    options = parser(__doc__ or "")
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--data", type=Path, default=Path("data/photos/train"), help="folder of images, or list file")
    options.add_argument("--images", type=int, default=0, help="use the first so many of them; 0: all")
    options.add_argument("--batch", type=int, default=128, help="images per batch")
    options.add_argument("--threads", type=int, nargs="+", default=default, help="cores")
    options.add_argument("--seconds", type=float, default=5, help="of a turn, at least one batch per thread")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who takes part")
    options.add_argument("--plot", type=Path, help="PNG file to draw the results to")
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
