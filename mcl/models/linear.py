"""Linear layer that oneDNN multiplies on CPUs."""

import torch
from torch import Tensor, nn

from mcl.ops.linear import linear, serves


class Linear(nn.Linear):
    """PyTorch's, computed otherwise where that is faster: in fp32, on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or not serves(x):
            return super().forward(x)
        return linear(x, self.weight, self.bias)
