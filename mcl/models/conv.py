"""Convolution that uses what is known of small maps."""

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
            return conv2d_small(x, self.weight, self.stride[0], int(self.padding[0]))
        return super().forward(x)

    def _small(self, x: Tensor) -> bool:
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        k, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        return math.prod((size + 2 * padding - k) // stride + 1 for size in x.shape[2:]) <= MAX_CELLS


def use(model: nn.Module, kind: type[nn.Conv2d] = Conv2d) -> None:
    """Makes the convolutions of `model` ones of that kind, in place; torchvision's ResNet creates its own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = kind
