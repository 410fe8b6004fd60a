"""BatchNorm of groups of rows over all processes, fused with the addition and the ReLU that follow it."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mcl.ops.batch_norm import batch_norm


class BatchNorm(_BatchNorm):
    """BatchNorm with the parameters and buffers of PyTorch's BatchNorm1d and BatchNorm2d. In training it calls
    :func:`mcl.ops.batch_norm.batch_norm`, a collective operation.
    """

    def forward(
        self, x: Tensor, counts: Sequence[int] = (), residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Normalises groups of rows separately, in order, then adds `residual` and applies ReLU.

        Args:
            x: (n, c) or (n, c, h, w).
            counts: number of rows in each group; the sum is n. Empty: one group.
            residual: as x; None: 0.
            relu: whether to apply ReLU.
        """
        if self.training:
            running = self.running_mean, self.running_var, self.num_batches_tracked
            groups = list(counts) or [len(x)]
            return batch_norm(x, self.weight, self.bias, running, groups, self.momentum, self.eps, residual, relu)
        y = super().forward(x)
        if residual is not None:
            y += residual
        return y.relu_() if relu else y

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in (2, 4):
            raise ValueError(f"x: shape {tuple(x.shape)} must be (n, c) or (n, c, h, w)")
