"""The report of a run: one HTML file that opens anywhere, made from what the run folder holds.

Nothing in it refers to another file or to the network, and it holds no script. Pieces that a run lacks are named as
missing, so that a report can be written at any time, of a running or broken run too.
"""

import base64
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader

from mcl import __version__
from mcl.records.curves import NAMES, Record, number, score_curves, training_curves
from mcl.records.metrics import EVALUATIONS, read
from mcl.records.preview import PALETTE, pyramid_name

RECENT = 10
"""Records that the final speed and the final data wait are the median of."""


class ReportError(ValueError):
    """A folder that holds no run."""


def write(folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, from its metrics, configuration and pictures.

    Returns:
        The file written.

    Raises:
        ReportError: no such folder.
        OSError: something in the folder cannot be read, or the report cannot be written; the message names it.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such run folder; name one that holds metrics.jsonl, e.g. runs/mcl")
    page = render(folder)
    path = folder / "report.html"
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8
    except OSError as error:
        raise OSError(f"{path}: cannot write the report ({error})") from error
    return path


def render(folder: Path) -> str:
    """The page of a run folder. Lines that are no records, such as one cut by a crash, are counted."""
    files, text = (folder / "metrics.jsonl", folder / EVALUATIONS), "\n".join(_lines(folder / "config.yaml"))
    records = [r for file in files for r in read(file) if isinstance(r, dict) and number(r, "step") is not None]
    train, scores = ([r for r in records if r.get("kind") == kind] for kind in ("train", "eval"))
    latest = {tuple(str(r.get(key, "")) for key in ("name", "split", "features", "labels")): r for r in scores}
    config, bad = _parsed(text), folder / "bad_files.jsonl"
    trainer = config.get("trainer")
    batch = trainer.get("global_batch") if isinstance(trainer, dict) else None
    pictures = sorted(folder.glob("preview/*.png"), key=lambda path: (path.name.startswith("features"), path.name))
    environment = Environment(
        loader=PackageLoader("mcl"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        name=config.get("name") or folder.resolve().name,
        config=config,
        config_text=text,
        train=train,
        batch=batch,
        seconds=_training_seconds(train, batch) if isinstance(batch, int) else 0,
        losses=_known(train, "loss"),
        speeds=_known(train[-RECENT:], "images_per_s"),
        waits=_known(train[-RECENT:], "data_wait"),
        bad_files=len(set(_lines(bad))) if bad.exists() else None,
        evaluations=list(latest.values()),
        curves=training_curves(train) if len(train) > 1 else [],
        score_curves=score_curves(scores),
        names=NAMES,
        unreadable=sum(len(_lines(file)) for file in files) - len(records),
        pictures=[(p.stem.replace("_", " "), base64.b64encode(p.read_bytes()).decode()) for p in pictures],
        version=__version__,
        clock=clock,
        median=statistics.median,
        palette=PALETTE,
        pyramid_name=pyramid_name,
    )


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _parsed(text: str) -> dict[str, Any]:
    """A configuration; empty where it is missing or broken."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    return config if isinstance(config, dict) else {}


def _known(records: Sequence[Record], key: str) -> list[float]:
    """A number of each record that has it."""
    return [value for record in records if (value := number(record, key)) is not None]


def _training_seconds(train: Sequence[Record], batch: int) -> float:
    """Time spent in steps, from the recorded speeds; 0 where they are not known."""
    seconds, before = 0.0, 0.0
    for record in train:
        step, speed = number(record, "step") or 0.0, number(record, "images_per_s")
        if speed is not None and speed > 0:
            seconds += (step - before) * batch / speed
        before = step
    return seconds


def clock(seconds: float) -> str:
    """A duration in its two largest units."""
    total = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size} {unit} {total % size // below} {small}"
    return f"{total} s"
