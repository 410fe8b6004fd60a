"""A budget for people: tables for the terminal, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mcl.budget.count import PARTS
from mcl.budget.hardware import EPOCHS
from mcl.config import ConfigError

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7")  # Okabe and Ito
_GRAY = "#8A939C"
_INK = "#1B1F24"
_GB = 1e9


def tables(budget: dict[str, Any]) -> str:
    """What :func:`mcl.budget.budget` returns, as text."""
    b = budget
    supervised = f"supervised {b['supervised']['model']} at 224 px"
    head = (
        f"{b['name']}: {b['backbone']}, {b['compute']}, {b['precision']}, {b['epochs']} epochs, "
        f"{b['images_per_gpu']} images per GPU and step, {b['gpus']} GPU{'s' if b['gpus'] > 1 else ''}\n"
        f"{b['gflop_per_image']:.1f} GFLOP per image, {b['ratio_to_supervised']:.2f} times a step of "
        f"{supervised} ({b['supervised']['gflop_per_image']:.1f})"
    )
    sections = [head, _parts(b), _stages(b), _memory(b), _times(b)]
    if b["gpus"] > 1:
        sections += [_exchanges(b), _scales(b)]
    return "\n\n".join(sections)


def _parts(b: dict[str, Any]) -> str:
    rows = []
    for part, p in b["parts"].items():
        both = p["forward"] + p["backward"]
        numbers = [f"{flops:.2f}" for flops in (p["forward"], p["backward"], both)]
        share, millions, saved = both / b["gflop_per_image"], p["parameters"] / 1e6, p["saved_bytes"] / _GB
        rows.append([part, *numbers, f"{share:.1%}", f"{millions:.1f}", f"{saved:.2f}"])
    header = ["GFLOP per image", "forward", "backward", "both", "share", "M parameters", "GB saved"]
    return _table(header, rows) + "\n2 per multiply-add of convolutions and matrix products; nothing else is counted"


def _stages(b: dict[str, Any]) -> str:
    rows = [
        [
            _span(s),
            *(str(s["cells"]), f"{s['canvas']}", f"{s['gflop_per_image']:.1f}", f"{s['ratio_to_supervised']:.2f}"),
            f"{s['saved_bytes'] / _GB:.2f}",
        ]
        for s in b["stages"]
    ]
    return _table(["epochs", "cells", "canvas, px", "GFLOP per image", "x supervised", "GB saved"], rows)


def _memory(b: dict[str, Any]) -> str:
    rows = [[name.replace("_", " "), f"{size / _GB:.2f}"] for name, size in b["memory"].items()]
    notes = [
        f"with {b['images_per_gpu']} images on each of {b['gpus']} GPUs (--gpus); the hours below assume that it fits.",
        "Activations are what autograd saves, canvases what the loader holds; workspaces and fragmentation come on top",
    ]
    return "\n".join([_table(["GB per GPU", ""], rows), *notes])


def _times(b: dict[str, Any]) -> str:
    if not b["time"]:
        return f"no hours: no throughput in {b['precision']} has been published, and this run has measured none yet"
    header = ["", "GPUs", "images/s", "hours", "GPU-hours", "loader: images/s/GPU", "of DALI's gate", "CPU cores/GPU"]
    rows = [
        [
            f"{row['hardware']}, {row['kind']}",
            *(str(row["gpus"]), f"{row['images_per_s']:,.0f}", f"{row['hours']:,.1f}", f"{row['gpu_hours']:,.0f}"),
            f"{row['loader_images_per_s_per_gpu']:,.0f}",
            "" if row["gate_share"] is None else f"{row['gate_share']:.0%}",
            "" if row["cpu_cores_per_gpu"] is None else f"{row['cpu_cores_per_gpu']:.1f}",
        ]
        for row in b["time"]
    ]
    gate, cpu = b["loader"]["gate"], b["loader"]["cpu"]
    sources = dict.fromkeys(f"  {row['hardware']}, {row['kind']}: {row['source']}" for row in b["time"])
    notes = [
        f"{EPOCHS} epochs of ImageNet. Estimates take the FLOP/s that supervised ResNet-50 reached on that",
        f"hardware in {b['precision']} or alike, where that was published, and nodes of 8 GPUs that do not slow each",
        "other down:",
        *sources,
        f"  DALI's gate: {gate['images_per_s']:,} images/s of one view of 224 px ({gate['source']}).",
        f"    An image costs up to {b['loader']['views']:.2f} such views here; above 100% the loader is too slow.",
        "    The gate had all those threads for one GPU: with fewer for each, less is reached.",
    ]
    if cpu:
        notes += [
            f"  CPU cores, to load without a GPU: {1e3 * cpu['decode_s']:.2f} core-ms to decode an image and "
            f"{1e3 * cpu['view_s']:.2f} for each of these views,",
            f"    measured with {cpu['views']:.2f} of them on {cpu['cpu']} ({cpu['source']}).",
        ]
    return "\n".join([_table(header, rows), *notes])


def _exchanges(b: dict[str, Any]) -> str:
    on_gpus, on_cpus = b["communication"]["per_step"]["cuda"], b["communication"]["per_step"]["cpu"]
    rows = [
        [
            e["purpose"],
            *(e["operation"], str(e["calls"]), f"{e['bytes'] / 1e3:,.2f}"),
            *(other["operation"], f"{other['bytes'] / 1e3:,.2f}"),
        ]
        for e, other in zip(on_gpus, on_cpus, strict=True)
    ]
    note = "counted: what one process hands over; on GPUs BatchNorm is PyTorch's SyncBatchNorm, on CPUs ours"
    return _table(["communication per step", "GPUs", "calls", "kB", "CPUs", "kB"], rows) + f"\n{note}"


def _scales(b: dict[str, Any]) -> str:
    communication = b["communication"]
    if not communication["scales"]:
        return f"no efficiency at scale: no throughput in {b['precision']} has been published"
    rows = [
        [
            f"{s['hardware']}, estimate",
            *(str(s["nodes"]), str(s["gpus"]), f"{s['global_batch']:,}"),
            *(f"{1e3 * s[f'{what}_s']:.1f}" for what in ("compute", "gradients", "targets", "batchnorm", "exposed")),
            f"{s['efficiency']:.1%}",
        ]
        for s in communication["scales"]
    ]
    header = ["ms per step", "nodes", "GPUs", "images"]
    header += ["compute", "gradients", "targets", "BatchNorm", "not hidden", "efficiency"]
    notes = [
        f"{b['images_per_gpu']} images per GPU. Gradients are hidden by backward, all but the last bucket; targets by",
        "forward; BatchNorm by nothing. Links at full rate, GB/s, of a GPU within its node and of a node to others:",
        *(
            f"  {k['hardware']}: {k['within_gb_per_s']:g} and {k['between_gb_per_s']:g} ({k['source']})"
            for k in communication["links"]
        ),
        f"  latency: {communication['latency']}",
    ]
    return "\n".join([_table(header, rows), *notes])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def check_picture(path: Path) -> None:
    """Raises ConfigError where :func:`plot` could not write."""
    if path.suffix != ".png":
        raise ConfigError(f"--plot: {path} must end in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: the folder {path.parent} does not exist")


def plot(budget: dict[str, Any], path: Path) -> None:
    """Writes a PNG: GFLOP per image by part, of every stage and on average, beside a supervised step."""
    supervised = budget["supervised"]
    bars = [(f"epochs {_span(s)}, {s['canvas']} px", s["parts"]) for s in budget["stages"]]
    if len(bars) > 1:
        mean = {part: p["forward"] + p["backward"] for part, p in budget["parts"].items()}
        bars.append((f"mean of {budget['epochs']} epochs", mean))
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(bars)), dpi=150, layout="constrained")
    ax = figure.subplots()
    ax.barh(0, supervised["gflop_per_image"], color=_GRAY)
    left = [0.0] * len(bars)
    places = range(1, len(bars) + 1)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [parts[part] for _, parts in bars]
        ax.barh(places, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate([supervised["gflop_per_image"], *left]):
        ratio = total / supervised["gflop_per_image"]
        label = f"{total:.1f} = {ratio:.2f} x" if place else f"{total:.1f}"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(label, (total, place), (5, 0), textcoords="offset points", va="center", color=_INK, bbox=paper)
    ax.axvline(supervised["gflop_per_image"], color=_GRAY, linewidth=1, linestyle=":", zorder=0)
    ax.set_yticks(range(len(bars) + 1), [f"supervised {supervised['model']}, 224 px", *(name for name, _ in bars)])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2 * max([supervised["gflop_per_image"], *left]))
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
