"""Curves of a run's records as inline SVG, for a page that gives them their text colour and font."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mcl.records.preview import PALETTE

Record = Mapping[str, Any]
FloatSeries = np.ndarray[Any, np.dtype[np.float64]]

POINTS = 400
"""Points of a curve; longer series are averaged down to as many."""

_INK = "#010203"  # stands for the page's text colour in a figure, until it becomes currentColor
_GRID = "#040506"


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


def number(record: Record, key: str) -> float | None:
    """A number of a record; None where it is missing or something else."""
    value = record.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def numbers(record: Record, key: str) -> list[float]:
    """A list of numbers of a record; empty where it is missing or something else."""
    value = record.get(key)
    if isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return [float(v) for v in value]
    return []


def at(values: Sequence[float], i: int) -> float | None:
    """An element; None past the end."""
    return values[i] if i < len(values) else None


def training_curves(train: Sequence[Record]) -> list[str]:
    """Inline SVG figures of training records: loss, cosines, schedules and speed; at least two records."""
    x = _series(train, "epoch")
    label = "epoch"
    if not np.isfinite(x).all():
        x, label = _series(train, "step"), "step"
    levels = max(len(numbers(r, "positive")) for r in train)
    positive = [Line(_nth(train, "positive", i), PALETTE[i % len(PALETTE)], name=f"level {i}") for i in range(levels)]
    negative = [Line(_nth(train, "negative", i), PALETTE[i % len(PALETTE)], style="--") for i in range(levels)]
    loss = Panel("loss", [Line(_series(train, "loss"), PALETTE[0])])
    cosine = Panel("cosine", positive + negative)
    lr = Panel("learning rate", [Line(_series(train, "lr"), _INK)])
    ema = Panel("EMA momentum", [Line(_series(train, "ema"), _INK)])
    speed = Panel("images / s", [Line(_series(train, "images_per_s"), PALETTE[0])], from_zero=True)
    wait = Panel("data wait, %", [Line(100 * _series(train, "data_wait"), PALETTE[1])], from_zero=True)
    with_whom = "solid: with their own image; dashed: with the others"
    return [
        _figure("Loss", "", x, label, [loss]),
        _figure("Cosine of tiles and targets", with_whom, x, label, [cosine]),
        _figure("Schedules", "", x, label, [lr, ema]),
        _figure("Speed", "", x, label, [speed, wait]),
    ]


def _series(train: Sequence[Record], key: str) -> FloatSeries:
    values = [number(r, key) for r in train]
    return np.array([math.nan if v is None else v for v in values])


def _nth(train: Sequence[Record], key: str, i: int) -> FloatSeries:
    values = [at(numbers(r, key), i) for r in train]
    return np.array([math.nan if v is None else v for v in values])


def _thinned(values: FloatSeries) -> FloatSeries:
    """Means of equal stretches, at most :data:`POINTS`."""
    stretch = -(-len(values) // POINTS)
    whole = len(values) // stretch * stretch
    parts = values[:whole].reshape(-1, stretch).mean(1)
    return np.append(parts, values[whole:].mean()) if whole < len(values) else parts


def _figure(title: str, note: str, x: FloatSeries, x_label: str, panels: Sequence[Panel]) -> str:
    """Panels above each other, as inline SVG that takes its text colour and font from the page."""
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.labelsize": 10}
    colours: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK
    )
    with mpl.rc_context({**style, **colours}):
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, panel in zip(axes, panels, strict=True):
            _draw(ax, _thinned(x), panel)
        axes[-1].set_xlabel(x_label)
        figure.align_ylabels(list(axes))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    caption = f"<b>{html.escape(title)}</b>" + (f" <span>{html.escape(note)}</span>" if note else "")
    return f"<figure><figcaption>{caption}</figcaption>{_inline(buffer.getvalue(), title)}</figure>"


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


def _inline(svg: str, title: str) -> str:
    """Matplotlib's SVG without what only a file needs, and with the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    svg = re.sub(r'\sid="\w+_\d+"', "", svg)  # would repeat from figure to figure
    svg = re.sub(r"font:\s*([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
