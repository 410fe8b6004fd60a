"""Curves of a run's records as inline SVG, for a page that gives them their text colour and font."""

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

from mcl.records.preview import PALETTE

Record = Mapping[str, Any]
FloatSeries = np.ndarray[Any, np.dtype[np.float64]]

POINTS = 400
"""Points of a curve; longer series are averaged down to as many."""

_INK = "#010203"  # stands for the page's text colour in a figure, until it becomes currentColor
_GRID = "#040506"
_STYLE = {
    **{"svg.fonttype": "none", "font.size": 10, "axes.labelsize": 10},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
}


@dataclass(frozen=True)
class Curves:
    """A figure for the page."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Line:
    """One series; a name puts it into the legend."""

    values: FloatSeries
    colour: str
    name: str = ""
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    label: str  # of the vertical axis
    lines: Sequence[Line]
    from_zero: bool = False


def number(record: Record, key: str, i: int | None = None) -> float | None:
    """A number of a record, or the i-th one of a list; None where it is missing or something else."""
    value: Any = record.get(key)
    if i is not None:
        value = value[i] if i < length(record, key) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def length(record: Record, key: str) -> int:
    """Of a list in a record; 0 where it is missing or something else."""
    value = record.get(key)
    return len(value) if isinstance(value, list) else 0


def training_curves(train: Sequence[Record]) -> list[Curves]:
    """Loss, cosines, schedules and speed from training records; at least two of them."""

    def series(key: str, i: int | None = None) -> FloatSeries:
        values = [number(record, key, i) for record in train]
        return np.array([math.nan if value is None else value for value in values])

    label = "epoch" if np.isfinite(series("epoch")).all() else "step"
    x = series(label)
    colours = [PALETTE[i % len(PALETTE)] for i in range(max(length(record, "positive") for record in train))]
    positive = [Line(series("positive", i), colour, f"level {i}") for i, colour in enumerate(colours)]
    negative = [Line(series("negative", i), colour, style="--") for i, colour in enumerate(colours)]
    loss = Panel("loss", [Line(series("loss"), PALETTE[0])])
    cosine = Panel("cosine", positive + negative)
    lr = Panel("learning rate", [Line(series("lr"), _INK)])
    ema = Panel("EMA momentum", [Line(series("ema"), _INK)])
    speed = Panel("images / s", [Line(series("images_per_s"), PALETTE[0])], from_zero=True)
    wait = Panel("data wait, %", [Line(100 * series("data_wait"), PALETTE[1])], from_zero=True)
    with_whom = "solid: with their own image; dashed: with the others"
    return [
        _figure("Loss", "", x, label, [loss]),
        _figure("Cosine of tiles and targets", with_whom, x, label, [cosine]),
        _figure("Schedules", "", x, label, [lr, ema]),
        _figure("Speed", "", x, label, [speed, wait]),
    ]


def _thinned(values: FloatSeries) -> FloatSeries:
    """Means of equal stretches, at most :data:`POINTS`."""
    return np.array([part.mean() for part in np.array_split(values, min(POINTS, len(values)))])


def _figure(title: str, note: str, x: FloatSeries, x_label: str, panels: Sequence[Panel]) -> Curves:
    """Panels above each other."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": title}
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, _thinned(x), panel)
        axes[-1].set_xlabel(x_label)
        figure.align_ylabels(list(axes))
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return Curves(title, note, _inline(buffer.getvalue()))


def _draw(ax: Axes, x: FloatSeries, panel: Panel) -> None:
    for line in panel.lines:
        ax.plot(x, _thinned(line.values), line.style, color=line.colour, linewidth=1.6, label=line.name or None)
    ax.set_ylabel(panel.label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    ax.ticklabel_format(axis="y", useOffset=False)
    if not any(np.isfinite(line.values).any() for line in panel.lines):
        ax.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=ax.transAxes)
    elif panel.from_zero:
        ax.set_ylim(bottom=0)
    named = sum(bool(line.name) for line in panel.lines)
    if named:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=named, frameon=False, handlelength=1.2)


def _inline(svg: str) -> Markup:
    """Matplotlib's SVG without what only a file needs, and with the page's colours."""
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r'\s(xmlns(:\w+)?="[^"]*"|id="[\w.]+_\d+")', "", svg)  # such ids would repeat from figure to figure
    return Markup(svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)"))
