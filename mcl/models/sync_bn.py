"""BatchNorm whose statistics are those of all processes together: PyTorch's on GPUs, ours on CPUs.

apex has two BatchNorms over groups of processes, and neither serves here. A module of theirs keeps the statistics of
its last call only, for backward too, while a norm of MCL is called per view and level before one backward; and they
take fp16 alone and reach no further than a machine.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
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
        y, mean, var, count = normalize(x, self.weight, self.bias, self.eps)
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


def normalize(
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
    total = all_reduce(torch.cat([sums.flatten(), own[None]]))
    (mean, square), count = (total[:-1] / total[-1]).view_as(sums), total[-1]
    var = (square - mean.square()).clamp(min=0)
    scale = (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight
    shift, factor = (v.to(wide).view(-1, *[1] * (x.dim() - 2)) for v in (mean, scale))
    y = (wide - shift) * factor
    if bias is not None:
        y = y + bias.view_as(shift)
    return y.to(x.dtype), mean, var, count
