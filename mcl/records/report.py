"""The report of a run: a single HTML file, made from the files of the run folder.

It refers to no other file or network address, and has no scripts. It names what is missing, so that it can be written
at any time, also for a running or failed run.
"""

import base64
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader

from mcl import __version__
from mcl.records.curves import Record, length, number, score_curves, training_curves
from mcl.records.metrics import ENVIRONMENT, EVALUATIONS, read
from mcl.records.preview import PALETTE, pyramid_name
from mcl.records.tensorboard import NAMES, PICTURES

RECENT = 10
"""Number of last records whose medians are the final speed and the final data wait."""


class ReportError(ValueError):
    """The folder is not a run folder."""


def write(folder: Path) -> Path:
    """Writes ``report.html`` into a run folder, from its metrics, configuration and pictures.

    Returns:
        The file written.

    Raises:
        ReportError: the folder does not exist.
        OSError: a file in the folder cannot be read, or the report cannot be written; the message names the file.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such run folder; give one that has metrics.jsonl, e.g. runs/mcl")
    page = render(folder)
    path = folder / "report.html"
    try:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")  # names need not be UTF-8
    except OSError as error:
        raise OSError(f"{path}: cannot write the report ({error})") from error
    return path


def render(folder: Path) -> str:
    """The page of a run folder. Lines that are not records, such as one cut by a crash, are counted."""
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
        verdict=verdict(scores, folder, _of(config, "model", "init") or _of(config, "trainer", "init_from")),
        about=_about(config, folder / ENVIRONMENT),
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
        pictures=[(_caption(p.stem), base64.b64encode(p.read_bytes()).decode()) for p in pictures],
        version=__version__,
        clock=clock,
        median=statistics.median,
        palette=PALETTE,
        pyramid_name=pyramid_name,
    )


def verdict(evaluations: Sequence[Record], folder: Path, start: str | None = None) -> str:
    """A sentence that says whether the run learned: whether its score is above that of the same network, untrained, by
    more than two standard errors of their difference.

    Retrieval is preferred to other evaluations, held-out images to training images, and later steps to earlier ones.
    The untrained network has random weights, so the sentence also names the weights that a run started from (`start`).
    """
    judged = [(r, found) for r in evaluations if (number(r, "step") or 0) > 0 and (found := _compared(r))]
    if not judged:
        return f"Not measured whether it learned: mcl evaluate retrieval {folder / 'checkpoints' / 'last.pt'}"
    order = list(NAMES)[::-1]

    def weight(item: tuple[Record, Any]) -> tuple[int, bool, float]:
        record, _ = item
        return order.index(record["name"]), record.get("split") == "val", number(record, "step") or 0

    record, (trained, error, random, random_error) = max(judged, key=weight)
    learned = trained - random > 2 * math.hypot(error, random_error)
    levels = "(mean over levels) " if record["name"] == "retrieval" else ""
    text = (
        f"{'Learned' if learned else 'No sign of learning'}: {NAMES[record['name']].lower()} {levels}{trained:.1%} ± "
        f"{100 * error:.1f} (untrained {random:.1%} ± {100 * random_error:.1f}), "
        f"{'held-out' if record.get('split') == 'val' else 'training'} images, step {record['step']:,.0f}"
    )
    return f"{text}. The run started from {start}, which may account for part of it" if start else text


def _compared(record: Record) -> tuple[float, float, float, float] | None:
    """Scores of the trained and the untrained network with their standard errors; None if these are not known.

    Standard errors: for retrieval, the mean of those of the levels, which is an upper bound for that of the mean; for
    objects, a quarter of the interval, since objects of an image are not independent; otherwise binomial.
    """
    name, keys = record.get("name"), ("levels", "levels_se", "random", "random_se")
    if name == "retrieval":
        rows = [[number(record, key, i) for i in range(length(record, key))] for key in keys]
        if not all(rows) or any(value is None for row in rows for value in row):
            return None
        means = [statistics.fmean(value or 0 for value in row) for row in rows]
        return means[0], means[1], means[2], means[3]
    values = [number(record, key) for key in ("accuracy", "random")]
    if name == "regions":
        ends = [[number(record, f"{key}_interval", i) for i in (0, 1)] for key in ("accuracy", "random")]
        errors = [None if low is None or high is None else (high - low) / 4 for low, high in ends]
    elif name in ("knn", "linear") and (n := number(record, "images")):
        errors = [None if p is None else math.sqrt(max(0, p * (1 - p)) / n) for p in values]
    else:
        return None
    (trained, random), (error, random_error) = values, errors
    if trained is None or random is None or error is None or random_error is None:
        return None
    return trained, error, random, random_error


def _of(config: Record, section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _about(config: Record, path: Path) -> str:
    """Data set, batch, precision, device and date of a run, as far as they are known."""
    of = partial(_of, config)
    known = _parsed("\n".join(_lines(path)))  # JSON is YAML
    parts = [
        of("data", "root"),
        f"{known['images']:,} images" if isinstance(known.get("images"), int) else "",
        f"{of('trainer', 'global_batch')} images per step" if of("trainer", "global_batch") else "",
        of("trainer", "precision"),
        f"{known['device']} × {known.get('world_size', 1)}" if known.get("device") else "",
        f"started {str(known['started'])[:16].replace('T', ' ')}" if known.get("started") else "",
    ]
    return " · ".join(str(part) for part in parts if part)


def _caption(stem: str) -> str:
    """Caption of a picture, from the name of its file: what it shows, and of which step."""
    kind, _, step = stem.partition("_")
    words = PICTURES.get(kind, stem.replace("_", " "))
    return f"{words} (step {int(step):,})" if kind in PICTURES and step.isdigit() else words


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _parsed(text: str) -> dict[str, Any]:
    """A YAML mapping; empty if it is missing or broken."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    return config if isinstance(config, dict) else {}


def _known(records: Sequence[Record], key: str) -> list[float]:
    """A number of each record that has it."""
    return [value for record in records if (value := number(record, key)) is not None]


def _training_seconds(train: Sequence[Record], batch: int) -> float:
    """Time spent in steps, from the recorded speeds; 0 if they are not known."""
    seconds, before = 0.0, 0.0
    for record in train:
        step, speed = number(record, "step") or 0.0, number(record, "images_per_s")
        if speed is not None and speed > 0:
            seconds += (step - before) * batch / speed
        before = step
    return seconds


def clock(seconds: float) -> str:
    """Formats a duration in its two largest units."""
    total = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size} {unit} {total % size // below} {small}"
    return f"{total} s"
