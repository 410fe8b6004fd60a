"""BatchNorm in training, with the addition and the ReLU that follow it: groups of rows, over all processes.

Statistics are one tensor (groups, 2 c + 1), which processes exchange in one collective: c means, c sums of squared
distances from the mean (later replaced by 1 / standard deviation), and the number of rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mcl import distributed
from mcl.ops.library import library

Running = tuple[Tensor | None, Tensor | None, Tensor | None]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running,
    counts: Sequence[int],
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``relu(F.batch_norm(x, training=True) + residual)`` for groups of rows, each with statistics of its own.

    Statistics are those of the rows of all processes. Forward and backward need one collective each, for all groups.
    Arithmetic is in fp32, in fp64 if x is, and rounded once. The order of additions does not depend on the number of
    threads. Nothing is read back from the device. Gradients of weight and bias are those of the process;
    DistributedDataParallel averages them.

    Args:
        x: (n, c) or (n, c, h, w); float16, bfloat16, float32 or float64.
        weight: (c,) float64 if x is float64, otherwise float32; None: 1.
        bias: as weight; None: 0.
        running: mean and variance (c,) and the number of batches (), or None; updated in place, group after group.
        counts: number of rows of each group; the sum is n.
        momentum: weight of a group's statistics in the running statistics; None: the mean of all groups so far.
        eps: added to the variance.
        residual: as x; added to the normalised values.
        relu: whether to apply ReLU to the sum.

    Returns:
        As x, channels_last.

    Raises:
        ValueError: x has other dimensions, or a group has one value per channel, which has no variance.
    """
    if x.dim() not in (2, 4):
        raise ValueError(f"x: shape {tuple(x.shape)} must be (n, c) or (n, c, h, w)")
    processes = distributed.world_size()
    if min(counts) * x[0, 0].numel() * processes < 2:
        raise ValueError(
            f"x: shape {tuple(x.shape)} in groups of {list(counts)}: more than one value per channel needed"
        )
    x, counts = _channels_last(x), list(counts)
    with torch.no_grad():
        if processes == 1:
            statistics = torch.ops.mcl.batch_norm_stats_alone(x, counts, *running, momentum, eps)
        else:
            own = torch.ops.mcl.batch_norm_stats(x, counts)
            parts = own.new_empty(processes, *own.shape[1:])
            dist.all_gather_into_tensor(parts, own)
            statistics = torch.ops.mcl.batch_norm_combine(parts, *running, momentum, eps)
    if residual is not None:
        residual = _channels_last(residual).to(x.dtype)
    y: Tensor = _Normalize.apply(x, weight, bias, statistics, counts, residual, relu)
    return y


class _Normalize(torch.autograd.Function):
    """Normalises rows with given statistics; the gradient includes the path through the statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, counts: list[int],
        residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        y: Tensor = torch.ops.mcl.batch_norm_apply(x, weight, bias, statistics, counts, residual, relu)
        # Without a residual, backward computes from x which values ReLU has passed.
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, statistics)
        ctx.counts, ctx.relu, ctx.added = counts, relu, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, statistics = ctx.saved_tensors
        grad = _channels_last(grad)
        sums, (of_bias, of_weight), passed = torch.ops.mcl.batch_norm_backward_reduce(
            grad, x, y, weight, bias, statistics, ctx.counts, ctx.relu
        )
        if distributed.world_size() > 1:
            sums = distributed.add_up(sums)
        if y is not None:
            grad = passed
        of_x = torch.ops.mcl.batch_norm_backward_apply(
            grad, x, weight, bias, statistics, sums, ctx.counts, ctx.relu and y is None
        )
        parameters = None if weight is None else of_weight, None if bias is None else of_bias
        return of_x, *parameters, None, None, grad if ctx.added else None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def _small(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("mcl::batch_norm_stats", lib=library)
def _fake_stats(x: Tensor, counts: list[int]) -> Tensor:
    return _small(x, 1, len(counts), 2 * x.shape[1] + 1)


@torch.library.register_fake("mcl::batch_norm_stats_alone", lib=library)
def _fake_stats_alone(x: Tensor, counts: list[int], *rest: object) -> Tensor:
    return _small(x, len(counts), 2 * x.shape[1] + 1)


@torch.library.register_fake("mcl::batch_norm_combine", lib=library)
def _fake_combine(parts: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(parts[0])


@torch.library.register_fake("mcl::batch_norm_apply", lib=library)
def _fake_apply(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("mcl::batch_norm_backward_reduce", lib=library)
def _fake_backward_reduce(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, statistics: Tensor,
    counts: list[int], relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    passed = _small(x, 0) if y is None else torch.empty_like(x)
    return _small(x, 2, len(counts), x.shape[1]), _small(x, 2, x.shape[1]), passed


@torch.library.register_fake("mcl::batch_norm_backward_apply", lib=library)
def _fake_backward_apply(grad: Tensor, x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x)
