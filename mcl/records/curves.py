"""Curves of a run's records as inline SVG, which takes text colour and font from the page."""

import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mcl.records.metrics import scores
from mcl.records.preview import PALETTE
from mcl.records.tensorboard import NAMES

Record = Mapping[str, Any]
FloatSeries = np.ndarray[Any, np.dtype[np.float64]]

_VARIETY = "a collapse takes the deviation to 0 and the effective rank to 1"

POINTS = 400
"""Maximum number of points of a curve; longer series are averaged."""

_INK = "#010203"  # placeholder for the page's text colour, replaced by currentColor
_GRID = "#040506"
_STYLE = {
    **{"svg.fonttype": "none", "font.size": 10, "axes.labelsize": 10},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
}


@dataclass(frozen=True)
class Line:
    """One series. Its name is in the legend unless it starts with an underscore."""

    values: FloatSeries
    colour: str
    name: str = "_"
    style: str = "-"


Panels = Mapping[str, Sequence[Line]]
"""Panels of a figure, from top to bottom: their lines, by the label of the vertical axis."""


def number(record: Record, key: str, i: int | None = None) -> float | None:
    """A number of a record, or the i-th number of a list; None if it is missing or not a number."""
    value: Any = record.get(key)
    if i is not None:
        value = value[i] if i < length(record, key) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def length(record: Record, key: str) -> int:
    """Length of a list in a record; 0 if it is missing or not a list."""
    value = record.get(key)
    return len(value) if isinstance(value, list) else 0


def training_curves(train: Sequence[Record]) -> list[tuple[str, str, Markup]]:
    """Curves of loss, scores, schedules and speed: (title, note, inline SVG). Needs at least two training records."""

    series = functools.partial(_series, train)
    x_label, x = _abscissa(train)

    def levels(key: str, style: str = "-") -> list[Line]:
        count = max(length(record, key) for record in train)
        name = "level {}" if style == "-" else "_"
        return [Line(series(key, i), PALETTE[i % len(PALETTE)], name.format(i), style) for i in range(count)]

    panels: dict[str, list[Line]] = {}
    for name in dict.fromkeys(name for record in train for name in scores(record)):
        of_cosine = name in ("positive", "negative")
        panels.setdefault("cosine" if of_cosine else name, []).extend(levels(name, "--" if name == "negative" else "-"))
    schedules = {"learning rate": [Line(series("lr"), _INK)], "EMA momentum": [Line(series("ema"), _INK)]}
    speed = {
        "images / s": [Line(series("images_per_s"), PALETTE[0])],
        "data wait, %": [Line(100 * series("data_wait"), PALETTE[1])],
    }
    variety = {"std of embeddings": levels("embedding_std"), "rank of targets": levels("target_rank")}
    variety = {label: lines for label, lines in variety.items() if lines}
    with_whom = "solid: with their own image; dashed: with the others" if "cosine" in panels else ""
    title = f"{' and '.join(panels).capitalize()} of tiles"
    return [
        ("Loss", "", _svg("Loss", x, x_label, {"loss": [Line(series("loss"), PALETTE[0])]})),
        *([(title, with_whom, _svg("Scores", x, x_label, panels))] if panels else []),
        *([("Variety", _VARIETY, _svg("Variety", x, x_label, variety, from_zero=True))] if variety else []),
        ("Schedules", "", _svg("Schedules", x, x_label, schedules)),
        ("Speed", "", _svg("Speed", x, x_label, speed, from_zero=True)),
    ]


def score_curves(evaluations: Sequence[Record]) -> list[tuple[str, str, Markup]]:
    """Curves of every evaluation that the run did at several steps, by split; returns as :func:`training_curves`."""
    kinds: dict[tuple[str, str], dict[float, Record]] = {}
    for record in evaluations:
        if record.get("by") == "run":
            kinds.setdefault((str(record.get("name")), str(record.get("split"))), {})[record["step"]] = record
    curves = []
    for (name, split), by_step in kinds.items():
        records = [by_step[step] for step in sorted(by_step)]
        if len(records) < 2:
            continue
        x_label, x = _abscissa(records)
        lines = []
        for i in range(max(length(record, "levels") for record in records)):
            colour = PALETTE[i % len(PALETTE)]
            lines += [
                Line(100 * _series(records, "levels", i), colour, f"level {i}"),
                Line(100 * _series(records, "random", i), colour, style=":"),
            ]
        if not lines:
            lines = [
                Line(100 * _series(records, "accuracy"), PALETTE[0], "trained"),
                Line(100 * _series(records, "target"), PALETTE[1], "momentum network"),
                Line(100 * _series(records, "random"), _INK, style=":"),
            ]
        title = f"{NAMES.get(name, name)}, {'held-out' if split == 'val' else 'training'} images"
        curves.append(
            (
                title,
                "dotted: random weights",
                _svg(title, x, x_label, {"mAP, %" if name == "svm" else "top-1, %": lines}),
            )
        )
    return curves


def _series(records: Sequence[Record], key: str, i: int | None = None) -> FloatSeries:
    """A number of each record; NaN if it is missing."""
    values = [number(record, key, i) for record in records]
    return np.array([math.nan if value is None else value for value in values])


def _abscissa(records: Sequence[Record]) -> tuple[str, FloatSeries]:
    """Label and values of the horizontal axis: epochs if all records have them, otherwise steps."""
    label = "epoch" if np.isfinite(_series(records, "epoch")).all() else "step"
    return label, _series(records, label)


def _thinned(values: FloatSeries) -> FloatSeries:
    """Means over at most :data:`POINTS` parts of equal length."""
    return np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))])


def _svg(salt: str, x: FloatSeries, x_label: str, panels: Panels, from_zero: bool = False) -> Markup:
    """Inline SVG that takes text colour and font from the page; `salt` makes its ids unique in the page."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (label, lines) in zip(axes, panels.items(), strict=True):
            _draw(ax, x, label, lines, from_zero)
        axes[-1].set_xlabel(x_label)
        figure.align_ylabels(list(axes))
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r'\s(xmlns(:\w+)?="[^"]*"|id="[\w.]+_\d+")', "", svg)  # such ids would repeat from figure to figure
    return Markup(svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)"))


def _draw(ax: Axes, x: FloatSeries, label: str, lines: Sequence[Line], from_zero: bool) -> None:
    for line in lines:
        ax.plot(_thinned(x), _thinned(line.values), line.style, color=line.colour, linewidth=1.6, label=line.name)
    ax.set_ylabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    ax.ticklabel_format(axis="y", useOffset=False)
    if not any(np.isfinite(line.values).any() for line in lines):
        ax.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=ax.transAxes)
    elif from_zero:
        ax.set_ylim(bottom=0)
    if named := sum(not line.name.startswith("_") for line in lines):
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=named, frameon=False, handlelength=1.2)
