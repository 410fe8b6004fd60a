"""A point per cell, for a page about 830 px wide."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common import Result
from benchmarks.loaders.chart import INK, OTHERS, OURS

_MEASURE = "box AP50"
_APART = 0.1  # of neighbouring seeds, of a row


def draw(results: Sequence[Result], path: Path) -> None:
    """Writes the chart: a row per method, its seeds one below the other and a line at their mean."""
    methods = [r for r in results if r["kind"] == "method"]
    seeds = sorted({seed for r in methods for seed in r["seeds"]})
    figure = Figure(figsize=(8.3, 0.9 + 0.45 * len(methods)), dpi=200, layout="constrained")
    ax = figure.subplots()
    for y, r in enumerate(methods):
        colour = OURS if r["name"].startswith("mcl") else OTHERS
        rows = [y + _APART * (seeds.index(seed) - (len(seeds) - 1) / 2) for seed in r["seeds"]]
        ax.plot(r[_MEASURE]["values"], rows, "o", color=colour, markersize=5)
        mean = r[_MEASURE]["mean"]
        ax.plot([mean, mean], [y - 0.35, y + 0.35], color=colour, linewidth=2)
        ax.annotate(
            f"mean {mean:.1f}",
            (max(r[_MEASURE]["values"]), y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    ax.set_yticks(range(len(methods)), [r["name"] for r in methods], fontsize=10, color=INK)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=9, colors=INK)
    ax.grid(axis="x", color=OTHERS, alpha=0.3)
    ax.set_axisbelow(True)
    ax.margins(x=0.1)
    ax.spines[["left", "right", "top"]].set_visible(False)
    title = "Box AP50 on the cut-out set: a point per seed, a line at the mean"
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    figure.savefig(path)
