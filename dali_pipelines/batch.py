"""One view of a step as tensors. The loader yields them.

Shape letters: N images, K canvases of all levels, T tiles of all levels, L levels, S canvas side.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import cut, join, staged, tile_boxes


@dataclass(frozen=True)
class MontageBatch:
    """One view of a step: N images, seen as T tiles on K canvases."""

    pixels: Tensor  # (K, 3, S, S) channels_last memory, normalised; canvases of all levels, level 0 first
    labels: Tensor  # (N,) int64 class of each image, -1 unknown
    index: Tensor  # (N,) int64 dataset index of each image
    tile_images: Tensor  # (T,) int64 which of the N images each tile shows, level after level, row-major
    boxes: Tensor  # (T, 5) float32 row of the canvas in `pixels`, x1, y1, x2, y2 in canvas pixels
    crops: Tensor  # (T, 5) float32 x1, y1, x2, y2 of the crop in the image (0..1), flipped (1) or not (0)
    canvas_counts: tuple[int, ...]  # (L,) canvases per level, in `pixels`
    query_counts: tuple[int, ...]  # (L,) how many of these, counted from the first, the online network processes
    ratios: tuple[int, ...]  # (L,) tiles per canvas side
    cells: int
    epoch: int
    step: int

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "MontageBatch":
        """Copies to `device`, asynchronously; `dtype` converts the pixels."""
        moved: dict[str, Any] = {
            name: staged(getattr(self, name), device).to(device, non_blocking=True)
            for name in ("labels", "index", "tile_images", "boxes", "crops")
        }
        pixels = staged(self.pixels, device)
        pixels = pixels.to(device, dtype, non_blocking=True, memory_format=torch.channels_last)
        return dataclasses.replace(self, pixels=pixels, **moved)

    def part(self, i: int, parts: int) -> "MontageBatch":
        """Part `i` of `parts` equal parts of the canvases of every level, for gradient accumulation.

        Online queries and other canvases are divided separately. `labels` and `index` are those of all N images, which
        `tile_images` refers to.
        """
        if parts == 1:
            return self
        ranges = []
        for canvases, queries in zip(self.canvas_counts, self.query_counts, strict=True):
            own, others = queries // parts, (canvases - queries) // parts
            ranges.append([(i * own, own), (queries + i * others, others)])
        return self._select(ranges, [queries // parts for queries in self.query_counts])

    def first(self, counts: Sequence[int]) -> "MontageBatch":
        """The view with only the first counts[i] canvases of level i, for the given levels; all are queries."""
        return self._select([[(0, count)] for count in counts], counts)

    def _select(self, ranges: Sequence[Sequence[tuple[int, int]]], queries: Sequence[int]) -> "MontageBatch":
        """Selects ranges (start, count) of each level's canvases, with their tiles; adjacent ones are not copied."""
        canvases: list[slice] = []
        tiles: list[slice] = []
        for level, pieces in enumerate(ranges):
            canvas, tile, per_canvas = sum(self.canvas_counts[:level]), self.tiles(level).start, self.ratios[level] ** 2
            for start, count in pieces:
                if not count:  # with an empty piece, the result of torch.cat would not be channels_last
                    continue
                own = slice(canvas + start, canvas + start + count)
                its = slice(tile + start * per_canvas, tile + (start + count) * per_canvas)
                if canvases and canvases[-1].stop == own.start:
                    own, its = slice(canvases.pop().start, own.stop), slice(tiles.pop().start, its.stop)
                canvases.append(own)
                tiles.append(its)
        boxes, row = [], 0
        for own, its in zip(canvases, tiles, strict=True):
            boxes.append(torch.cat([self.boxes[its, :1] + (row - own.start), self.boxes[its, 1:]], 1))
            row += own.stop - own.start
        return dataclasses.replace(
            self,
            pixels=join([self.pixels[own] for own in canvases]),
            tile_images=join([self.tile_images[its] for its in tiles]),
            boxes=join(boxes),
            crops=join([self.crops[its] for its in tiles]),
            canvas_counts=tuple(sum(count for _, count in pieces) for pieces in ranges),
            query_counts=tuple(queries),
            ratios=self.ratios[: len(ranges)],
        )

    def regions(self) -> list[Tensor]:
        """Boxes of the tiles of each level: (R, 5) index of the level's canvas, x1, y1, x2, y2 in canvas pixels."""
        found, first = [], 0
        for level, canvases in enumerate(self.canvas_counts):
            boxes = self.boxes[self.tiles(level)]
            found.append(torch.cat([boxes[:, :1] - first, boxes[:, 1:]], 1))
            first += canvases
        return found

    def stacked(self) -> list[Tensor]:
        """The tiles of each level as separate images: (R, 3, tile, tile) channels_last."""
        levels = zip(self.pixels.split(self.canvas_counts), self.ratios, strict=True)
        return [cut(canvases, ratio) for canvases, ratio in levels]

    def tile_labels(self) -> list[Tensor]:
        """Class of the image of each tile: (R,) int64 for each level."""
        return [self.labels[self.tile_images[self.tiles(i)]] for i in range(len(self.canvas_counts))]

    def tiles(self, level: int) -> slice:
        """Rows of `tile_images`, `boxes` and `crops` that belong to `level`."""
        counts = [c * r * r for c, r in zip(self.canvas_counts, self.ratios, strict=True)]
        return slice(sum(counts[:level]), sum(counts[: level + 1]))


def in_order(geometry: Geometry, images: int, pixels: Tensor) -> MontageBatch:
    """A view of N images without a source. On every level, tiles show the images in order.

    Args:
        pixels: (K, 3, S, S), the canvases.
    """
    tiles = geometry.tiles(images)
    return MontageBatch(
        pixels=pixels,
        labels=torch.full((images,), -1),
        index=torch.arange(images),
        tile_images=torch.cat([torch.arange(count) % images for count in tiles]),
        boxes=tile_boxes(geometry, images),
        crops=torch.zeros(sum(tiles), 5),
        canvas_counts=geometry.canvases(images),
        query_counts=geometry.query_canvases(images),
        ratios=geometry.ratios,
        cells=geometry.cells,
        epoch=0,
        step=0,
    )
