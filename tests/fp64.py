"""A faster float64 convolution for the tests: PyTorch's own on the CPU takes seconds per layer on many small tiles."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def _patches(padded: Tensor, kernel: int, stride: int, height: int, width: int) -> Tensor:
    """(n * h * w, k * k * C) of a padded (n, H, W, C) input."""
    n, _, _, channels = padded.shape
    image, row, column, channel = padded.stride()
    shape = (n, height, width, kernel, kernel, channels)
    strides = (image, stride * row, stride * column, row, column, channel)
    return padded.as_strided(shape, strides).reshape(n * height * width, -1)


class Conv64(torch.autograd.Function):
    """Convolution as one matrix product, channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding)).contiguous()
        outputs, _, kernel, _ = weight.shape
        height, width = ((s + 2 * padding - kernel) // stride + 1 for s in x.shape[2:])
        ctx.save_for_backward(padded, weight)
        ctx.shape = (stride, padding, height, width)
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)  # (O, k * k * C)
        y = _patches(padded, kernel, stride, height, width) @ matrix.t()
        return y.view(len(x), height, width, outputs).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        padded, weight = ctx.saved_tensors
        stride, padding, height, width = ctx.shape
        outputs, channels, kernel, _ = weight.shape
        rows = grad.permute(0, 2, 3, 1).reshape(-1, outputs)  # (n * h * w, O)
        d_matrix = rows.t() @ _patches(padded, kernel, stride, height, width)
        d_weight = d_matrix.view(outputs, kernel, kernel, channels).permute(0, 3, 1, 2)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None, None
        matrix = weight.permute(0, 2, 3, 1).reshape(outputs, -1)
        d_patches = (rows @ matrix).view(len(padded), height, width, kernel, kernel, channels)
        d_padded = torch.zeros_like(padded)
        for i in range(kernel):
            for j in range(kernel):
                view = d_padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
                view += d_patches[:, :, :, i, j]
        end_h, end_w = padded.shape[1] - padding, padded.shape[2] - padding
        return d_padded[:, padding:end_h, padding:end_w].permute(0, 3, 1, 2), d_weight, None, None


@contextlib.contextmanager
def fast_convolutions() -> Iterator[None]:
    """Within, ``nn.Conv2d`` in float64 takes the faster way; a handful of input channels would be slower that way."""

    def forward(self: torch.nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != torch.float64 or self.in_channels < 16:
            return original(self, x, weight, bias)
        assert bias is None
        assert self.groups == 1
        return Conv64.apply(x, weight, self.stride[0], self.padding[0])

    original = torch.nn.Conv2d._conv_forward
    with mock.patch.object(torch.nn.Conv2d, "_conv_forward", forward):
        yield
