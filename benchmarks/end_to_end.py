"""Loader, model, and both together, of one run: ``python -m benchmarks.end_to_end CONFIG key=value ...``.

* ``loader``: its steps, thrown away;
* ``model``: training steps on the first batch, again and again;
* ``together``: a step of the loader, a step of the model, in the order of the trainer's loop;
* ``trainer``: a real run of ``--steps`` steps in a temporary folder, logging and checkpoints included, and where its
  time goes by its own records. The first record is left out: it holds what happens once.

The first three take turns, one at a time, in rounds; what is reported are medians over rounds. Threads, devices and
arithmetic are the trainer's; of a canvas schedule the first size is taken. Between turns nothing runs: the loader's
threads, which work ahead, are gone after a turn, and a turn starts with as many steps as they work ahead. These are not
counted, so that equally much is in the making when the clock starts as when it stops.

Where loader and model share the cores, the best that can be is to take turns, 1 / (1 / loader + 1 / model) images per
second; where each has a device of its own, it is the slower one's rate.
"""

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import bars
from benchmarks.common import Result, finish, markdown, parser, summary, synchronize, turns
from benchmarks.loaders.chart import rate
from mcl import config as configs
from mcl.config import Config, ConfigError
from mcl.records.metrics import Record, read
from mcl.train.trainer import Trainer

DEMO = Path(__file__).parents[1] / "configs" / "pretrain" / "mcl_r18_fpn_demo.yaml"
RECORDS = 6
"""Of the trainer's run, by default."""

_PHASES = ("data_wait", "forward", "backward", "graph", "optimizer")
"""What a record says of time; a CUDA graph is forward and backward in one."""


def measure(config: Config, repeat: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per image of loader, model and both, in every round.

    Args:
        seconds: of a turn, about; at least one step.

    Raises:
        ConfigError, SourceError: see :class:`~mcl.train.trainer.Trainer`.
    """
    trainer = Trainer(config)
    loader, images = trainer.loader, config.trainer.global_batch
    with loader:
        query, key = (view.to(trainer.device) for view in next(loader))
    contenders: dict[str, Callable[[], object]] = {
        "loader": lambda: next(loader),
        "model": lambda: trainer.train_step(query, key),
        "together": lambda: trainer.train_step(*next(loader)),
    }
    steps = dict.fromkeys(contenders, 1)
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for name, counts in turns(list(contenders), repeat):
        with loader:
            per_step = _turn(contenders[name], config.data.prefetch, steps[name])
        gc.collect()  # what Python keeps in a circle would go on decoding
        if counts:
            measured[name].append(per_step / images)
        else:
            steps[name] = max(1, round(seconds / per_step))
    return measured


def _turn(step: Callable[[], object], ahead: int, steps: int) -> float:
    """Seconds per step, after `ahead` steps that are not counted."""
    for _ in range(ahead):
        step()
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - start) / steps


def train(config: Config, steps: int) -> list[Record]:
    """What a run of so many steps records of itself."""
    trainer = Trainer(config)
    trainer.steps = steps
    trainer.fit()
    return [record for record in read(trainer.folder / "metrics.jsonl") if record["kind"] == "train"]


def evaluate(measured: dict[str, list[float]], records: Sequence[Record], images: int) -> list[Result]:
    """Results; ``seconds`` are per image.

    ``together`` has ``of_turns`` and ``of_slower``: the parts that it reaches of the rate of loader and model taking
    turns, and of the slower one's; and ``bound_by``, which that is. ``trainer`` has ``shares`` of its time, as parts of
    1: the phases, and ``overhead``, what is left.

    Args:
        records: of the trainer, at least two.
        images: of a step.
    """
    results = {name: summary(name, seconds) for name, seconds in measured.items()}
    loader, model, together = (results[name]["seconds"] for name in ("loader", "model", "together"))
    results["together"] |= {
        "of_turns": (loader + model) / together,
        "of_slower": max(loader, model) / together,
        "bound_by": "loader" if loader > model else "model",
    }
    later = records[1:]
    results["trainer"] = summary("trainer", [1 / r["images_per_s"] for r in later], shares=shares(records, images))
    for result in results.values():
        result["images_per_s"] = 1 / result["seconds"]
    return list(results.values())


def shares(records: Sequence[Record], images: int) -> dict[str, float]:
    """Where the time between the first and the last record went, as parts of 1.

    On a GPU the host may wait for the loader while the phases run: then ``overhead`` is too small, even below 0.
    """
    elapsed = [(b["step"] - a["step"]) * images / b["images_per_s"] for a, b in itertools.pairwise(records)]
    parts = {
        phase: sum(seconds * r[phase] for seconds, r in zip(elapsed, records[1:], strict=True)) / sum(elapsed)
        for phase in _PHASES
        if phase in records[-1]
    }
    return parts | {"overhead": 1 - sum(parts.values())}


def table(results: Sequence[Result]) -> str:
    """What was measured, as Markdown."""
    rows = [
        (
            r["name"],
            rate(r["images_per_s"]),
            f"{r['spread']:.0%}",
            *(f"{r[key]:.0%}" if key in r else "" for key in ("of_turns", "of_slower")),
            r.get("bound_by", ""),
        )
        for r in results
    ]
    first = markdown(["what", "images/s", "spread", "of taking turns", "of the slower", "bound by"], rows)
    parts = next(r["shares"] for r in results if "shares" in r)
    header = ["share of the trainer's time", *(name.replace("_", " ") for name in parts)]
    return first + "\n\n" + markdown(header, [["", *(f"{part:.1%}" for part in parts.values())]])


def draw(results: Sequence[Result], title: str, path: Path) -> None:
    """Writes the chart."""
    names = {"loader": "loader alone", "model": "model alone", "together": "together", "trainer": "trainer"}
    notes = dict.fromkeys(names, "")
    for r in results:
        if "bound_by" in r:
            notes["together"] = f"{r['of_turns']:.0%} of taking turns, {r['of_slower']:.0%} of the {r['bound_by']}'s"
        if "shares" in r:
            notes["trainer"] = f"{r['shares']['overhead']:.1%} of its time is its own work"
    ours = ("together", "trainer")
    chart = [bars.Bar(names[r["name"]], r["images_per_s"], notes[r["name"]], r["name"] in ours) for r in results]
    bars.draw(title, chart, path)


def prepare(options: argparse.Namespace, folder: str) -> Config:
    """The configuration that was asked for, its runs kept in `folder`.

    Raises:
        ConfigError: a wrong key, or fewer than two records.
    """
    words = [f"data.root={options.data}"] if options.data else []
    words += [f"output={folder}", "evaluation.at_end=[]", "montage.schedule=[]"]
    config = configs.load(options.config, [*options.overrides, *words])
    every = config.trainer.log_every
    options.steps = options.steps or RECORDS * every
    if options.steps <= every:
        raise ConfigError(f"--steps: {options.steps} make a single record; use more than trainer.log_every={every}")
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(options, folder)
        measured = measure(config, options.repeat, options.seconds)
        records = train(config, options.steps)
    images = config.trainer.global_batch
    results = evaluate(measured, records, images)
    what = f"{config.name}: {config.model.backbone}, {images} images per step, {config.trainer.precision}"
    print(f"\n{what}\n\n{table(results)}")
    if options.plot:
        draw(results, f"Images per second, {what}", options.plot)
    finish(options, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.set_defaults(repeat=5)
    options.add_argument("config", type=Path, nargs="?", default=DEMO, help="YAML file; the demo's without it")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.threads=2")
    options.add_argument("--data", type=Path, help="images (data.root)")
    options.add_argument("--seconds", type=float, default=5, help="of a turn, at least one step")
    options.add_argument("--steps", type=int, default=0, help=f"of the trainer; 0: {RECORDS} times trainer.log_every")
    options.add_argument("--plot", type=Path, help="PNG file to draw the results to")
    return options.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
