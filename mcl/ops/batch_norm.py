"""BatchNorm in training, with the addition and the ReLU that follow it, on CPUs: fewer passes over memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mcl.ops.library import compiled


def serves(x: Tensor) -> bool:
    """Whether the extension normalises this tensor: float32, float64 or bfloat16, on a CPU.

    Fake tensors stand for those of a GPU, which PyTorch normalises.
    """
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    real = not isinstance(x, FakeTensor)
    return real and compiled("batch_norm", x.device.type) and x.dtype in dtypes and x.dim() in (2, 4)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    counts: Sequence[int],
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``relu(F.batch_norm(x, training=True) + residual)`` for groups of rows, each with statistics of its own.

    Computed in fp32, in fp64 where x is, and rounded once. Sums have one order, whatever the number of threads.

    Args:
        x: (n, c) or (n, c, h, w), of which :func:`serves` approves.
        weight, bias: (c,) float64 where x is and float32 otherwise; 1 and 0 without them.
        running: mean and variance (c,), updated in place, group after group.
        counts: rows of each group, n together; each needs more than one value per channel.
        momentum: part of a group's statistics in the running ones.
        eps: added to the variance.
        residual: as x; added to what was normalised.
        relu: whether the sum is cut off at 0.

    Returns:
        As x, channels_last.

    Raises:
        ValueError: a group with one value per channel, which has no variance.
    """
    cells = x[0, 0].numel()
    if min(counts) * cells < 2:
        raise ValueError(
            f"x: shape {tuple(x.shape)} in groups of {list(counts)}: more than one value per channel needed"
        )
    y: Tensor = _BatchNorm.apply(x, weight, bias, running, list(counts), momentum, eps, residual, relu)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor, Tensor] | None,
        counts: list[int], momentum: float, eps: float, residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        x = _channels_last(x)
        added = None if residual is None else _channels_last(residual).to(x.dtype)
        y, mean, inverse = torch.ops.mcl.batch_norm(
            x, weight, bias, *(running or (None, None)), counts, momentum, eps, added, relu
        )
        # Backward sees in x itself what ReLU let through, unless something was added.
        ctx.save_for_backward(x, y if added is not None else None, weight, bias, mean, inverse)
        ctx.counts, ctx.relu, ctx.residual = counts, relu, None if residual is None else residual.dtype
        normalized: Tensor = y
        return normalized

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, inverse = ctx.saved_tensors
        of_x, of_weight, of_bias, of_residual = torch.ops.mcl.batch_norm_backward(
            _channels_last(grad.to(x.dtype)), x, y, weight, bias, mean, inverse, ctx.counts, ctx.relu
        )
        _, weighted, biased = ctx.needs_input_grad[:3]
        added = None if ctx.residual is None else of_residual.to(ctx.residual)
        return of_x, of_weight if weighted else None, of_bias if biased else None, None, None, None, None, added, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
