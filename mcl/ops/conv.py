"""Convolutions to maps of a few cells, on CPUs."""

import functools
from typing import Any

import torch
from torch import Tensor

MAX_CELLS = 4
"""Of an output map. A 3x3 kernel on 2x2 cells lies outside of the map with 5 of its 9 taps."""

Term = tuple[int, slice, int, slice]
"""Output cell, its window in one row of the input (as cells of the whole map), kernel row, columns of the kernel."""


def conv2d_small(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``F.conv2d`` of few output cells as products of matrices, without the taps that meet padding.

    PyTorch's own convolution multiplies those by zero, and vectorises along rows, which are short here: with 43 maps of
    512 channels and 2x2 cells it takes four times as long on one core.

    Args:
        x: (n, c, h, w) float32, float64 or bfloat16, on a CPU. What adds up is rounded to that type after each row of
            taps.
        weight: (d, c, k, k), of the same type or a wider one, from which it is rounded. Autograd keeps it as it is.

    Returns:
        (n, d, h', w'), channels_last.
    """
    y: Tensor = _SmallConv2d.apply(x, weight, stride, padding)
    return y


@functools.cache
def _terms(h: int, w: int, k: int, stride: int, padding: int) -> tuple[int, int, list[Term]]:
    """Height and width of the output, and the products that add up to it."""
    rows, columns = _windows(h, k, stride, padding), _windows(w, k, stride, padding)
    terms = []
    for i, (top, bottom, first_row) in enumerate(rows):
        for j, (left, right, first) in enumerate(columns):
            taps = slice(first, first + right - left)
            for row in range(top, bottom):
                cells = slice(row * w + left, row * w + right)
                terms.append((i * len(columns) + j, cells, first_row + row - top, taps))
    return len(rows), len(columns), terms


def _windows(size: int, k: int, stride: int, padding: int) -> list[tuple[int, int, int]]:
    """Per output cell along one axis: the input cells from, up to, and the tap that meets the first of them."""
    starts = range(-padding, size + padding - k + 1, stride)
    return [(max(start, 0), min(start + k, size), max(-start, 0)) for start in starts]


class _SmallConv2d(torch.autograd.Function):
    """Cells and taps that follow each other in memory are columns of one matrix: nothing is copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        height, width, ctx.terms = _terms(*x.shape[2:], weight.shape[2], stride, padding)
        cells, taps = _cells(x), _taps(weight.to(x.dtype))
        y = x.new_zeros(len(x), height * width, len(weight))
        for out, window, row, columns in ctx.terms:
            y[:, out].addmm_(_row(cells[:, window]), _row(taps[:, row, columns]).t())
        y = y.view(len(x), height, width, len(weight))
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        cells, taps = _cells(x), _taps(weight.to(x.dtype))
        of_y = _cells(grad.contiguous(memory_format=torch.channels_last))
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=x.dtype) if ctx.needs_input_grad[1] else None
        for out, window, row, columns in ctx.terms:
            g = of_y[:, out]
            if of_x is not None:
                _row(_cells(of_x)[:, window]).addmm_(g, _row(taps[:, row, columns]))
            if of_weight is not None:
                _row(_taps(of_weight)[:, row, columns]).addmm_(g.t(), _row(cells[:, window]))
        return of_x, None if of_weight is None else of_weight.to(weight.dtype), None, None


def _cells(maps: Tensor) -> Tensor:
    """(n, c, h, w) channels_last to (n, h * w, c), the same memory."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _taps(weight: Tensor) -> Tensor:
    """(d, c, k, k) channels_last to (d, k, k, c), the same memory."""
    return weight.permute(0, 2, 3, 1)


def _row(cells: Tensor) -> Tensor:
    """(n, q, c) to (n, q * c), the same memory: it is written to."""
    return cells.view(len(cells), -1)
