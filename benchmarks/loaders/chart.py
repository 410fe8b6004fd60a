"""Bars of images per second, for a page about 830 px wide."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.common import Result

NAMES = {
    "decode": "decoding alone\n(DALI)",
    "fused": "mcl, fused operator",
    "stock": "mcl, stock DALI",
    "released": "released recipe\n(Pillow, DataLoader)",
    "torchvision": "torchvision v2\n(DataLoader)",
    "lightly": "lightly\n(DataLoader)",
}
OURS, OTHERS, INK = "#0072B2", "#9AA3AD", "#1B1F24"
HEIGHT = 0.8
"""Of all bars of one contender, of 1."""


def rate(images_per_s: float) -> str:
    """Three digits or all before the point."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def draw(results: Sequence[Result], path: Path) -> None:
    """Writes the chart: a group per contender, in the order of the results, and a bar per number of threads."""
    contenders = list(dict.fromkeys(r["contender"] for r in results))
    threads = sorted({r["threads"] for r in results})
    bar = HEIGHT / len(threads)
    figure = Figure(figsize=(8.3, 0.9 + 0.28 * len(contenders) * (1 + len(threads))), dpi=200, layout="constrained")
    ax = figure.subplots()
    longest = max(r["images_per_s"] for r in results)
    for r in results:
        k = threads.index(r["threads"])
        y = contenders.index(r["contender"]) - HEIGHT / 2 + (k + 0.5) * bar
        colour = OURS if r["contender"] in ("fused", "stock") else OTHERS
        ax.barh(y, r["images_per_s"], bar * 0.9, color=colour, alpha=0.55 + 0.45 * (k + 1) / len(threads))
        label = f"{rate(r['images_per_s'])}   {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
        if "ratio" in r and r["contender"] != "released":
            label += f"   {r['ratio']:.1f}× released"
        ax.text(r["images_per_s"] + longest * 0.01, y, label, va="center", fontsize=9, color=INK)
    ax.set_yticks(range(len(contenders)), [NAMES[name] for name in contenders], fontsize=10, color=INK)
    ax.set_xlim(0, longest * 1.5)
    ax.set_ylim(len(contenders) - 0.5, -0.5)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("Unique images per second, eight augmented views each", loc="left", fontsize=11, color=INK)
    figure.savefig(path)
