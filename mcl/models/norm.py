"""The one BatchNorm: of groups of rows, with the addition and the ReLU that follow it, over all processes."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mcl.ops.batch_norm import batch_norm


class BatchNorm(_BatchNorm):
    """PyTorch's BatchNorm1d and BatchNorm2d, parameters and buffers included; see :func:`mcl.ops.batch_norm.batch_norm`
    for what it is in training.

    Where there are several processes, all of them have to call it in training mode.
    """

    def forward(
        self, x: Tensor, counts: Sequence[int] = (), residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Normalises groups of rows, each by itself and in their order; then adds `residual` and takes ReLU, if wanted.

        Args:
            x: (n, c) or (n, c, h, w).
            counts: rows per group, n together; without them all rows are one.
            residual: as x.
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
