"""A MODEL, not a measurement: bytes that the CUDA kernels move, and the time that memory needs for them.

Counted is what a kernel asks of memory, each element once per thread that reads it from there; what caches save is left
out, except where said. Times are bytes over the bandwidth that the maker states.
"""

from dataclasses import dataclass

BANDWIDTH = {"A100 80 GB": 2039e9, "H100 SXM": 3352e9}
"""Bytes per second."""


@dataclass(frozen=True)
class Traffic:
    """Of one kernel, or of kernels that run one after the other."""

    kernel: str
    moved: int  # bytes
    least: int  # bytes that any implementation moves: every input read once, every output written once

    def microseconds(self, device: str) -> float:
        return self.moved / BANDWIDTH[device] * 1e6


def region_pool(cells: int, pooled: int, element: int, boxes: int, canvases: int) -> list[Traffic]:
    """Pooling on the grid, where every cell of every map lies in exactly one box.

    Args:
        cells: elements of all maps.
        pooled: elements of the output.
        element: bytes of each.
        boxes: R.
        canvases: rows of all maps.
    """
    box = 5 * 4 + 8  # coordinates and map
    least = (cells + pooled) * element + boxes * box
    # Each canvas looks through all boxes twice; the second time, and for all canvases but the first, in the L2 cache.
    listing = boxes * box + (canvases + 1 + boxes) * 4
    return [
        Traffic("region_pool_forward", least, least),
        Traffic("boxes_by_canvas", listing, listing),
        Traffic("region_pool_backward", least + (canvases + 1 + boxes) * 4, least),
    ]


def steps(parameters: int, averaged: int) -> list[Traffic]:
    """LARS on fp32 parameters, then the momentum network of those that are averaged."""
    word = 4
    return [
        # Norms read weights and gradients; the update reads them again and the buffers, and writes weights and buffers.
        Traffic("partial_squares, finish_norms", 2 * parameters * word, 2 * parameters * word),
        Traffic("lars_update", 5 * parameters * word, 5 * parameters * word),
        Traffic("LARS as a whole", 7 * parameters * word, 5 * parameters * word),
        Traffic("ema_update", 3 * averaged * word, 3 * averaged * word),
    ]
