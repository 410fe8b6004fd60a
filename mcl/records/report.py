"""The report of a run: one HTML file that opens anywhere, made from what the run folder holds.

Nothing in it refers to another file or to the network, and it holds no script. Pieces that a run lacks are named as
missing, so that a report can be written at any time, of a running or broken run too.
"""

import base64
import html
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mcl import __version__
from mcl.records.curves import Record, at, number, numbers, training_curves
from mcl.records.preview import PALETTE, pyramid_name

RECENT = 10
"""Records that the final speed and the final data wait are the median of."""

_TITLES = {"retrieval": "Retrieval", "knn": "Nearest neighbours", "linear": "Linear classifier"}

_HEAD = (
    '<tr class="head"><th>Top-1</th><th>bar: trained, line: random weights, dots: chance</th><th>trained</th>'
    "<th>random weights</th><th>chance</th></tr>"
)


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
    name = html.escape(run.name)
    sections = [
        ("Evaluation", _evaluation(run)),
        ("Training", _training(run)),
        ("Pictures", _pictures(run)),
        ("Configuration", _configuration(run)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}\n</section>" for title, content in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} – pre-training report</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Multi-Level Contrastive pre-training</p>
<h1>{name}</h1>
<p class="lead">{html.escape(_lead(run))}</p>
{_tiles(run)}
</header>
{body}
<footer>mcl {html.escape(__version__)}</footer>
</main>
</body>
</html>
"""


def _lead(run: Run) -> str:
    if not run.train:
        return "No training step has been recorded yet."
    last = run.train[-1]
    backbone = run.setting("model.backbone")
    parts = [f"{backbone} with a feature pyramid" if backbone else "A run"]
    steps = f"{number(last, 'step') or 0:,.0f} steps"
    images = images_seen(run)
    parts.append(f"{steps}, {images:,.0f} images" if images is not None else steps)
    epochs, epoch = run.setting("trainer.epochs"), number(last, "epoch")
    if epoch is not None and isinstance(epochs, int):
        parts.append(f"epoch {epoch:.4g} of {epochs}")
    duration = training_seconds(run)
    if duration is not None:
        parts.append(f"{clock(duration)} of training")
    return " · ".join(parts)


def images_seen(run: Run) -> float | None:
    """Images that went through the network, repeats counted; None where the batch is not known."""
    batch = run.setting("trainer.global_batch")
    if not run.train or not isinstance(batch, int):
        return None
    return (number(run.train[-1], "step") or 0) * batch


def training_seconds(run: Run) -> float | None:
    """Time spent in steps, from the recorded speeds; None where they or the batch are not known."""
    batch = run.setting("trainer.global_batch")
    if not isinstance(batch, int):
        return None
    seconds, before = 0.0, 0.0
    for record in run.train:
        step, speed = number(record, "step") or 0.0, number(record, "images_per_s")
        if speed is not None and speed > 0:
            seconds += (step - before) * batch / speed
        before = step
    return seconds or None


def clock(seconds: float) -> str:
    """A duration in its two largest units."""
    total = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size} {unit} {total % size // below} {small}"
    return f"{total} s"


def _tiles(run: Run) -> str:
    figures: list[tuple[str, str, str]] = []
    recent = run.train[-RECENT:]
    speeds = [v for r in recent if (v := number(r, "images_per_s")) is not None]
    waits = [v for r in recent if (v := number(r, "data_wait")) is not None]
    losses = [v for r in run.train if (v := number(r, "loss")) is not None]
    if losses:
        figures.append((f"{losses[-1]:.3f}", "final loss", f"{losses[0]:.3f} at the first record"))
    if speeds:
        speed = statistics.median(speeds)
        digits = 0 if speed >= 100 else 1
        figures.append((f"{speed:,.{digits}f}", "images / s", f"median of the last {len(speeds)} records"))
    if waits:
        figures.append((f"{statistics.median(waits):.1%}", "waiting for data", "share of the time of a step"))
    if run.bad_files is not None:
        figures.append((f"{run.bad_files:,}", "bad files", "replaced; named in bad_files.jsonl"))
    if not figures:
        return ""
    items = "".join(
        f"<li><b>{value}</b><span>{label}</span><small>{note}</small></li>" for value, label, note in figures
    )
    return f'<ul class="tiles">{items}</ul>'


def _missing(text: str) -> str:
    return f'<p class="missing">{html.escape(text)}</p>'


def _evaluation(run: Run) -> str:
    if not run.evals:
        return _missing("This run has not been evaluated.")
    return "\n".join(_evaluation_table(run, record) for record in run.evals)


def _evaluation_table(run: Run, record: Record) -> str:
    name = str(record.get("name"))
    split = {"train": "training images", "val": "held-out images"}.get(str(record.get("split")), "")
    title = " · ".join(part for part in (_TITLES.get(name, name), split) if part)
    step = number(record, "step") or 0
    if numbers(record, "levels"):
        note, table = _retrieval(run, record)
    elif number(record, "accuracy") is not None:
        note, table = _accuracy(record)
    else:
        note, table = "", _plain(record)
    caption = f"<b>{html.escape(title)}</b> <span>{html.escape(note)} Step {step:,.0f}.</span>"
    return f'<div class="scroll"><table><caption>{caption}</caption>{table}</table></div>'


def _retrieval(run: Run, record: Record) -> tuple[str, str]:
    gallery = number(record, "gallery")
    among = f"{gallery:,.0f}" if gallery is not None else "all"
    note = f"How often a tile's nearest full image, of {among} seen in another view, is its own."
    trained, random = numbers(record, "levels"), numbers(record, "random")
    trained_se, random_se = numbers(record, "levels_se"), numbers(record, "random_se")
    ratios, chance = run.setting("montage.ratios"), number(record, "chance")
    rows = []
    for level, value in enumerate(trained):
        label = f"Level {level}"
        if isinstance(ratios, list) and level < len(ratios) and isinstance(ratios[level], int):
            label += f" <small>{ratios[level]} × {ratios[level]} tiles, {pyramid_name(ratios[level])}</small>"
        colour = PALETTE[level % len(PALETTE)]
        rows.append(_row(label, colour, value, at(trained_se, level), at(random, level), at(random_se, level), chance))
    return note, _HEAD + "".join(rows)


def _accuracy(record: Record) -> tuple[str, str]:
    classes, k = number(record, "classes"), number(record, "k")
    by = f"by its {k:,.0f} nearest neighbours" if k is not None and record.get("name") == "knn" else "from its features"
    among = f", of {classes:,.0f} classes" if classes is not None else ""
    note = f"How often the class of an image is found {by}{among}; chance always names the most frequent one."
    value = number(record, "accuracy") or 0.0
    se, other, other_se = (number(record, key) for key in ("accuracy_se", "random", "random_se"))
    return note, _HEAD + _row("Backbone", PALETTE[0], value, se, other, other_se, number(record, "chance"))


def _row(
    label: str,
    colour: str,
    value: float,
    se: float | None,
    other: float | None,
    other_se: float | None,
    chance: float | None,
) -> str:
    """A row with a bar: the trained share filled, ticks where random weights and chance are."""
    ticks = "".join(
        f'<i class="{kind}" style="left:{_clip(v):.1%}"></i>'
        for kind, v in (("tick", other), ("tick dot", chance))
        if v is not None
    )
    bar = f'<div class="bar"><i style="width:{_clip(value):.1%};background:{colour}"></i>{ticks}</div>'
    return (
        f"<tr><th>{label}</th><td>{bar}</td><td><b>{_share(value, se)}</b></td><td>{_share(other, other_se)}</td>"
        f"<td>{_share(chance, None)}</td></tr>"
    )


def _plain(record: Record) -> str:
    """Whatever numbers a record of another kind holds."""
    skipped = {"kind", "name", "split", "step"}
    rows = [(k, ", ".join(f"{v:.4g}" for v in numbers(record, k))) for k in record if numbers(record, k)]
    rows += [(k, f"{number(record, k):.6g}") for k in record if k not in skipped and number(record, k) is not None]
    return "".join(f"<tr><th>{html.escape(key)}</th><td>{value}</td></tr>" for key, value in rows)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


def _share(value: float | None, se: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if se is None else f"{value:.1%} <small>± {100 * se:.1f}</small>"


def _training(run: Run) -> str:
    parts = []
    if len(run.train) < 2:
        parts.append(_missing(f"Training records in metrics.jsonl: {len(run.train)}. Curves need two."))
    else:
        parts.append(f'<div class="curves">{"".join(training_curves(run.train))}</div>')
    if run.unreadable:
        parts.append(_missing(f"Lines of metrics.jsonl that cannot be read and were left out: {run.unreadable}."))
    return "\n".join(parts)


def _pictures(run: Run) -> str:
    if not run.previews:
        return _missing("No pictures in preview/.")
    return "\n".join(_picture(path) for path in run.previews)


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(path.stem.replace("_", " "))
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _configuration(run: Run) -> str:
    if not run.config_text:
        return _missing("No config.yaml in the run folder.")
    return f"<details><summary>config.yaml</summary><pre>{html.escape(run.config_text)}</pre></details>"


_STYLE = """
:root { --paper: #fbfbf9; --ink: #1b1f24; --soft: #5c6570; --line: #dddfe2; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e8eaed; --soft: #9aa3ad; --line: #343a41; --card: #1c2024; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 56px 28px 40px; }
h1 { font-size: clamp(34px, 5vw, 52px); line-height: 1.1; margin: 0 0 10px; letter-spacing: -0.02em;
  overflow-wrap: anywhere; }
h2 { font-size: 22px; margin: 56px 0 16px; padding-top: 20px; border-top: 1px solid var(--line); }
.kicker { margin: 0 0 6px; color: var(--soft); font-size: 14px; }
.lead { margin: 0; color: var(--soft); font-size: 18px; }
.missing { color: var(--soft); font-style: italic; }
.tiles { list-style: none; display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 16px;
  margin: 32px 0 0; padding: 0; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  display: flex; flex-direction: column; }
.tiles b { font-size: 32px; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
small, caption span, figcaption span { color: var(--soft); font-weight: 400; font-size: 13.5px; }
.scroll { overflow-x: auto; margin: 0 0 28px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 8px; }
th, td { text-align: right; padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; }
th:first-child { text-align: left; padding-left: 0; }
.head th { color: var(--soft); font-size: 13.5px; }
.head th:nth-child(2) { text-align: left; }
td:nth-child(2):not(:last-child) { width: 40%; min-width: 140px; }
.bar { position: relative; height: 14px; border-radius: 3px; background: var(--line); }
.bar i { position: absolute; top: 0; left: 0; height: 100%; border-radius: 3px; }
.bar i.tick { top: -4px; width: 2px; height: 22px; margin-left: -1px; background: var(--ink); border-radius: 0; }
.bar i.dot { background: none; border-left: 2px dotted var(--ink); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 20px; }
figure { margin: 0 0 20px; }
.curves figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px 8px; }
figcaption { margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
img { display: block; max-width: 100%; margin: 0 auto; border-radius: 10px; border: 1px solid var(--line); }
img + figcaption { text-align: center; color: var(--soft); font-size: 14px; margin-top: 6px; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--soft);
  font-size: 13.5px; }
@media (max-width: 700px) { .head th:nth-child(2), td:nth-child(2):not(:last-child) { display: none; } }
@media print { main { padding: 0; } figure, .tiles li { break-inside: avoid; } }
"""
