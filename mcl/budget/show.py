"""A budget as tables for the terminal, and as a picture."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from mcl.budget.count import PARTS
from mcl.config import ConfigError

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7")  # Okabe and Ito
_GRAY = "#8A939C"
_INK = "#1B1F24"


def tables(budget: dict[str, Any]) -> str:
    """The result of :func:`mcl.budget.budget` as text."""
    environment = Environment(loader=PackageLoader("mcl"), trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"columns": _columns, "f": _formatted}
    return environment.get_template("budget.txt").render(b=budget, span=_span).rstrip("\n")


def _columns(text: str) -> str:
    """Aligns the cells of lines, which bars separate: the first column to the left, the others to the right."""
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    rows = ["  ".join([name.ljust(first), *map(str.rjust, numbers, others)]) for name, *numbers in cells]
    return "".join(f"{row.rstrip()}\n" for row in rows)


def _formatted(value: float | None, kind: str) -> str:
    return "" if value is None else format(value, kind)


def check_picture(path: Path) -> None:
    """Raises ConfigError if :func:`plot` cannot write the file."""
    if path.suffix != ".png":
        raise ConfigError(f"--plot: {path} must end in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: the folder {path.parent} does not exist")


def plot(budget: dict[str, Any], path: Path) -> None:
    """Writes a PNG: GFLOP per image by part, of every stage and on average, beside a supervised step."""
    model, supervised = budget["supervised"]["model"], budget["supervised"]["gflop_per_image"]
    bars = [(f"supervised {model}, 224 px", {model: supervised})]
    bars += [(f"epochs {_span(s)}, {s['canvas']} px", s["parts"]) for s in budget["stages"]]
    if len(budget["stages"]) > 1:
        mean = {part: p["forward"] + p["backward"] for part, p in budget["parts"].items()}
        bars.append((f"mean of {budget['epochs']} epochs", mean))
    figure = Figure(figsize=(9, 1.1 + 0.5 * len(bars)), dpi=150, layout="constrained")
    ax = figure.subplots()
    totals = [0.0] * len(bars)
    for part, colour in [(model, _GRAY), *zip(PARTS, _COLOURS, strict=True)]:
        widths = [parts.get(part, 0.0) for _, parts in bars]
        drawn = ax.barh(range(len(bars)), widths, left=totals, color=colour, label=part if part in PARTS else None)
        totals = [start + width for start, width in zip(totals, widths, strict=True)]
    labels = [f"{supervised:.1f}", *(f"{total:.1f} = {total / supervised:.2f} x" for total in totals[1:])]
    ax.bar_label(drawn, labels, padding=5, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.axvline(supervised, color=_GRAY, linewidth=1, linestyle=":", zorder=0)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * max(totals))
    ax.set_xlabel("GFLOP per image and training step (2 per multiply-add)")
    ax.set_title(budget["name"], loc="left", color=_INK)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, handlelength=1, columnspacing=1.2)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot: {path} cannot be written ({error.strerror}); name another file") from None


def _span(stage: dict[str, Any]) -> str:
    return f"{stage['first_epoch']} to {stage['first_epoch'] + stage['epochs'] - 1}"
