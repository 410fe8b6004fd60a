"""Layout of tiles on canvases: boxes of tiles, assembly of canvases, and cutting maps into tiles."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry, IntArray


@functools.lru_cache(maxsize=4)
def tile_boxes(geometry: Geometry, images: int) -> Tensor:
    """Tile boxes of all levels for N images: (T, 5) as ``MontageBatch.boxes``."""
    levels, first = [], 0
    for ratio, canvases in zip(geometry.ratios, geometry.canvases(images), strict=True):
        tiles = torch.arange(canvases * ratio**2)
        x, y = tiles % ratio, tiles // ratio % ratio
        corners = torch.stack([x, y, x + 1, y + 1], 1) * (geometry.canvas // ratio)
        levels.append(torch.cat([first + (tiles // ratio**2)[:, None], corners], 1).float())
        first += canvases
    return torch.cat(levels)


def lay_out(tiles: Sequence[Tensor], tile_images: Sequence[IntArray], ratios: Sequence[int]) -> Tensor:
    """The canvases of a view, (K, 3, S, S) channels_last, from a tile of every image at every level.

    Args:
        tiles: per level, (N, 3, tile, tile).
        tile_images: per level, which of the N images each tile of the canvases shows.
        ratios: per level, tiles per canvas side.
    """
    device = tiles[0].device
    shown = [staged(torch.from_numpy(rows), device).to(device, non_blocking=True) for rows in tile_images]
    levels = [assemble(level[rows], ratio) for level, rows, ratio in zip(tiles, shown, ratios, strict=True)]
    return torch.cat(levels).contiguous(memory_format=torch.channels_last)


def assemble(tiles: Tensor, ratio: int) -> Tensor:
    """Lays (canvases * ratio^2, 3, tile, tile) out row-major: (canvases, 3, S, S)."""
    _, channels, side, _ = tiles.shape
    grid = tiles.permute(0, 2, 3, 1).reshape(-1, ratio, ratio, side, side, channels)  # no copy
    canvases = grid.transpose(2, 3).reshape(-1, ratio * side, ratio * side, channels)
    return canvases.permute(0, 3, 1, 2)


def cut(canvases: Tensor, ratio: int) -> Tensor:
    """The inverse of :func:`assemble`, for any maps: (n, C, S, S) to (n * ratio^2, C, tile, tile), channels_last."""
    n, channels, side, _ = canvases.shape
    tile = side // ratio
    grid = canvases.permute(0, 2, 3, 1).reshape(n, ratio, tile, ratio, tile, channels)
    return grid.transpose(2, 3).reshape(-1, tile, tile, channels).permute(0, 3, 1, 2)


def join(pieces: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` that does not copy a single piece, and keeps the dtype under autocast."""
    if len(pieces) == 1:
        return pieces[0]
    with torch.autocast(pieces[0].device.type, enabled=False):  # autocast's cat rejects fp16 on a CPU
        return torch.cat(list(pieces))


def staged(x: Tensor, device: torch.device) -> Tensor:
    """Pins `x` if it is to be copied to a GPU: a copy from pageable memory waits for all work of the GPU."""
    return x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
