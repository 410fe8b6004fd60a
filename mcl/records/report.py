"""The report of a run: one HTML file that opens anywhere, made from what the run folder holds.

Nothing in it refers to another file or to the network, and it holds no script. Pieces that a run lacks are named as
missing, so that a report can be written at any time, of a running or broken run too.
"""

import base64
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader

from mcl import __version__
from mcl.records.curves import Record, number, training_curves
from mcl.records.preview import PALETTE, pyramid_name

RECENT = 10
"""Records that the final speed and the final data wait are the median of."""


class ReportError(ValueError):
    """A folder that holds no run."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    name: str
    config: Mapping[str, Any]  # {} where config.yaml is missing or broken
    config_text: str
    train: tuple[Record, ...]
    evals: tuple[Record, ...]  # the last of every name and split
    unreadable: int  # lines of metrics.jsonl
    bad_files: int | None  # None where no list was written
    previews: tuple[Path, ...]

    @property
    def batch(self) -> int | None:
        """Images of a step; None where it is not known."""
        batch = self.setting("trainer.global_batch")
        return batch if isinstance(batch, int) else None

    def setting(self, key: str) -> Any:
        """Value of a dotted key of the configuration; None where it is missing."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


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
    page = render(read(folder))
    path = folder / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OSError(f"{path}: cannot write the report ({error})") from error
    return path


def read(folder: Path) -> Run:
    """Collects what a run folder holds; lines that are no records, such as one cut by a crash, are counted."""
    records: list[Record] = []
    unreadable = 0
    for line in _lines(folder / "metrics.jsonl"):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and number(record, "step") is not None:
            records.append(record)
        else:
            unreadable += 1
    text = "\n".join(_lines(folder / "config.yaml"))
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        config = None
    config = config if isinstance(config, dict) else {}
    latest = {(str(r.get("name")), str(r.get("split", ""))): r for r in records if r.get("kind") == "eval"}
    bad, pictures = folder / "bad_files.jsonl", (folder / "preview").glob("*.png")
    return Run(
        name=str(config.get("name") or folder.resolve().name),
        config=config,
        config_text=text,
        train=tuple(r for r in records if r.get("kind") == "train"),
        evals=tuple(latest.values()),
        unreadable=unreadable,
        bad_files=len(set(_lines(bad))) if bad.exists() else None,
        previews=tuple(sorted(pictures, key=lambda path: (path.name.startswith("features"), path.name))),
    )


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def render(run: Run) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("mcl"), autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        run=run,
        lead=_lead(run),
        tiles=_tiles(run),
        curves=training_curves(run.train) if len(run.train) > 1 else [],
        pictures=[(p.stem.replace("_", " "), base64.b64encode(p.read_bytes()).decode()) for p in run.previews],
        palette=PALETTE,
        pyramid_name=pyramid_name,
        version=__version__,
    )


def _lead(run: Run) -> list[str]:
    """What was trained, and for how long."""
    if not run.train:
        return []
    last = run.train[-1]
    backbone, steps = run.setting("model.backbone"), number(last, "step") or 0
    epochs, epoch = run.setting("trainer.epochs"), number(last, "epoch")
    seconds = _training_seconds(run)
    parts = [
        f"{backbone} with a feature pyramid" if backbone else "A run",
        f"{steps:,.0f} steps" + (f", {steps * run.batch:,.0f} images" if run.batch is not None else ""),
        f"epoch {epoch:.4g} of {epochs}" if epoch is not None and isinstance(epochs, int) else "",
        f"{clock(seconds)} of training" if seconds else "",
    ]
    return [part for part in parts if part]


def _training_seconds(run: Run) -> float:
    """Time spent in steps, from the recorded speeds; 0 where they or the batch are not known."""
    seconds, before = 0.0, 0.0
    for record in run.train:
        step, speed = number(record, "step") or 0.0, number(record, "images_per_s")
        if speed is not None and speed > 0:
            seconds += (step - before) * (run.batch or 0) / speed
        before = step
    return seconds


def clock(seconds: float) -> str:
    """A duration in its two largest units."""
    total = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size} {unit} {total % size // below} {small}"
    return f"{total} s"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Key figures: value, label and note."""

    def known(key: str, records: Sequence[Record]) -> list[float]:
        return [value for record in records if (value := number(record, key)) is not None]

    recent, figures = run.train[-RECENT:], []
    if losses := known("loss", run.train):
        figures.append((f"{losses[-1]:.3f}", "final loss", f"{losses[0]:.3f} at the first record"))
    if speeds := known("images_per_s", recent):
        speed = statistics.median(speeds)
        value = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
        figures.append((value, "images / s", f"median of the last {len(speeds)} records"))
    if waits := known("data_wait", recent):
        figures.append((f"{statistics.median(waits):.1%}", "waiting for data", "share of the time of a step"))
    if run.bad_files is not None:
        figures.append((f"{run.bad_files:,}", "bad files", "replaced; named in bad_files.jsonl"))
    return figures
