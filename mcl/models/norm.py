"""BatchNorm of groups of rows, with the addition and the ReLU that follow it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mcl.ops.batch_norm import batch_norm, serves


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
