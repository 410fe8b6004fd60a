"""Horizontal bars of images per second, for a page about 830 px wide."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.loaders.chart import INK, OTHERS, OURS, rate


@dataclass(frozen=True)
class Bar:
    """One contender."""

    name: str  # may have two lines
    images_per_s: float
    note: str  # follows the rate
    ours: bool


def draw(title: str, bars: Sequence[Bar], path: Path) -> None:
    """Writes the chart, the first bar on top."""
    figure = Figure(figsize=(8.3, 0.6 + 0.45 * len(bars)), dpi=200, layout="constrained")
    ax = figure.subplots()
    longest = max(bar.images_per_s for bar in bars)
    for y, bar in enumerate(bars):
        ax.barh(y, bar.images_per_s, 0.7, color=OURS if bar.ours else OTHERS)
        label = f"{rate(bar.images_per_s)}   {bar.note}"
        ax.text(bar.images_per_s + longest * 0.01, y, label, va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=10, color=INK)
    ax.set_xlim(0, longest * 2.5)  # room for the longest note
    ax.set_ylim(len(bars) - 0.5, -0.5)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    figure.savefig(path)
