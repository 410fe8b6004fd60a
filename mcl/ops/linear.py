"""Linear layers in fp32 on CPUs, multiplied by oneDNN."""

from typing import Any

import torch
from torch import Tensor


def serves(x: Tensor) -> bool:
    """Whether :func:`linear` takes this tensor."""
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return onednn and x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and x.numel() > 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, forward and backward.

    PyTorch asks MKL for products of fp32, which does half as much per second on CPUs that are not Intel's.

    Args:
        x: (n, c), of which :func:`serves` approves.
        weight: (d, c).
        bias: (d,).

    Returns:
        (n, d).
    """
    y: Tensor = _Linear.apply(bias, x, weight)
    return y


class _Linear(torch.autograd.Function):
    # The bias comes first, so that its gradient does, as in PyTorch: the order in which DDP fills its buckets.
    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        of_bias, of_x, of_weight = ctx.needs_input_grad
        return (
            grad.sum(0) if of_bias else None,
            _product(grad, weight) if of_x else None,
            _product(grad.t(), x) if of_weight else None,
        )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of contiguous matrices or such transposed; oneDNN takes forever for others."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return product
