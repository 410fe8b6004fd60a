"""Convolution that uses what is known of small kernels and small maps."""

import functools
import math

import torch
from torch import Tensor, nn

from mcl.ops.conv import MAX_CELLS, conv2d_small
from mcl.ops.winograd import serves, winograd


class Conv2d(nn.Conv2d):
    """PyTorch's, computed otherwise where that is faster, on a CPU: 3x3 kernels of stride 1, and to few cells.

    Without groups, dilation and bias; padding is of zeros, and it and the stride are the same along both axes.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is None
        assert (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype("cpu"))
        if (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1)) and serves(x, self.weight):
            return winograd(x, self.weight)
        if self._cells(x) <= MAX_CELLS and _multiplies(x.dtype):
            return conv2d_small(x, self.weight, self.stride[0], int(self.padding[0]))
        return super().forward(x)

    def _cells(self, x: Tensor) -> int:
        """Of the output."""
        k, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        return math.prod((size + 2 * padding - k) // stride + 1 for size in x.shape[2:])


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of that type; without, those of matrices are very slow."""
    return dtype in (torch.float32, torch.float64) or (
        dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    )
