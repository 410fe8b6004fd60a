"""Momentum network: target = m * target + (1 - m) * online, after every optimiser step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mcl import ops


def momentum(base: float, step: int, steps: int, final: float = 1.0) -> float:
    """Momentum at a step, which changes from `base` to `final` along a half cosine."""
    return final - (final - base) * (math.cos(math.pi * step / steps) + 1) / 2


@torch.no_grad()
def update(target: Iterable[Tensor], online: Iterable[Tensor], m: float, found_inf: Tensor | None = None) -> None:
    """Moves target parameters towards the online ones, in place. Buffers are not averaged, as in the released code.

    Args:
        target, online: parameters of both networks.
        m: momentum.
        found_inf: one float32 on their device; if it is not 0, nothing changes.
    """
    ops.ema_(list(target), list(online), m, found_inf)
