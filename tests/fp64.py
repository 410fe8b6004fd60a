"""A faster float64 convolution for the tests: PyTorch's own on the CPU takes seconds per layer on many small tiles."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def _taps(padded: Tensor, kernel: int, stride: int, height: int, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """(n, h, w, C) views of the padded input, one per kernel element."""
    for i in range(kernel):
        for j in range(kernel):
            yield i, j, padded[:, i : i + stride * height : stride, j : j + stride * width : stride]


class Conv64(torch.autograd.Function):
    """Convolution as one matrix product per kernel element, channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        kernel = weight.shape[2]
        height, width = ((s + 2 * padding - kernel) // stride + 1 for s in x.shape[2:])
        ctx.save_for_backward(padded, weight)
        ctx.shape = (stride, padding, height, width)
        taps = weight.permute(2, 3, 1, 0).contiguous()  # (k, k, C, O)
        y = sum(view @ taps[i, j] for i, j, view in _taps(padded, kernel, stride, height, width))
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        padded, weight = ctx.saved_tensors
        stride, padding, height, width = ctx.shape
        rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])  # (n * h * w, O)
        taps = weight.permute(2, 3, 0, 1).contiguous()  # (k, k, O, C)
        d_padded = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        d_taps = torch.empty_like(taps)
        for i, j, view in _taps(padded, weight.shape[2], stride, height, width):
            d_taps[i, j] = rows.t() @ view.reshape(len(rows), -1)
            if d_padded is not None:
                d_view = d_padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
                d_view += (rows @ taps[i, j]).view_as(view)
        end_h, end_w = padded.shape[1] - padding, padded.shape[2] - padding
        d_x = None if d_padded is None else d_padded[:, padding:end_h, padding:end_w].permute(0, 3, 1, 2)
        return d_x, d_taps.permute(2, 3, 0, 1), None, None


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
