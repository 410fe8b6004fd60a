"""Geometry of montages as pure functions: levels, canvases, tiles, legal batch sizes.

A canvas is ``32 * cells`` pixels square. Level i cuts it into ``ratios[i]`` x ``ratios[i]`` tiles, so that on the
feature map of stride ``32 / ratios[i]`` every tile is ``cells`` x ``cells``. N images fill ``N / images_per_canvas[i]``
canvases. Slots are numbered canvas by canvas, row-major within a canvas, level after level.

Shape letters: N images, K canvases of all levels, T tiles of all levels, S canvas side.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

STRIDE = 32
"""Stride of the coarsest feature map, C5."""

MOST_CELLS = 1024
"""Upper bound of `cells`, far above what fits into memory."""

IntArray = npt.NDArray[np.int64]


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
    """Canvas schedule: pairs of an epoch, counted from 0, and the cells from then on. `cells` applies before."""
    queries: tuple[int, ...] = ()
    """Online queries, one entry per level: n means that the online network processes one in n canvases, the first ones
    of the (shuffled) batch. Targets are always those of all images. Empty: every canvas."""

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
            raise ValueError(f"schedule: epochs {epochs} must increase from 1; montage.cells applies before")
        for epoch, cells in self.schedule:
            self._check_cells(cells, f"schedule: from epoch {epoch} on: ")
        if self.queries and len(self.queries) != len(ratios):
            raise ValueError(f"queries: {len(self.queries)} entries for {len(ratios)} ratios")
        if any(every < 1 for every in self.queries):
            raise ValueError(f"queries: {list(self.queries)} must be at least 1; 4 means one canvas in 4")

    def _check_cells(self, cells: int, where: str) -> None:
        if not 1 <= cells <= MOST_CELLS:
            raise ValueError(f"{where}cells: {cells} must be at least 1 and at most {MOST_CELLS}")
        for k in self.images_per_canvas:
            if STRIDE * cells % k:
                raise ValueError(f"{where}images_per_canvas: {k} must divide the canvas side of {STRIDE * cells} px")

    def at(self, epoch: int) -> "Geometry":
        """The geometry of an epoch, without schedule."""
        cells = [cells for first, cells in self.schedule if first <= epoch]
        return dataclasses.replace(self, cells=cells[-1] if cells else self.cells, schedule=())

    @property
    def final(self) -> "Geometry":
        """The last geometry of the schedule, with every canvas as a query, which evaluations use."""
        cells = self.schedule[-1][1] if self.schedule else self.cells
        return dataclasses.replace(self, cells=cells, schedule=(), queries=())

    @property
    def fewest_cells(self) -> int:
        """Smallest number of cells in any epoch."""
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
