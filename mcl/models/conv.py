"""Convolution that uses what is known of small maps."""

import functools
import math

import torch
from torch import Tensor, nn

from mcl.ops.conv import MAX_CELLS, conv2d_small


class Conv2d(nn.Conv2d):
    """PyTorch's, computed otherwise where that is faster: to few cells, on a CPU.

    Without groups, dilation and bias; the stride and padding are the same along both axes.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is None
        assert (self.groups, self.dilation) == (1, (1, 1))
        if self._small(x):
            if torch.is_autocast_enabled("cpu"):
                x = x.bfloat16()
            return conv2d_small(x, self.weight, self.stride[0], int(self.padding[0]))
        return super().forward(x)

    def _small(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        if torch.is_autocast_enabled("cpu") and not _multiplies(torch.get_autocast_dtype("cpu")):
            return False
        k, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        return math.prod((size + 2 * padding - k) // stride + 1 for size in x.shape[2:]) <= MAX_CELLS


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of that type; without, those of matrices are very slow."""
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


def use(model: nn.Module, kind: type[nn.Conv2d] = Conv2d) -> None:
    """Makes the convolutions of `model` ones of that kind, in place; torchvision's ResNet creates its own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = kind
