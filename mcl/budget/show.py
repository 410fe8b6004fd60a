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
    b, supervised = budget, budget["supervised"]
    head = (
        f"{b['name']}: {b['backbone']}, {b['compute']}, {b['precision']}, {b['epochs']} epochs, "
        f"{b['images_per_gpu']} images per GPU and step, {b['gpus']} GPU{'s' if b['gpus'] > 1 else ''}\n"
        f"{b['gflop_per_image']:.1f} GFLOP per image, {b['ratio_to_supervised']:.2f} times a step of "
        f"supervised {supervised['model']} at 224 px ({supervised['gflop_per_image']:.1f})"
    )
    sections = [head, _parts(b), _stages(b), _memory(b), _times(b)]
    if b["gpus"] > 1:
        sections += [_exchanges(b), _scales(b)]
    return "\n\n".join(sections)


def _parts(b: dict[str, Any]) -> str:
    rows = []
    for part, p in b["parts"].items():
        both = p["forward"] + p["backward"]
        rows.append(
            f"{part} | {p['forward']:.2f} | {p['backward']:.2f} | {both:.2f} | {both / b['gflop_per_image']:.1%} | "
            f"{p['parameters'] / 1e6:.1f} | {p['saved_bytes'] / _GB:.2f}"
        )
    return _table(
        "GFLOP per image | forward | backward | both | share | M parameters | GB saved",
        rows,
        "2 per multiply-add of convolutions and matrix products; nothing else is counted",
    )


def _stages(b: dict[str, Any]) -> str:
    rows = [
        f"{_span(s)} | {s['cells']} | {s['canvas']} | {s['gflop_per_image']:.1f} | {s['ratio_to_supervised']:.2f} | "
        f"{s['saved_bytes'] / _GB:.2f}"
        for s in b["stages"]
    ]
    return _table("epochs | cells | canvas, px | GFLOP per image | x supervised | GB saved", rows)


def _memory(b: dict[str, Any]) -> str:
    return _table(
        "GB per GPU |",
        [f"{name.replace('_', ' ')} | {size / _GB:.2f}" for name, size in b["memory"].items()],
        f"with {b['images_per_gpu']} images on each of {b['gpus']} GPUs (--gpus); the hours below assume that it fits.",
        "Activations are what autograd saves, canvases what the loader holds; workspaces and fragmentation come on top",
    )


def _times(b: dict[str, Any]) -> str:
    if not b["time"]:
        return f"no hours: no throughput in {b['precision']} has been published, and this run has measured none yet"
    rows = [
        f"{row['hardware']}, {row['kind']} | {row['gpus']} | {row['images_per_s']:,.0f} | {row['hours']:,.1f} | "
        f"{row['gpu_hours']:,.0f} | {row['loader_images_per_s_per_gpu']:,.0f} | "
        f"{_optional(row['gate_share'], '.0%')} | {_optional(row['cpu_cores_per_gpu'], '.1f')}"
        for row in b["time"]
    ]
    gate, cpu = b["loader"]["gate"], b["loader"]["cpu"]
    notes = [
        f"{EPOCHS} epochs of ImageNet. Estimates take the FLOP/s that supervised ResNet-50 reached on that",
        f"hardware in {b['precision']} or alike, where that was published, and nodes of 8 GPUs that do not slow each",
        "other down:",
        *dict.fromkeys(f"  {row['hardware']}, {row['kind']}: {row['source']}" for row in b["time"]),
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
    header = " | GPUs | images/s | hours | GPU-hours | loader: images/s/GPU | of DALI's gate | CPU cores/GPU"
    return _table(header, rows, *notes)


def _optional(value: float | None, kind: str) -> str:
    return "" if value is None else format(value, kind)


def _exchanges(b: dict[str, Any]) -> str:
    per_step = b["communication"]["per_step"]
    return _table(
        "communication per step | GPUs | calls | kB | CPUs | kB",
        [
            f"{e['purpose']} | {e['operation']} | {e['calls']} | {e['bytes'] / 1e3:,.2f} | "
            f"{other['operation']} | {other['bytes'] / 1e3:,.2f}"
            for e, other in zip(per_step["cuda"], per_step["cpu"], strict=True)
        ],
        "counted: what one process hands over; on GPUs BatchNorm is PyTorch's SyncBatchNorm, on CPUs ours",
    )


def _scales(b: dict[str, Any]) -> str:
    communication = b["communication"]
    if not communication["scales"]:
        return f"no efficiency at scale: no throughput in {b['precision']} has been published"
    times = [f"{what}_s" for what in ("compute", "gradients", "targets", "batchnorm", "exposed")]
    return _table(
        "ms per step | nodes | GPUs | images | compute | gradients | targets | BatchNorm | not hidden | efficiency",
        [
            f"{s['hardware']}, estimate | {s['nodes']} | {s['gpus']} | {s['global_batch']:,} | "
            f"{' | '.join(f'{1e3 * s[time]:.1f}' for time in times)} | {s['efficiency']:.1%}"
            for s in communication["scales"]
        ],
        f"{b['images_per_gpu']} images per GPU. Gradients are hidden by backward, all but the last bucket; targets by",
        "forward; BatchNorm by nothing. Links at full rate, GB/s, of a GPU within its node and of a node to others:",
        *(
            f"  {k['hardware']}: {k['within_gb_per_s']:g} and {k['between_gb_per_s']:g} ({k['source']})"
            for k in communication["links"]
        ),
        f"  latency: {communication['latency']}",
    )


def _table(header: str, rows: Sequence[str], *notes: str) -> str:
    """Cells, separated by bars, in aligned columns, the first to the left, numbers to the right; below them notes."""
    cells = [[cell.strip() for cell in row.split("|")] for row in [header, *rows]]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = []
    for name, *numbers in cells:
        lines.append("  ".join([name.ljust(first), *map(str.rjust, numbers, others)]).rstrip())
    return "\n".join([*lines, *notes])


def check_picture(path: Path) -> None:
    """Raises ConfigError where :func:`plot` could not write."""
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
