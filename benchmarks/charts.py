"""Charts for a page about 830 px wide: bars of images per second, and curves over a cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.common import digits

OURS, OTHERS, INK = "#0072B2", "#9AA3AD", "#1B1F24"
_GROUP = 0.8  # height of all bars of a row, as a fraction of the row
_CHARACTER = 0.011  # width of a character in a label, as a fraction of the axes


@dataclass(frozen=True)
class Bar:
    """A rate, and the note that is printed after it."""

    images_per_s: float
    note: str
    ours: bool


def bars(title: str, rows: Mapping[str, Sequence[Bar]], path: Path) -> None:
    """Writes a chart of horizontal bars, the first row on top.

    Args:
        rows: one or several bars, by name; a name may have two lines.
    """
    most = max(map(len, rows.values()))
    figure, ax = _axes(title, list(rows), 0.8 + 0.25 * len(rows) * (1 + most))
    end = 0.0
    for row, group in enumerate(rows.values()):
        height = _GROUP / len(group)
        for k, bar in enumerate(group):
            y = row - _GROUP / 2 + (k + 0.5) * height
            shade = 0.55 + 0.45 * (k + 1) / len(group)
            ax.barh(y, bar.images_per_s, height * 0.9, color=OURS if bar.ours else OTHERS, alpha=shade)
            label = f" {digits(bar.images_per_s)}   {bar.note}"
            ax.text(bar.images_per_s, y, label, va="center", fontsize=9, color=INK)
            end = max(end, bar.images_per_s / max(0.2, 1 - _CHARACTER * len(label)))
    ax.set_xlim(0, end)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    figure.savefig(path)


def curves(title: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, Any]]]], path: Path) -> None:
    """Writes a chart of panels side by side, a line with error bars for each name, over a logarithmic x.

    Args:
        panels: by title and name, points of x and an entry with ``mean``, ``low`` and ``high``, which may be None.
    """
    figure = Figure(figsize=(8.3, 3.4), dpi=200, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    names = sorted({name for lines in panels.values() for name in lines})
    for ax, (heading, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, name in enumerate(names):
            each = sorted(lines.get(name, ()), key=lambda point: point[0])
            x, means = [at * 1.04 ** (number - len(names) / 2) for at, _ in each], [entry["mean"] for _, entry in each]
            bars = [0.0 if entry["low"] is None else entry["mean"] - entry["low"] for _, entry in each]
            ax.errorbar(x, means, bars, color=f"C{number}", marker="o", markersize=4, capsize=3, label=name)
        ax.axhline(0, color=OTHERS, linewidth=1)
        ax.set_xscale("log")
        every = [x for points in lines.values() for x, _ in points]
        ax.set_xlim(min(every) / 1.3, max(every) * 1.3)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(heading, loc="left", fontsize=9, color=INK)
        ax.tick_params(labelsize=8, colors=INK)
        ax.spines[["right", "top"]].set_visible(False)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path)


def _axes(title: str, names: Sequence[str], height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.3, height), dpi=200, layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(names)), names, fontsize=10, color=INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    return figure, ax
