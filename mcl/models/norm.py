"""BatchNorm of groups of rows, with the addition and the ReLU that follow it; and over all processes together.

Statistics of several processes are PyTorch's on GPUs and ours on CPUs. apex has two BatchNorms over groups of
processes, and neither serves here. A module of theirs keeps the statistics of its last call only, for backward too,
while a norm of MCL is called per view and level before one backward; and they take fp16 alone and reach no further than
a machine.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mcl import distributed
from mcl.ops.batch_norm import batch_norm, serves

Model = TypeVar("Model", bound=nn.Module)


def normalize(
    norm: nn.Module, x: Tensor, counts: Sequence[int] = (), residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """A BatchNorm of groups of rows, each by itself and in their order; then `residual` is added and ReLU taken.

    Args:
        norm: one operator does it all where it is one of ours that trains on a CPU.
        x: (n, c) or (n, c, h, w).
        counts: rows per group, n together; without them all rows are one.
        residual: as x.
    """
    if isinstance(norm, _Grouped):
        y: Tensor = norm(x, counts, residual, relu)
        return y
    return _one_after_the_other(norm, x, counts, residual, relu)


class _Grouped(_BatchNorm):
    def forward(
        self, x: Tensor, counts: Sequence[int] = (), residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """As :func:`normalize`."""
        if not self.training or self.momentum is None or torch.compiler.is_compiling() or not serves(x):
            return _one_after_the_other(super().forward, x, counts, residual, relu)
        groups = list(counts) or [len(x)]
        running = None
        if self.running_mean is not None and self.running_var is not None:
            running = self.running_mean, self.running_var
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += len(groups)
        return batch_norm(x, self.weight, self.bias, running, groups, self.momentum, self.eps, residual, relu)


class BatchNorm1d(_Grouped, nn.BatchNorm1d):
    """PyTorch's, for groups of rows."""


class BatchNorm2d(_Grouped, nn.BatchNorm2d):
    """PyTorch's, for groups of rows."""


def _one_after_the_other(
    norm: Callable[[Tensor], Tensor], x: Tensor, counts: Sequence[int], residual: Tensor | None, relu: bool
) -> Tensor:
    y = torch.cat([norm(rows) for rows in x.split(list(counts))]) if len(counts) > 1 else norm(x)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def synchronize(model: Model, device: str) -> Model:
    """Synchronises every BatchNorm1d and BatchNorm2d of a model across processes, in place; a single one needs nothing.

    Parameters and buffers stay the same tensors under the same names.

    Args:
        model: the network, before DistributedDataParallel wraps it.
        device: type of the device that it runs on, "cuda" or "cpu".
    """
    if distributed.world_size() == 1:
        return model
    if device == "cuda":
        synchronized: Model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return synchronized
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm  # type: ignore[assignment]  # same state; who holds the module keeps it
    return model


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batches of all processes, of any sizes but zero, for (N, C, ...) on CPUs.

    Each direction is one all-reduce. Gradients of weight and bias are each process's own part, as in PyTorch's module:
    DistributedDataParallel averages them. In evaluation mode, and where there is no process group, it is BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = synchronized(x, self.weight, self.bias, self.eps)
        self._track(mean, var * (count / (count - 1)))
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        if self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            step = new - running
            running += step / self.num_batches_tracked if self.momentum is None else step * self.momentum

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"x: shape {tuple(x.shape)} must be (N, C, ...)")


def synchronized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) * weight + bias with the mean and the biased variance of all processes' x.

    Statistics are computed in float64, the rest in fp32 or wider. Autograd goes through the all-reduce.

    Returns:
        The normalised x, in its dtype and memory format; then, in float64, mean and variance (C,) and the number of
        values per channel ().
    """
    wide, dims = x.to(torch.promote_types(x.dtype, torch.float32)), [0, *range(2, x.dim())]
    sums = torch.stack([wide.double().sum(dims), wide.double().square().sum(dims)])
    own = sums.new_tensor(x.numel() // x.shape[1])
    total: Tensor = _AllReduce.apply(torch.cat([sums.flatten(), own[None]]))
    (mean, square), count = (total[:-1] / total[-1]).view_as(sums), total[-1]
    var = (square - mean.square()).clamp(min=0)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shift, factor = (v.to(wide).view(-1, *[1] * (x.dim() - 2)) for v in (mean, scale))
    y = (wide - shift) * factor
    if bias is not None:
        y = y + bias.view_as(shift)
    return y.to(x.dtype), mean, var, count


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, grad)
