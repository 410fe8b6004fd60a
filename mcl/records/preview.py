"""Pictures of the network's input and output: montages with their tiles, and feature maps as colours.

Pure functions compute the layout of a picture of montages, then it is drawn. Coordinates are pixels of the picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import STRIDE
from mcl.config import AugmentConfig, ConfigError

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Colour of each level; distinguishable with any colour vision (Okabe and Ito)."""

PAPER, INK, GRAY = "#FFFFFF", "#1B1F24", "#5C6570"
MARGIN, GUTTER, HEADING = 40, 200, 46  # around the picture, between the views, above a row of canvases
HEADER, MIN_VIEW, MAX_VIEW = 230, 920, 1048  # height of title and legend; minimum and maximum width of a view
GAP = 8  # between canvases of level 0; for other levels three times as much, since canvases are twice as large
SMALL, LARGE = 256, 512  # maximum side of canvases of level 0, and of other levels
THIN, THICK = 2, 6  # outline of a tile, and of a tile of the focus image

Point = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """A canvas in the picture."""

    row: int  # row of MontageBatch.pixels
    level: int
    x: int
    y: int
    side: int
    scale: float  # picture pixels per canvas pixel

    def box(self, corners: Sequence[float]) -> tuple[int, int, int, int]:
        """Converts x1, y1, x2, y2 in canvas pixels to the first and last column and row in the picture."""
        x1, y1, x2, y2 = (round(c * self.scale) for c in corners)
        return self.x + x1, self.y + y1, self.x + x2 - 1, self.y + y2 - 1


@dataclass(frozen=True)
class Link:
    """A curve from a tile of the focus image to its target, the full image in the other view."""

    level: int
    tile: Point
    target: Point


@dataclass(frozen=True)
class Layout:
    """Positions of the canvases of both views, those with the focus image next to the gutter, and of the links."""

    width: int
    height: int
    views: tuple[tuple[Placed, ...], ...]
    links: tuple[Link, ...]


def montages(query: MontageBatch, key: MontageBatch, augment: AugmentConfig, path: Path, focus: int = 0) -> None:
    """Writes a PNG of canvases of every level of both views, with every tile outlined in its level's colour.

    Args:
        query: view shown on the left.
        key: view shown on the right.
        augment: its mean and std undo the normalisation.
        path: file to write; missing folders are made.
        focus: image of the batch whose tiles are linked to their targets; it is shown at every level.

    Raises:
        ValueError: `focus` is not in the batch.
        OSError: the file cannot be written; the message names it.
    """
    if not 0 <= focus < len(query.index):
        raise ValueError(f"focus: {focus} is not one of the {len(query.index)} images of the batch")
    layout = arrange(query, key, focus)
    picture = Image.new("RGB", (layout.width, layout.height), PAPER)
    _draw_header(picture, query, focus)
    for name, batch, canvases in zip(("Query view", "Key view"), (query, key), layout.views, strict=True):
        _draw_view(picture, name, batch, canvases, augment, focus)
    _draw_links(picture, layout.links)
    _save(picture, path)


def arrange(query: MontageBatch, key: MontageBatch, focus: int) -> Layout:
    """Chooses and places canvases: one row per level, as many as fit, first those with the focus image."""
    canvas, rows = STRIDE * query.cells, []
    for level, total in enumerate(query.canvas_counts):
        side = _shown_side(canvas, LARGE if level else SMALL)
        gap = 3 * GAP if level else GAP
        rows.append((side, gap, min((MAX_VIEW + gap) // (side + gap), total)))
    half = max(MIN_VIEW, *(count * (side + gap) - gap for side, gap, count in rows))
    inner = MARGIN + half, MARGIN + half + GUTTER  # edges of the gutter
    views = []
    for view, batch in enumerate((query, key)):
        placed, y = [], HEADER + HEADING
        for level, (side, gap, count) in enumerate(rows):
            for i, row in enumerate(_choose(batch, level, focus, count)):
                offset = i * (side + gap)
                x = inner[1] + offset if view else inner[0] - side - offset
                placed.append(Placed(row, level, x, y, side, side / canvas))
            y += side + HEADING
        views.append(tuple(placed))
    links = (*_links(query, views[0], views[1], focus, 1), *_links(key, views[1], views[0], focus, 0))
    return Layout(2 * (MARGIN + half) + GUTTER, y - HEADING + MARGIN, tuple(views), links)


def _shown_side(side: int, limit: int) -> int:
    """Enlarges by the largest whole factor that fits, so that pixels stay square, or shrinks to the limit."""
    return side * (limit // side) if side <= limit else limit


def _choose(batch: MontageBatch, level: int, focus: int, count: int) -> list[int]:
    """Rows of the canvases to show; those with the focus image are first."""
    tiles = batch.tiles(level)
    rows = [int(row) for row in batch.boxes[tiles, 0]]
    hits = sorted({row for row, source in zip(rows, batch.tile_images[tiles].tolist(), strict=True) if source == focus})
    return (hits + sorted(set(rows) - set(hits)))[:count]


def _focus_boxes(batch: MontageBatch, canvas: Placed, focus: int) -> list[tuple[int, int, int, int]]:
    """Tiles of the focus image on a placed canvas."""
    shown = (batch.boxes[:, 0] == canvas.row) & (batch.tile_images == focus)
    return [canvas.box(corners) for corners in batch.boxes[shown, 1:].tolist()]


def _links(
    batch: MontageBatch, canvases: Sequence[Placed], others: Sequence[Placed], focus: int, facing: int
) -> Iterator[Link]:
    """Links from the tiles of one view; `facing` is 1 if the other view is to the right, 0 if it is to the left."""
    target = others[0]  # the focus image at level 0
    for canvas in canvases:
        y = target.y + target.side * (canvas.level + 1) / (len(batch.ratios) + 1)  # one height per level
        for x1, y1, x2, y2 in _focus_boxes(batch, canvas, focus):
            tile = (x2 if facing else x1), (y1 + y2) / 2
            yield Link(canvas.level, tile, (target.x if facing else target.x + target.side - 1, y))


def curve(link: Link, points: int = 64) -> list[Point]:
    """Points along a link: a straight line to the gutter, so that few tiles are covered, then a cubic to the target."""
    (x0, y0), (x2, y2) = link.tile, link.target
    x1 = x2 - GUTTER if x2 > x0 else x2 + GUTTER
    t = np.linspace(0, 1, points)
    x = x1 * (1 - t) ** 3 + x2 * t**3 + 3 * t * (1 - t) * (x1 + x2) / 2
    y = y0 * (1 - t) ** 2 * (1 + 2 * t) + y2 * t**2 * (3 - 2 * t)
    return [link.tile, *zip(x.tolist(), y.tolist(), strict=True)]


def _draw_header(picture: Image.Image, batch: MontageBatch, focus: int) -> None:
    draw = ImageDraw.Draw(picture)
    canvas, images = STRIDE * batch.cells, len(batch.index)
    _text(draw, (MARGIN, MARGIN - 4), f"Montages of step {batch.step}", 44)
    _text(
        draw,
        (MARGIN, MARGIN + 58),
        f"{images} images, canvases of {canvas} px. Every tile has to find its own image among the full images of the "
        f"other view. Lines show this for image {focus} (number {int(batch.index[focus])} of the data set).",
        26,
        GRAY,
    )
    x, y = MARGIN, MARGIN + 106
    for level, ratio in enumerate(batch.ratios):
        draw.rounded_rectangle((x, y, x + 28, y + 28), 6, fill=PALETTE[level])
        label = f"Level {level}:  {ratio} x {ratio} tiles of {canvas // ratio} px, {pyramid_name(ratio)}"
        _text(draw, (x + 38, y), label, 24)
        x += 38 + round(draw.textlength(label, font=ImageFont.load_default(24))) + 44


def _draw_view(
    picture: Image.Image,
    name: str,
    batch: MontageBatch,
    canvases: Sequence[Placed],
    augment: AugmentConfig,
    focus: int,
) -> None:
    draw = ImageDraw.Draw(picture)
    left = min(canvas.x for canvas in canvases)
    _text(draw, (left, HEADER - 34), name, 34)
    shown = to_rgb(batch.pixels[[canvas.row for canvas in canvases]], augment)
    first = 0
    for level, total in enumerate(batch.canvas_counts):
        row = sorted((c for c in canvases if c.level == level), key=lambda c: c.x)
        numbers = ", ".join(str(c.row - first) for c in row)
        label = f"Level {level}: canvas{'es' if len(row) > 1 else ''} {numbers} of {total}"
        _text(draw, (row[0].x, row[0].y - 32), label, 23, GRAY)
        first += total
    for canvas, pixels in zip(canvases, shown, strict=True):
        picture.paste(_resized(pixels, canvas.side), (canvas.x, canvas.y))
        for corners in batch.boxes[batch.boxes[:, 0] == canvas.row, 1:].tolist():
            draw.rectangle(canvas.box(corners), outline=PALETTE[canvas.level], width=THIN)
        for x1, y1, x2, y2 in _focus_boxes(batch, canvas, focus):
            draw.rectangle((x1, y1, x2, y2), outline=PAPER, width=THICK + 2)
            draw.rectangle((x1, y1, x2, y2), outline=PALETTE[canvas.level], width=THICK)


def _draw_links(picture: Image.Image, links: Sequence[Link]) -> None:
    """Draws links at twice the size and reduces them, which smooths the edges."""
    overlay = Image.new("RGBA", (2 * picture.width, 2 * picture.height))
    draw = ImageDraw.Draw(overlay)
    for link in links:
        points = [(2 * x + 1, 2 * y + 1) for x, y in curve(link)]
        for colour, extra in ((PAPER, 3), (PALETTE[link.level], 0)):
            draw.line(points, colour, width=2 * (4 + extra), joint="curve")
            for point, radius in ((points[0], 5), (points[-1], 8)):
                draw.circle(point, 2 * radius + extra, colour)
    overlay = overlay.reduce(2)
    picture.paste(overlay, (0, 0), overlay)


@torch.no_grad()
def feature_maps(
    networks: Mapping[str, nn.Module], names: Sequence[str], images: Tensor, path: Path, augment: AugmentConfig
) -> None:
    """Writes a PNG of images and their feature maps, whose first three principal components are shown as colours.

    The mean map over the images, which depends on the position alone, is subtracted.

    Args:
        networks: networks by name, in evaluation mode; (n, 3, S, S) to maps (:class:`mcl.evaluation.features.Maps`).
        names: names of the maps.
        images: (n, 3, S, S) full images, normalised, on the networks' device.
        path: file to write; missing folders are made.
        augment: its mean and std undo the normalisation.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    columns, titles = [to_rgb(images, augment)], [f"Input, {images.shape[-1]} px"]
    for network in networks.values():
        for name, own in zip(names, network(images), strict=True):
            columns.append(pca_rgb(own - own.mean(0)))
            titles.append(f"{name.upper()}, {own.shape[-1]} x {own.shape[-2]}")
    side, top = _shown_side(images.shape[-1], SMALL), 220
    step = side + 2 * GAP
    width = max(2 * MARGIN + len(columns) * step - 2 * GAP, 2 * MARGIN + 1300)
    picture = Image.new("RGB", (width, top + len(images) * (side + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    _text(draw, (MARGIN, MARGIN - 4), "Feature maps", 44)
    note = "First three principal components of each column as red, green and blue, without the mean over the images."
    _text(draw, (MARGIN, MARGIN + 58), note, 23, GRAY)
    for i, name in enumerate(networks):
        _text(draw, (MARGIN + (1 + i * len(names)) * step, top - 72), name, 30)
    for column, (name, pixels) in enumerate(zip(titles, columns, strict=True)):
        x = MARGIN + column * step
        _text(draw, (x, top - 36), name, 24)
        for row, image in enumerate(pixels):
            picture.paste(_resized(image, side), (x, top + row * (side + GAP)))
    _save(picture, path)


def pyramid_name(ratio: int) -> str:
    """Name of the FPN map that a level is read from: P5 for ratio 1, P2 for ratio 8."""
    return f"P{6 - ratio.bit_length()}"


def to_rgb(images: Tensor, augment: AugmentConfig) -> npt.NDArray[np.uint8]:
    """Normalised (n, 3, H, W) to pixels (n, H, W, 3)."""
    pixels = images.detach().float().cpu().permute(0, 2, 3, 1) * torch.tensor(augment.std) + torch.tensor(augment.mean)
    rgb: npt.NDArray[np.uint8] = (pixels * 255).round().clamp(0, 255).byte().numpy()
    return rgb


def pca(rows: Tensor, k: int) -> Tensor:
    """First `k` principal components, (n, D) to (n, k). The largest loading of each is positive."""
    x = rows - rows.mean(0)
    axes = torch.linalg.eigh(x.t() @ x)[1].flip(1)[:, :k]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    components: Tensor = x @ (axes * largest.sign())
    return components


def pca_rgb(features: Tensor) -> npt.NDArray[np.uint8]:
    """First three principal components of (n, C, h, w) over all n * h * w positions, as pixels (n, h, w, 3).

    Each component spans its 2nd to 98th percentile. Components that hardly vary are mid-gray.
    """
    n, channels, h, w = features.shape
    # the decomposition would fail for a diverged network, whose picture is to be flat
    x = features.detach().double().cpu().nan_to_num(0, 0, 0).permute(0, 2, 3, 1).reshape(-1, channels)
    components = pca(x / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny), 3).numpy()
    low, high = np.percentile(components, (2, 98), axis=0)
    spread = high - low
    spread = np.where(spread > max(1e-6, 1e-4 * spread.max()), spread, np.inf)  # smaller spreads are rounding errors
    middle = np.where(np.isinf(spread), 0.5, 0)
    rgb = np.full((len(components), 3), 0.5)
    rgb[:, : components.shape[1]] = ((components - low) / spread + middle).clip(0, 1)
    return (rgb * 255).round().astype(np.uint8).reshape(n, h, w, 3)


def _resized(pixels: npt.NDArray[np.uint8], side: int) -> Image.Image:
    """Enlarges with square pixels, shrinks by averaging."""
    resampling = Image.Resampling.NEAREST if side >= len(pixels) else Image.Resampling.BOX
    return Image.fromarray(pixels).resize((side, side), resampling)


def _text(draw: ImageDraw.ImageDraw, at: Point, text: str, size: int, colour: str = INK) -> None:
    draw.text(at, text, fill=colour, font=ImageFont.load_default(size))


def _save(picture: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the picture ({error}); choose a writable folder") from None
