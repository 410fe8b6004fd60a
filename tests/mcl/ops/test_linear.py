"""Linear layers by oneDNN: PyTorch's, in float64, are the oracle."""

import torch
from torch import Tensor, nn

from mcl.models import layers
from mcl.ops import linear


def test_linear_layers_are_pytorchs() -> None:
    """By another library, in fp32; oracle in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 70)
    layers.use(layer)
    x, grad = torch.randn(90, 40), torch.randn(90, 70)

    def gradients(x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = layer(x)
        assert (type(y.grad_fn).__name__ == "_LinearBackward") == linear.serves(x)
        return [y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]

    ours = gradients(x, grad)
    assert torch.equal(gradients(x.t().contiguous().t(), grad)[0], ours[0])  # whatever the layout
    assert gradients(x[:0], grad[:0])[2].eq(0).all()  # of no rows
    layer.double()
    for y, expected in zip(ours, gradients(x.double(), grad.double()), strict=True):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
