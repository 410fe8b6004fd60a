"""Geometry of montages as pure functions: levels, canvases, tiles, boxes, slabs, legal batch sizes.

A canvas is ``32 * cells`` pixels square. Level i cuts it into ``ratios[i]`` x ``ratios[i]`` tiles, so that on the
feature map of stride ``32 / ratios[i]`` every tile is ``cells`` x ``cells``. N images fill ``N / images_per_canvas[i]``
canvases. Slots are numbered canvas by canvas, row-major within a canvas, level after level.

Shape letters: N images, K canvases of all levels, T tiles of all levels, S canvas side.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

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


def all_tiles(ratio: int, side: int, canvases: int, device: torch.device) -> Tensor:
    """The grid of tiles of every canvas, whatever its level: (canvases * ratio^2, 5) as :func:`boxes`.

    Args:
        ratio: tiles per canvas side.
        side: of a canvas, pixels.
    """
    # Made on the device: a copy from the host would wait for it.
    steps = torch.arange(canvases * ratio * ratio, device=device)
    x, y = steps % ratio, steps // ratio % ratio
    corners = torch.stack([x, y, x + 1, y + 1], 1) * (side // ratio)
    return torch.cat([(steps // ratio**2)[:, None], corners], 1).float()


def _grid(canvases: int, ratio: int, tile: int, first: int) -> FloatArray:
    canvas, row, column = np.meshgrid(np.arange(canvases) + first, np.arange(ratio), np.arange(ratio), indexing="ij")
    corners = [canvas, column * tile, row * tile, (column + 1) * tile, (row + 1) * tile]
    return np.stack([c.ravel() for c in corners], 1).astype(np.float32)


@dataclass(frozen=True)
class MontageBatch:
    """One view of a step: N images, seen as T tiles on K canvases."""

    images: Tensor  # (K, 3, S, S) channels_last memory, normalised; canvases of all levels, level 0 first
    labels: Tensor  # (N,) int64 class of each source image, -1 unknown
    index: Tensor  # (N,) int64 dataset index of each source image
    sources: Tensor  # (T,) int64 which of the N images each tile shows, in level order, row-major
    boxes: Tensor  # (T, 5) float32 canvas row in `images`, x1, y1, x2, y2 in canvas pixels
    crops: Tensor  # (T, 5) float32 x1, y1, x2, y2 of the crop in the source image (0..1), flipped (1) or not (0)
    canvases: tuple[int, ...]  # canvases per level, in `images`
    queries: tuple[int, ...]  # how many of them, the first ones, go through the online network
    ratios: tuple[int, ...]
    cells: int
    epoch: int
    step: int

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "MontageBatch":
        """Copies to `device`, asynchronously; `dtype` converts the images."""
        moved: dict[str, Any] = {
            name: _staged(getattr(self, name), device).to(device, non_blocking=True)
            for name in ("labels", "index", "sources", "boxes", "crops")
        }
        images = _staged(self.images, device)
        images = images.to(device, dtype, non_blocking=True, memory_format=torch.channels_last)
        return dataclasses.replace(self, images=images, **moved)

    def part(self, i: int, parts: int) -> "MontageBatch":
        """One of so many equal parts of the canvases of every level, for gradient accumulation.

        Canvases that are online queries and those that are not are divided each for itself. `labels`, `index` and what
        `sources` counts stay those of all N images.
        """
        if parts == 1:
            return self
        images, sources, boxes, crops = [], [], [], []
        row = first_canvas = first_tile = 0  # of the piece in the part; of the level in the whole
        for canvases, queries, ratio in zip(self.canvases, self.queries, self.ratios, strict=True):
            for start, count in ((0, queries // parts), (queries, (canvases - queries) // parts)):
                if not count:  # an empty piece among them would make torch.cat forget channels_last
                    continue
                start += i * count
                canvas, tile = first_canvas + start, first_tile + start * ratio**2
                tiles = slice(tile, tile + count * ratio**2)
                images.append(self.images[canvas : canvas + count])
                sources.append(self.sources[tiles])
                boxes.append(torch.cat([self.boxes[tiles, :1] + (row - canvas), self.boxes[tiles, 1:]], 1))
                crops.append(self.crops[tiles])
                row += count
            first_canvas += canvases
            first_tile += canvases * ratio**2
        return dataclasses.replace(
            self,
            images=torch.cat(images),
            sources=torch.cat(sources),
            boxes=torch.cat(boxes),
            crops=torch.cat(crops),
            canvases=tuple(n // parts for n in self.canvases),
            queries=tuple(n // parts for n in self.queries),
        )

    def regions(self, canvases: Sequence[int]) -> list[Tensor]:
        """Boxes of the tiles of the first canvases[i] canvases of level i, for as many levels as given.

        Returns:
            Per level (R, 5): row among the level's canvases, x1, y1, x2, y2 in canvas pixels.
        """
        found, first = [], 0
        for level, number in enumerate(canvases):
            boxes = self.boxes[self.tiles(level)][: number * self.ratios[level] ** 2]
            found.append(torch.cat([boxes[:, :1] - first, boxes[:, 1:]], 1))
            first += self.canvases[level]
        return found

    def tiles(self, level: int) -> slice:
        """Rows of `sources`, `boxes` and `crops` that belong to `level`."""
        counts = [c * r * r for c, r in zip(self.canvases, self.ratios, strict=True)]
        return slice(sum(counts[:level]), sum(counts[: level + 1]))


def in_order(geometry: Geometry, images: int, pixels: Tensor) -> MontageBatch:
    """A view of N images that come from nowhere: on every level their tiles follow each other in order.

    Args:
        pixels: (K, 3, S, S), the canvases.
    """
    tiles = geometry.tiles(images)
    return MontageBatch(
        images=pixels,
        labels=torch.full((images,), -1),
        index=torch.arange(images),
        sources=torch.cat([torch.arange(count) % images for count in tiles]),
        boxes=torch.from_numpy(boxes(geometry, images)),
        crops=torch.zeros(sum(tiles), 5),
        canvases=geometry.canvases(images),
        queries=geometry.query_canvases(images),
        ratios=geometry.ratios,
        cells=geometry.cells,
        epoch=0,
        step=0,
    )


def _staged(x: Tensor, device: torch.device) -> Tensor:
    """What an asynchronous copy can start from: one from pageable memory would wait for all that the GPU has to do."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
