"""Feature pyramid network with BatchNorm on laterals and outputs (no activation, no bias), as in the released code."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl.models.conv import Conv2d


class ConvNorm(nn.Module):
    """Convolution of stride 1 without bias, then BatchNorm; padding keeps the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
        return normalize(self.norm, self.conv(x), counts)


def normalize(norm: nn.Module, x: Tensor, counts: Sequence[int] = ()) -> Tensor:
    """A BatchNorm of groups of rows, each by itself and in their order; of all rows together without `counts`."""
    if len(counts) > 1:
        return torch.cat([norm(rows) for rows in x.split(list(counts))])
    y: Tensor = norm(x)
    return y


class FPN(nn.Module):
    """Maps of equal width at several strides, coarsest first.

    Args:
        channels: of the backbone's maps, coarsest first.
        width: of the output maps.
        depths: how many strides below the coarsest each output map lies, increasing (0 is P5, 3 is P2).
    """

    def __init__(self, channels: Sequence[int], width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.laterals = nn.ModuleList(ConvNorm(c, width, 1) for c in channels[: self.depths[-1] + 1])
        self.outputs = nn.ModuleList(ConvNorm(width, width, 3) for _ in self.depths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, features: Sequence[Tensor], levels: Sequence[int]) -> list[Tensor]:
        """Output maps of the given levels; only the laterals that these need are computed.

        Args:
            features: the backbone's maps, coarsest first: (n, channels[i], h * 2^i, w * 2^i).
            levels: indices into `depths`, increasing.
        """
        merged: list[Tensor] = []
        for depth in range(self.depths[levels[-1]] + 1):
            x = self.laterals[depth](features[depth])
            if merged:
                x = x + F.interpolate(merged[-1], scale_factor=2, mode="nearest")
            merged.append(x)
        return [self.outputs[level](merged[self.depths[level]]) for level in levels]
