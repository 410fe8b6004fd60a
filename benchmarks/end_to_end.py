"""Loader, model, and both together, of one run: ``python -m benchmarks.end_to_end CONFIG key=value ...``.

* ``loader``: steps of the loader, whose batches are discarded;
* ``model``: training steps on the first batch, repeated;
* ``together``: alternating steps of loader and model, as in the trainer's loop;
* ``trainer``: a real run of ``--steps`` steps in a temporary folder, with logging and checkpoints, and the shares of
  its time by its own records. The first record is ignored, since it includes work that is done once.

The first three take turns in rounds, and medians over rounds are reported. Threads, devices and precision are those of
the trainer. Of a canvas schedule, the first size is used. Nothing runs between turns: the loader's threads, which
prepare batches in advance, end with each turn. A turn starts with as many uncounted steps as batches are prepared in
advance, so that the same number of batches is in preparation when the clock starts and when it stops.

When loader and model share cores, the upper bound is the serial rate, 1 / (1 / loader + 1 / model) images per second;
when each has its own device, it is the rate of the slower one.
"""

import gc
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import torch

from benchmarks import charts
from benchmarks.common import PRESETS, Result, argument_parser, finish, markdown, rounds, summary, tables, timed
from mcl import config as configs
from mcl.config import Config, ConfigError
from mcl.records.metrics import Record, read
from mcl.train.trainer import Trainer

DEMO = PRESETS / "mcl_r18_fpn_demo.yaml"
RECORDS = 6
"""Default number of records of the trainer's run."""

_ALONE = ("evaluation.at_end=[]", "montage.schedule=[]", "trainer.checkpoint_epochs=1e6")
"""Keys that leave nothing but steps of one size."""
_PHASES = ("data_wait", "forward", "backward", "graph", "optimizer")
"""Phases of a step in a record; a CUDA graph contains both forward and backward."""
_COLUMNS = {
    "what": itemgetter("name"),
    "images/s": itemgetter("images_per_s"),
    "spread": "{spread:.0%}".format_map,
    "of serial rate": "{of_turns:.0%}".format_map,
    "of the slower": "{of_slower:.0%}".format_map,
    "bound by": itemgetter("bound_by"),
}


def measure(config: Config, repeat: int, seconds: float) -> dict[str, list[float]]:
    """Seconds per image of loader, model and both, in every round.

    Args:
        seconds: approximate length of a turn, which has at least one step.

    Raises:
        ConfigError, SourceError: see :class:`~mcl.train.trainer.Trainer`.
    """
    trainer = Trainer(config)
    loader = trainer.loader
    with loader:
        query, key = (view.to(trainer.device) for view in next(loader))
    contenders: dict[str, Callable[[], object]] = {
        "loader": lambda: next(loader),
        "model": lambda: trainer.train_step(query, key),
        "together": lambda: trainer.train_step(*next(loader)),
    }
    steps = dict.fromkeys(contenders, 1)

    def turn(name: str, counts: bool) -> float:
        with loader:
            timed(contenders[name], config.data.prefetch)  # fills the loader's queue
            per_step = timed(contenders[name], steps[name]) / steps[name]
        gc.collect()  # a pipeline in a reference cycle would go on decoding
        if not counts:
            steps[name] = max(1, round(seconds / per_step))
        return per_step / config.trainer.global_batch

    return rounds(list(contenders), repeat, turn)


def evaluate(measured: Mapping[str, Sequence[float]], records: Sequence[Record], images: int) -> list[Result]:
    """Results; ``seconds`` are per image.

    ``together`` has ``of_turns`` and ``of_slower``: its rate divided by the serial rate, and by the slower of the two
    rates; and ``bound_by``, the name of the slower one. ``trainer`` has ``shares`` of its time, as parts of 1: the
    phases, and ``overhead``, the rest.

    Args:
        records: records of the trainer, at least two.
        images: images per step.
    """
    results = {name: summary(name, seconds) for name, seconds in measured.items()}
    loader, model, together = (results[name]["seconds"] for name in ("loader", "model", "together"))
    results["together"] |= {
        "of_turns": (loader + model) / together,
        "of_slower": max(loader, model) / together,
        "bound_by": "loader" if loader > model else "model",
    }
    per_image = [1 / record["images_per_s"] for record in records[1:]]
    results["trainer"] = summary("trainer", per_image, shares=shares(records, images))
    for result in results.values():
        result["images_per_s"] = 1 / result["seconds"]
    return list(results.values())


def shares(records: Sequence[Record], images: int) -> dict[str, float]:
    """Shares of the time between the first and the last record, as parts of 1.

    On a GPU the host may wait for the loader while the phases run; then ``overhead`` is too small, or even negative.
    """
    elapsed = [(b["step"] - a["step"]) * images / b["images_per_s"] for a, b in itertools.pairwise(records)]
    parts = {
        phase: sum(seconds * r[phase] for seconds, r in zip(elapsed, records[1:], strict=True)) / sum(elapsed)
        for phase in _PHASES
        if phase in records[-1]
    }
    return parts | {"overhead": 1 - sum(parts.values())}


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    parts = next(r["shares"] for r in results if "shares" in r)
    header = ["share of the trainer's time", *(name.replace("_", " ") for name in parts)]
    shown = markdown(header, [["", *(f"{part:.1%}" for part in parts.values())]])
    return f"{tables((results, _COLUMNS))}\n\n{shown}"


def bars(results: Sequence[Result]) -> dict[str, list[charts.Bar]]:
    """Rows of the chart."""
    notes = {
        "together": "{of_turns:.0%} of the serial rate, {of_slower:.0%} of the {bound_by}'s",
        "trainer": "{shares[overhead]:.1%} of its time is its own work",
    }
    each = {r["name"]: (r["images_per_s"], notes.get(r["name"], "").format_map(r)) for r in results}
    return {name: [charts.Bar(*values, ours=name in notes)] for name, values in each.items()}


def prepare(path: Path, words: Sequence[str], steps: int) -> tuple[Config, int]:
    """The requested configuration, without its canvas schedule, and the number of steps of the trainer.

    Raises:
        ConfigError: a key is wrong, or there would be fewer than two records.
    """
    config = configs.load(path, [*words, *_ALONE])
    every = config.trainer.log_every
    if 0 < steps <= every:
        raise ConfigError(f"--steps: {steps} make a single record; use more than trainer.log_every={every}")
    return config, steps or RECORDS * every


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__, repeat=5)
    parser.add_argument("config", type=Path, nargs="?", default=DEMO, help="YAML file; default: the demo's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. trainer.threads=2")
    parser.add_argument("--data", type=Path, help="images (data.root)")
    parser.add_argument("--seconds", type=float, default=5, help="length of a turn, which has at least one step")
    parser.add_argument(
        "--steps", type=int, default=0, help=f"steps of the trainer; default: {RECORDS} times trainer.log_every"
    )
    options = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        root = [f"data.root={options.data}"] if options.data else []
        words = [*options.overrides, *root, f"output={folder}"]
        config, options.steps = prepare(options.config, words, options.steps)
        measured = measure(config, options.repeat, options.seconds)
        print(f"trainer, {options.steps} steps", file=sys.stderr, flush=True)  # it shows its own progress
        gc.collect()  # a recorded CUDA graph keeps its memory
        torch.cuda.empty_cache()
        trainer = Trainer(config)
        trainer.steps = options.steps
        trainer.fit()
        records = [record for record in read(trainer.folder / "metrics.jsonl") if record["kind"] == "train"]
    images = config.trainer.global_batch
    results = evaluate(measured, records, images)
    what = f"{config.name}: {config.model.backbone}, {images} images per step, {config.trainer.precision}"
    print(f"\n{what}\n\n{table(results)}")
    if options.plot:
        charts.bars(f"Images per second, {what}", bars(results), options.plot)
    finish(options, results)


if __name__ == "__main__":
    main()
