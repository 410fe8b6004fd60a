"""Geometry of montages as pure functions: levels, canvases, tiles, boxes, slabs, legal batch sizes.

A canvas is ``32 * cells`` pixels square. Level i cuts it into ``ratios[i]`` x ``ratios[i]`` tiles, so that on the
feature map of stride ``32 / ratios[i]`` every tile is ``cells`` x ``cells``. N images fill ``N / images_per_canvas[i]``
canvases. Slots are numbered canvas by canvas, row-major within a canvas, level after level.

Shape letters: N images, K canvases of all levels, T tiles of all levels, S canvas side.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

STRIDE = 32
"""Stride of the coarsest feature map, C5."""

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class Geometry:
    """Shape of a montage, independent of the number of images; a section of the configuration.

    Raises:
        ValueError: the levels do not fit each other; the message starts with the key.
    """

    cells: int = 7
    """Feature cells per tile side; a canvas is 32 * cells pixels square."""
    ratios: tuple[int, ...] = (1, 2, 4, 8)
    """Tiles per canvas side, one entry per level: increasing powers of two from 1 to at most 8."""
    images_per_canvas: tuple[int, ...] = (1, 4, 16, 32)
    """Images of the batch per canvas, one entry per level: N images make N / images_per_canvas canvases."""
    schedule: tuple[tuple[int, int], ...] = ()
    """Canvas schedule: pairs of an epoch, counted from 0, and the cells from then on; `cells` holds before."""
    queries: tuple[int, ...] = ()
    """Online queries, one entry per level: one canvas in so many goes through the online network, the first ones of the
    batch (whose order is random as it is); targets are always all images. Empty: every canvas."""

    def __post_init__(self) -> None:
        ratios, per_canvas = list(self.ratios), list(self.images_per_canvas)
        if ratios != sorted(set(ratios)) or ratios[:1] != [1] or not set(ratios) <= {1, 2, 4, 8}:
            raise ValueError(f"ratios: {ratios} must start with 1 and increase among 1, 2, 4, 8")
        if len(per_canvas) != len(ratios):
            raise ValueError(f"images_per_canvas: {len(per_canvas)} entries for {len(ratios)} ratios")
        if per_canvas[0] != 1:
            raise ValueError("images_per_canvas: level 0 shows one image per canvas, so it must start with 1")
        for r, k in zip(ratios, per_canvas, strict=True):
            if k < 1 or (r * r) % k:
                raise ValueError(f"images_per_canvas: {k} must divide the {r * r} tiles of a canvas of ratio {r}")
        self._check_cells(self.cells, "")
        epochs = [epoch for epoch, _ in self.schedule]
        if epochs != sorted(set(epochs)) or any(epoch < 1 for epoch in epochs):
            raise ValueError(f"schedule: epochs {epochs} must increase from 1 on; montage.cells holds before")
        for epoch, cells in self.schedule:
            self._check_cells(cells, f"schedule: from epoch {epoch} on: ")
        if self.queries and len(self.queries) != len(ratios):
            raise ValueError(f"queries: {len(self.queries)} entries for {len(ratios)} ratios")
        if any(every < 1 for every in self.queries):
            raise ValueError(f"queries: {list(self.queries)} must be at least 1; 4 is one canvas in 4")

    def _check_cells(self, cells: int, where: str) -> None:
        if cells < 1:
            raise ValueError(f"{where}cells: {cells} must be at least 1")
        for k in self.images_per_canvas:
            if STRIDE * cells % k:
                raise ValueError(f"{where}images_per_canvas: {k} must divide the canvas side of {STRIDE * cells} px")

    def at(self, epoch: int) -> "Geometry":
        """The geometry of an epoch, without schedule."""
        cells = [cells for first, cells in self.schedule if first <= epoch]
        return dataclasses.replace(self, cells=cells[-1] if cells else self.cells, schedule=())

    @property
    def final(self) -> "Geometry":
        """What the schedule ends with, every canvas a query: the geometry of evaluations."""
        cells = self.schedule[-1][1] if self.schedule else self.cells
        return dataclasses.replace(self, cells=cells, schedule=(), queries=())

    @property
    def fewest_cells(self) -> int:
        """Of all epochs."""
        return min([self.cells, *(cells for _, cells in self.schedule)])

    @property
    def canvas(self) -> int:
        """Side of a canvas, pixels."""
        return STRIDE * self.cells

    @property
    def levels(self) -> int:
        return len(self.ratios)

    def tile(self, level: int) -> int:
        """Side of a tile, pixels."""
        return self.canvas // self.ratios[level]

    def legal(self, images: int) -> bool:
        """Whether N images fill whole canvases at every level."""
        return images > 0 and all(images % k == 0 for k in self.images_per_canvas)

    def canvases(self, images: int) -> tuple[int, ...]:
        """Canvases per level for N images."""
        return tuple(images // k for k in self.images_per_canvas)

    def query_canvases(self, images: int) -> tuple[int, ...]:
        """Canvases per level that go through the online network, for N images."""
        canvases = self.canvases(images)
        return tuple(c // every for c, every in zip(canvases, self.queries or (1,) * self.levels, strict=True))

    def tiles(self, images: int) -> tuple[int, ...]:
        """Tiles per level for N images."""
        return tuple(c * r * r for c, r in zip(self.canvases(images), self.ratios, strict=True))


def nearest_legal(geometry: Geometry, images: int) -> tuple[int, ...]:
    """The legal numbers of images just below and just above `images`."""
    step = int(np.lcm.reduce(geometry.images_per_canvas))
    below = images // step * step
    return tuple(n for n in (below, below + step) if n > 0)


@dataclass(frozen=True)
class Paste:
    """Where the rows of one level's tiles go, for every slab.

    DALI keeps one batch size per iteration, so a level of N / k canvases leaves it as N slabs: slab j is rows
    (j mod k) * S/k to (j mod k + 1) * S/k of canvas j div k. P pastes fill one slab.
    """

    slots: IntArray  # (N, P) tile slot of the level
    source: npt.NDArray[np.int32]  # (N, P, 2) y, x of the piece in the tile, pixels
    target: npt.NDArray[np.int32]  # (N, P, 2) y, x of the piece in the slab, pixels
    shape: npt.NDArray[np.int32]  # (N, P, 2) height, width of the piece, pixels
    size: tuple[int, int]  # slab height, width, pixels


def slabs(geometry: Geometry, level: int, images: int) -> Paste:
    """Pieces of tiles that make the slabs of one level."""
    ratio, per_canvas = geometry.ratios[level], geometry.images_per_canvas[level]
    tile, height = geometry.tile(level), geometry.canvas // per_canvas
    rows: list[list[tuple[int, int, int, int, int]]] = []
    for i in range(per_canvas):
        top, bottom = i * height, (i + 1) * height
        pieces = []
        for row in range(top // tile, -(-bottom // tile)):
            y0, y1 = max(top, row * tile), min(bottom, (row + 1) * tile)
            pieces += [(row * ratio + c, y0 - row * tile, y0 - top, y1 - y0, c * tile) for c in range(ratio)]
        rows.append(pieces)
    piece = np.array(rows, np.int64)  # (k, P, 5); k divides r^2, both powers of two, so every slab has as many pieces
    part = np.arange(images) % per_canvas
    slots = piece[part, :, 0] + (np.arange(images) // per_canvas * ratio * ratio)[:, None]
    zero = np.zeros_like(piece[..., 0])
    source = np.stack([piece[..., 1], zero], -1)[part].astype(np.int32)
    target = np.stack([piece[..., 2], piece[..., 4]], -1)[part].astype(np.int32)
    shape = np.stack([piece[..., 3], np.full_like(zero, tile)], -1)[part].astype(np.int32)
    return Paste(slots=slots, source=source, target=target, shape=shape, size=(height, geometry.canvas))


def boxes(geometry: Geometry, images: int) -> FloatArray:
    """Tile boxes of all levels.

    Returns:
        (T, 5) float32: canvas row among the canvases of all levels, x1, y1, x2, y2 in canvas pixels.
    """
    parts, first = [], 0
    for level, canvases in enumerate(geometry.canvases(images)):
        parts.append(_grid(canvases, geometry.ratios[level], geometry.tile(level), first))
        first += canvases
    return np.concatenate(parts)


def _grid(canvases: int, ratio: int, tile: int, first: int) -> FloatArray:
    canvas, row, column = np.meshgrid(np.arange(canvases) + first, np.arange(ratio), np.arange(ratio), indexing="ij")
    corners = [canvas, column * tile, row * tile, (column + 1) * tile, (row + 1) * tile]
    return np.stack([c.ravel() for c in corners], 1).astype(np.float32)
