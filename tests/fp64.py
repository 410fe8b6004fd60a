"""A faster float64 convolution for tests, since PyTorch's takes seconds per layer on many small tiles on a CPU."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHED = 2**17
"""Elements of a matrix of patches that fits a core's cache."""


def _chunks(images: int, cells: int, taps: int) -> Iterator[slice]:
    """Groups of images whose patches fit into the cache, but have enough rows for a fast product."""
    few = max(_CACHED // (cells * taps), 128 // cells, 1)
    return (slice(start, start + few) for start in range(0, images, few))


def _patches(padded: Tensor, kernel: int, stride: int, height: int, width: int) -> Tensor:
    """(n * h * w, k * k * C) of a padded (n, H, W, C) input."""
    n, _, _, channels = padded.shape
    image, row, column, channel = padded.stride()
    shape = (n, height, width, kernel, kernel, channels)
    strides = (image, stride * row, stride * column, row, column, channel)
    return padded.as_strided(shape, strides, padded.storage_offset()).reshape(n * height * width, -1)


class Conv64(torch.autograd.Function):
    """Convolution as matrix products, channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
        outputs, _, kernel, _ = weight.shape
        height, width = ((s + 2 * padding - kernel) // stride + 1 for s in x.shape[2:])
        ctx.save_for_backward(padded, weight)
        ctx.shape = (stride, padding, height, width)
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)  # (O, k * k * C)
        y = x.new_empty(len(x), height, width, outputs)
        for few in _chunks(len(x), height * width, matrix.shape[1]):
            torch.mm(_patches(padded[few], kernel, stride, height, width), matrix.t(), out=y[few].view(-1, outputs))
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        padded, weight = ctx.saved_tensors
        stride, padding, height, width = ctx.shape
        outputs, channels, kernel, _ = weight.shape
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
        d_matrix = torch.zeros_like(matrix)
        d_padded = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        for few in _chunks(len(padded), height * width, matrix.shape[1]):
            rows = grad[few].permute(0, 2, 3, 1).reshape(-1, outputs)  # (n * h * w, O)
            d_matrix.addmm_(rows.t(), _patches(padded[few], kernel, stride, height, width))
            if d_padded is None:
                continue
            d_patches = (rows @ matrix).view(-1, height, width, kernel, kernel, channels)
            for i in range(kernel):
                for j in range(kernel):
                    view = d_padded[few, i : i + stride * height : stride, j : j + stride * width : stride]
                    view += d_patches[:, :, :, i, j]
        d_weight = d_matrix.view(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)
        if d_padded is None:
            return None, d_weight, None, None
        end_h, end_w = padded.shape[1] - padding, padded.shape[2] - padding
        return d_padded[:, padding:end_h, padding:end_w].permute(0, 3, 1, 2), d_weight, None, None


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
    """In the context, ``nn.Conv2d`` in float64 is faster; layers with few input channels, which would be slower, keep
    PyTorch's."""

    def forward(self: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != torch.float64 or self.in_channels < 16:
            return original(self, x, weight, bias)
        assert bias is None
        assert self.groups == 1
        return Conv64.apply(x, weight, self.stride[0], self.padding[0])

    original = torch.nn.Conv2d._conv_forward
    with mock.patch.object(torch.nn.Conv2d, "_conv_forward", forward):
        yield
