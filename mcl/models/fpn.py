"""Feature pyramid network with BatchNorm on laterals and outputs (no activation, no bias), as in the authors' code."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl.models.norm import BatchNorm


class ConvNorm(nn.Module):
    """Convolution with stride 1 and padding that keeps the size, without bias, followed by BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Tensor, counts: Sequence[int] = (), relu: bool = False) -> Tensor:
        """Convolution, BatchNorm and, if `relu`, ReLU; `counts` as for :class:`BatchNorm`."""
        y: Tensor = self.norm(self.conv(x), counts, relu=relu)
        return y


class FPN(nn.Module):
    """Feature pyramid: maps with equal channels at several strides, coarsest first.

    Args:
        channels: channels of the backbone's maps, coarsest first.
        width: channels of the output maps.
        depths: for each output map the number of strides below the coarsest, increasing (0 is P5, 3 is P2).
    """

    def __init__(self, channels: Sequence[int], width: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.laterals = nn.ModuleList(ConvNorm(c, width, 1) for c in channels[: self.depths[-1] + 1])
        self.outputs = nn.ModuleList(ConvNorm(width, width, 3) for _ in self.depths)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(
        self, features: Sequence[Tensor], levels: Sequence[int], counts: Sequence[int] = (), views: Sequence[int] = ()
    ) -> list[Tensor]:
        """Output maps of the given levels for all canvases or, with `counts`, one map per group of canvases.

        Only laterals that these need are computed. Convolutions process groups together, since matrix products of few
        rows are slow; BatchNorm normalises each group separately, in order.

        Args:
            features: the backbone's maps, coarsest first: (n, channels[i], h * 2^i, w * 2^i); sides that are odd at a
                finer stride are half of them, rounded up.
            levels: indices into `depths`, increasing; with `counts` the index of each group.
            counts: number of canvases in each group; the sum is n.
            views: without `counts`, numbers of canvases that BatchNorm normalises separately; the sum is n.
        """
        if counts:
            return self._of_groups(features, levels, counts)
        merged: list[Tensor] = []
        for depth in range(self.depths[levels[-1]] + 1):
            x = self.laterals[depth](features[depth], views)
            if merged:
                x = x + _finer(merged[-1], x)
            merged.append(x)
        return [self.outputs[level](merged[self.depths[level]], views) for level in levels]

    def _of_groups(self, features: Sequence[Tensor], levels: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
        maps: dict[int, Tensor] = {}  # per group, at its own depth
        above: dict[int, Tensor] = {}  # per group, one stride coarser
        for depth, lateral in enumerate(self.laterals):
            groups = [g for g, level in enumerate(levels) if self.depths[level] >= depth]
            if not groups:
                break
            x = features[depth]
            if len(groups) < len(counts):
                x = _join(_split(x, counts), groups)
            x = lateral(x, [counts[g] for g in groups])
            if above:
                x = x + _finer(_join(above, groups), x)
            above = dict(zip(groups, _split(x, [counts[g] for g in groups]).values(), strict=True))
            maps |= {g: above[g] for g in groups if self.depths[levels[g]] == depth}
        for level, output in enumerate(self.outputs):
            groups = [g for g in maps if levels[g] == level]
            if groups:
                sizes = [counts[g] for g in groups]
                maps |= zip(groups, _split(output(_join(maps, groups), sizes), sizes).values(), strict=True)
        return [maps[g] for g in range(len(counts))]


def _finer(x: Tensor, like: Tensor) -> Tensor:
    """Nearest-neighbour upsampling to the size of `like`, which may be odd for a stacked image.

    It keeps the dtype of `x`; autocast on a GPU would use fp32 here and in what follows.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, like.shape[2:], mode="nearest")


def _split(x: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """The rows of each group."""
    return dict(enumerate(Groups.apply(x, tuple(counts)) if len(counts) > 1 else [x]))


def _join(pieces: dict[int, Tensor], groups: Sequence[int]) -> Tensor:
    return pieces[groups[0]] if len(groups) == 1 else torch.cat([pieces[g] for g in groups])


class Groups(torch.autograd.Function):
    """Splits a map (n, C, H, W) into groups of rows.

    For slices, autograd would add one whole map per group, mostly zeros and not channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        pieces: tuple[Tensor, ...] = x.split(counts)
        ctx.like = [(p.shape, p.dtype, p.device) for p in pieces]
        return pieces

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        pieces = [_zeros(*like) if grad is None else grad for grad, like in zip(grads, ctx.like, strict=True)]
        return torch.cat(pieces), None


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_()
