"""Convolutions to few cells: PyTorch's is the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mcl.models import conv, layers
from mcl.ops import conv2d_small

SHAPES = [  # n, c, h, w, d, k, stride, padding
    (3, 4, 2, 2, 5, 3, 1, 1),
    (3, 4, 1, 1, 5, 3, 1, 1),  # seven or eight of nine taps meet padding
    (1, 1, 2, 2, 1, 3, 1, 1),
    (2, 3, 1, 4, 2, 3, 1, 1),
    (3, 4, 4, 4, 5, 3, 2, 1),  # the stride of a stage
    (2, 4, 3, 3, 5, 3, 2, 1),
    (3, 4, 4, 4, 5, 1, 2, 0),  # and of its shortcut
    (3, 4, 2, 2, 5, 1, 1, 0),
    (2, 3, 5, 4, 4, 7, 2, 3),
    (2, 3, 4, 4, 4, 3, 1, 0),  # no padding
]


def tensors(n: int, c: int, h: int, w: int, d: int, k: int, layout: torch.memory_format) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, c, k, k, generator=generator, dtype=torch.float64)
    return tuple(t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_convolution(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    *sizes, stride, padding = shape
    x, weight = tensors(*sizes, layout=layout)  # type: ignore[arg-type]
    expected = F.conv2d(x, weight, None, stride, padding)
    y = conv2d_small(x, weight, stride, padding)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)

    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_gradient_of_what_needs_it_alone() -> None:
    x, weight = tensors(3, 4, 2, 2, 5, 3, torch.channels_last)
    conv2d_small(x.detach(), weight, 1, 1).sum().backward()
    assert weight.grad is not None
    weight.grad = None
    conv2d_small(x, weight.detach(), 1, 1).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def model() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    layers.use(block)
    return block


@pytest.mark.parametrize(("side", "small"), [(1, True), (2, True), (3, False), (8, False)])
def test_module_chooses_by_the_cells_of_its_output(side: int, small: bool) -> None:
    layer, x = model()[0], torch.randn(2, 3, side, side)
    y = layer(x)
    assert (type(y.grad_fn).__name__ == "_SmallConv2dBackward") == small
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, None, 1, 1))


@pytest.mark.parametrize("shape", [(16, 64, 2, 2, 32, 3, 1, 1), (16, 64, 4, 4, 32, 3, 2, 1)], ids=str)
def test_bf16_is_as_close_to_the_truth_as_pytorchs(shape: tuple[int, ...]) -> None:
    *sizes, stride, padding = shape
    exact = tensors(*sizes, layout=torch.channels_last)  # type: ignore[arg-type]
    rounded = [t.detach().bfloat16().requires_grad_() for t in exact]
    exact = tuple(t.detach().double().requires_grad_() for t in rounded)
    results = []
    for inputs, convolve in ((exact, F.conv2d), (rounded, F.conv2d), (rounded, conv2d_small)):
        arguments = (None, stride, padding) if convolve is F.conv2d else (stride, padding)
        y = convolve(*inputs, *arguments)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
        results.append([t.double() for t in (y, *torch.autograd.grad(y, inputs, grad))])
    for truth, theirs, ours in zip(*results, strict=True):
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm()
        assert (ours - truth).norm() <= 2**-8 * truth.norm()


@pytest.mark.parametrize("has_instructions", [False, True])
def test_autocast_is_followed(monkeypatch: pytest.MonkeyPatch, has_instructions: bool) -> None:
    """In bf16, by PyTorch where the CPU has no instructions for it; weights' gradients are fp32."""
    monkeypatch.setattr(conv, "_multiplies", lambda dtype: has_instructions and dtype == torch.bfloat16)
    layer, x = model()[0], torch.randn(2, 3, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (type(y.grad_fn).__name__ == "_SmallConv2dBackward") == has_instructions
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert "SmallConv2d" not in str(layer(x).grad_fn)


def test_module_leaves_other_devices_to_pytorch() -> None:
    layer, x = model()[0], torch.randn(2, 3, 2, 2)
    assert "SmallConv2d" not in str(layer.to("meta")(x.to("meta")).grad_fn)


def test_parameters_keep_their_names() -> None:
    assert next(iter(model().state_dict())) == "0.weight"
