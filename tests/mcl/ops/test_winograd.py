"""3x3 convolutions by minimal filtering: PyTorch's, in float64, is the oracle."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl import ops
from mcl.models import layers
from mcl.ops.winograd import MIN_TILES, serves, winograd

pytestmark = pytest.mark.skipif(not ops.compiled("winograd", "cpu"), reason="the extension is not built")

SHAPES = [  # n, c, h, w, d
    (1, 32, 4, 4, 32),  # one tile
    (3, 32, 2, 2, 64),  # the whole map at once
    (30, 96, 2, 2, 32),
    (2, 64, 1, 1, 32),
    (2, 32, 2, 3, 32),  # tiles that stick out
    (1, 32, 1, 6, 32),
    (3, 64, 7, 9, 32),
    (14, 32, 16, 16, 96),  # several chunks
    (7, 288, 8, 8, 320),  # products in two parts
    (1, 32, 37, 50, 32),
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, weight and the gradient of the result."""
    n, c, h, w, d = shape
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.contiguous(memory_format=torch.channels_last)

    wide = torch.promote_types(dtype, torch.float32)
    return [noise(n, c, h, w).to(dtype), (noise(d, c, 3, 3) / (3 * c**0.5)).to(wide), noise(n, d, h, w).to(dtype)]


def results(x: Tensor, weight: Tensor, grad: Tensor, ours: bool) -> list[Tensor]:
    """The convolution and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = winograd(x, weight) if ours else F.conv2d(x, weight.to(x.dtype), padding=1)
    return [y, *torch.autograd.grad(y, (x, weight), grad)]


def test_by_hand() -> None:
    """Each tap of a kernel that has but one moves a map that has but one cell; beyond the border there is nothing."""
    for side in (2, 5):
        for tap in range(9):
            row, column = divmod(tap, 3)
            x = torch.zeros(1, 32, side, side)
            x[0, 3, 1, 0] = 2
            weight = torch.zeros(32, 32, 3, 3)
            weight[7, 3, row, column] = 5
            expected = torch.zeros(1, 32, side, side)
            to_row, to_column = 2 - row, 1 - column
            if to_row < side and to_column >= 0:
                expected[0, 7, to_row, to_column] = 10
            torch.testing.assert_close(winograd(x, weight), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_convolution(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    given = [t.contiguous(memory_format=layout) for t in tensors(shape, torch.float64)]
    for ours, theirs in zip(results(*given, ours=True), results(*given, ours=False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert ours.is_contiguous(memory_format=torch.channels_last)


def test_gradients_by_differences() -> None:
    """Against differences, without another convolution."""
    x, weight, _ = tensors((1, 32, 5, 2, 32), torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(winograd, (x, weight), fast_mode=True)


def test_fp32_is_as_close_to_the_truth_as_it_says() -> None:
    given = tensors((8, 256, 16, 16, 256), torch.float32)
    truth = results(*(t.double() for t in given), ours=False)
    for exact, ours in zip(truth, results(*given, ours=True), strict=True):
        assert (ours - exact).square().mean().sqrt() < 2e-6 * exact.std()


@pytest.mark.parametrize("shape", [(8, 64, 16, 16, 96), (30, 64, 2, 2, 32)], ids=str)
def test_bf16_is_closer_to_the_truth_than_pytorchs(shape: tuple[int, ...]) -> None:
    """Which rounds the weight, too."""
    given = tensors(shape, torch.bfloat16)
    truth = results(*(t.double() for t in given), ours=False)
    rounded = results(*given, ours=False)
    for exact, ours, theirs in zip(truth, results(*given, ours=True), rounded, strict=True):
        assert (ours - exact).norm() < (theirs - exact).norm()


def test_bf16_is_the_nearest() -> None:
    """Rounding to even and NaN, of what comes out of a kernel that changes nothing."""
    weight = torch.zeros(32, 32, 3, 3)
    weight[range(32), range(32), 1, 1] = 1
    x = torch.randn(4, 32, 2, 2).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[1, 5, 1, 1] = float("nan"), float("inf")
    y = winograd(x, weight)
    assert torch.equal(y[2:], x[2:])
    assert y[0, 0].isnan().all()  # a tile is one sum
    assert not y[1].isfinite().all()
    halves = torch.full((1, 32, 2, 2), 1.0).bfloat16()
    ties = winograd(halves, weight * (1 + 2**-8)), winograd(halves, weight * (1 + 3 * 2**-8))
    assert [t.float().unique().tolist() for t in ties] == [[1.0], [1 + 2**-6]]


def test_bits_do_not_depend_on_threads() -> None:
    given = tensors((14, 64, 16, 16, 96), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(*given, ours=True)
        torch.set_num_threads(3)
        three = results(*given, ours=True)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_gradient_of_what_needs_it_alone() -> None:
    x, weight, grad = tensors((2, 32, 4, 4, 32), torch.float64)
    whole = results(x, weight, grad, ours=True)
    for i, leaf in enumerate((x, weight)):
        leaf.requires_grad_()
        winograd(x, weight).backward(grad)
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, whole[1 + i])
        leaf.requires_grad_(False)
    assert not winograd(x, weight).requires_grad


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 48, 4, 4), torch.zeros(32, 48, 3, 3), "multiple of 32, not 48"),
        (torch.zeros(1, 32, 4, 4), torch.zeros(40, 32, 3, 3), "multiple of 32, not 40"),
        (torch.zeros(1, 32, 4, 4), torch.zeros(32, 64, 3, 3), "weight takes 64 channels, x has 32"),
        (torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 1, 1), r"must be \(outputs, inputs, 3, 3\)"),
        (torch.zeros(1, 32, 4, 4).double(), torch.zeros(32, 32, 3, 3), "float64 for a float64 x"),
        (torch.zeros(1, 32, 4, 4).half(), torch.zeros(32, 32, 3, 3), "float32, float64 or bfloat16"),
        (torch.zeros(0, 32, 4, 4), torch.zeros(32, 32, 3, 3), "none of size 0"),
    ],
)
def test_what_it_cannot_do_is_an_error(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        winograd(x, weight)


def test_operators_check_what_they_are_given() -> None:
    x, weight = torch.zeros(1, 32, 4, 4), torch.zeros(32, 32, 3, 3)
    with pytest.raises(RuntimeError, match="x must be channels_last"):
        torch.ops.mcl.winograd(x, weight.contiguous(memory_format=torch.channels_last), False)
    x = x.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="grad must have the dtype and sizes of x"):
        torch.ops.mcl.winograd_weight(x[:, :, :2], x)
    with pytest.raises(RuntimeError, match="grad must have the dtype and sizes of x"):
        torch.ops.mcl.winograd_weight(x.double(), x)


def block(channels: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(channels, 32, bias=False, **options)  # type: ignore[arg-type]
    layers.use(convolution)
    return convolution


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="no AVX-512")
@pytest.mark.parametrize(
    ("channels", "shape", "options", "chosen"),
    [
        (32, (MIN_TILES, 4, 4), {"kernel_size": 3, "padding": 1}, True),
        (32, (MIN_TILES // 4, 5, 8), {"kernel_size": 3, "padding": 1}, True),
        (32, (MIN_TILES - 1, 4, 4), {"kernel_size": 3, "padding": 1}, False),
        (32, (1, 2, 2), {"kernel_size": 3, "padding": 1}, True),
        (32, (99, 1, 8), {"kernel_size": 3, "padding": 1}, False),
        (48, (99, 4, 4), {"kernel_size": 3, "padding": 1}, False),
        (32, (99, 4, 4), {"kernel_size": 3, "padding": 1, "stride": 2}, False),
        (32, (99, 4, 4), {"kernel_size": 3, "padding": 0}, False),
        (32, (99, 4, 4), {"kernel_size": 1}, False),
    ],
)
def test_layer_chooses(channels: int, shape: tuple[int, ...], options: dict[str, int], chosen: bool) -> None:
    layer = block(channels, **options)
    x = torch.randn(shape[0], channels, *shape[1:])
    y = layer(x)
    assert (type(y.grad_fn).__name__ == "_WinogradBackward") == chosen
    layers.use(layer, ours=False)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="no AVX-512")
def test_layer_follows_autocast() -> None:
    """bf16 maps, weights that nobody rounds; nothing for fp16, and float64 stays what it is."""
    layer, x = block(32, kernel_size=3, padding=1), torch.randn(MIN_TILES, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert serves(x.bfloat16(), layer.weight)
    assert (y.dtype, type(y.grad_fn).__name__) == (torch.bfloat16, "_WinogradBackward")
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert not serves(x.half(), layer.weight)
        assert layer(x).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64
