"""Charts for a page about 830 px wide: bars of images per second, and points by seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def points(title: str, rows: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Writes a chart of a point per seed, the seeds of a row one below the other, and a line at their mean.

    Args:
        rows: by name, a value for each seed.
    """
    seeds = sorted({seed for values in rows.values() for seed in values})
    figure, ax = _axes(title, list(rows), 0.9 + 0.45 * len(rows))
    for row, (name, values) in enumerate(rows.items()):
        colour, mean = OURS if name.startswith("mcl") else OTHERS, statistics.fmean(values.values())
        heights = [row + 0.1 * (seeds.index(seed) - (len(seeds) - 1) / 2) for seed in values]
        ax.plot(list(values.values()), heights, "o", color=colour, markersize=5)
        ax.plot([mean] * 2, [row - 0.35, row + 0.35], color=colour, linewidth=2)
        ax.text(max(values.values()), row, f"   mean {mean:.1f}", va="center", fontsize=9, color=INK)
    ax.tick_params(axis="x", labelsize=9, colors=INK)
    ax.grid(axis="x", color=OTHERS, alpha=0.3)
    ax.set_axisbelow(True)
    ax.margins(x=0.1)
    ax.spines[["left", "right", "top"]].set_visible(False)
    figure.savefig(path)


def _axes(title: str, names: Sequence[str], height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.3, height), dpi=200, layout="constrained")
    ax = figure.subplots()
    ax.set_yticks(range(len(names)), names, fontsize=10, color=INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    return figure, ax
