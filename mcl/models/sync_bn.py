"""BatchNorm whose statistics are those of all processes together: PyTorch's on GPUs, ours on CPUs.

apex has two BatchNorms over groups of processes, and neither serves here. A module of theirs keeps the statistics of
its last call only, for backward too, while a norm of MCL is called per view and level before one backward; and they
take fp16 alone and reach no further than a machine.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mcl import distributed

Model = TypeVar("Model", bound=nn.Module)


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
        y, mean, var, count = Normalize.apply(x, self.weight, self.bias, self.eps)
        self._track(mean, var * (count / (count - 1)))
        normalized: Tensor = y
        return normalized

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


class Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with the mean and the biased variance of all processes' x.

    Returns:
        The normalised x, in its dtype and memory format; then, without gradient, float64, mean and variance (C,) and
        the number of values per channel ().
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _statistics(x)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        wide = _wide(x)
        y = F.batch_norm(x, mean.to(wide), var.to(wide), weight, bias, training=False, eps=eps)
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        dtype, wide = x.dtype, _wide(x)
        x, grad, narrow_mean, narrow_var = (t.to(wide) for t in (x, grad, mean, var))
        # With fixed statistics: the gradient of x, and the sums of grad * x_hat and of grad, which are those of weight
        # and bias.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, narrow_mean, narrow_var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([grad_weight, grad_bias]).double()  # (2, C)
        dist.all_reduce(sums)
        # Through the statistics: minus mean(grad) + mean(grad * x_hat) * x_hat, times the scale. That is a BatchNorm.
        scale = (var + ctx.eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        slope, offset = (-scale * sums / count).to(wide).unbind()
        grad_x += F.batch_norm(x, narrow_mean, narrow_var, slope, offset, training=False, eps=ctx.eps)
        _, weighted, biased, _ = ctx.needs_input_grad
        return grad_x.to(dtype), grad_weight if weighted else None, grad_bias if biased else None, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) and values per channel () of all processes' x, in float64."""
    mean, var = torch.batch_norm_update_stats(x.double(), None, None, 0)
    sums = torch.cat([mean, var + mean.square(), mean.new_ones(1)]) * (x.numel() // x.shape[1])
    dist.all_reduce(sums)
    count = sums[-1]
    mean, square = (sums[:-1] / count).chunk(2)
    return mean, (square - mean.square()).clamp(min=0), count


def _wide(x: Tensor) -> torch.dtype:
    """What BatchNorm computes in: fp32 for fp16 and bf16."""
    return torch.promote_types(x.dtype, torch.float32)
