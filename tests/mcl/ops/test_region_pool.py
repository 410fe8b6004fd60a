"""region_pool, compared with cases by hand, the reshape, torchvision, and plain PyTorch in the same precision.

Tests of values run the compiled operator and its fallback, torchvision's.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import tile_boxes
from mcl.ops import fallback, region_pool
from mcl.ops.library import compiled
from mcl.ops.region_pool import channels_last
from tests.mcl.ops.regions import LAYOUTS, STRIDES, Pool, check_errors, maps, random_boxes, reshaped, roi_align

SPECIAL = [math.nan, math.inf, -math.inf]


class _Fallback(torch.autograd.Function):
    """Uses the fallback, even if the extension is there."""

    @staticmethod
    def forward(ctx: Any, strides: Any, boxes: Tensor, index: Tensor, size: int, ratio: int, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(boxes, index)
        ctx.rest = [side for f in maps for side in f.shape], strides, ratio, channels_last(maps)
        return fallback.region_pool(list(maps), strides, boxes, index, size, ratio)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sizes, strides, ratio, last = ctx.rest
        grads = fallback.region_pool_backward(grad, sizes, strides, *ctx.saved_tensors, ratio, last)
        return None, None, None, None, None, *grads


def without_the_extension(
    features: list[Tensor], strides: list[float], boxes: Tensor, index: Tensor, size: int, sampling_ratio: int = 0
) -> Tensor:
    result: Tensor = _Fallback.apply(strides, boxes, index, size, sampling_ratio, *features)
    return result


@pytest.fixture(params=["compiled", "fallback"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    if request.param == "compiled":
        assert compiled("region_pool", "cpu"), "the extension is not built"
        yield region_pool
    else:
        yield without_the_extension


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_is_the_reshape_bit_for_bit(pool: Pool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Four levels in one call, forward and backward; our operator also copies NaN and Inf."""
    geometry = Geometry(cells=3)
    canvases = geometry.canvases(32)
    features = [torch.randn(n, 6, 3 * r, 3 * r) for n, r in zip(canvases, geometry.ratios, strict=True)]
    if pool is region_pool:
        features[1][0, 0, 0, :3] = torch.tensor(SPECIAL)
    features = [f.to(dtype).contiguous(memory_format=layout).requires_grad_() for f in features]
    boxes = tile_boxes(geometry, 32).clone()
    tiles = geometry.tiles(32)
    index = torch.arange(4).repeat_interleave(torch.tensor(tiles))
    first = torch.tensor([sum(canvases[:i]) for i in range(4)])[index]
    boxes[:, 0] -= first
    for sampling_ratio in (0, 1):
        pooled = pool(features, [32 / r for r in geometry.ratios], boxes, index, 3, sampling_ratio)
        expected = torch.cat([reshaped(f, r) for f, r in zip(features, geometry.ratios, strict=True)])
        torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
        assert pooled.is_contiguous(memory_format=layout)
        grad = torch.randn(pooled.shape).to(dtype)
        for ours, theirs, f in zip(
            torch.autograd.grad(pooled, features, grad), torch.autograd.grad(expected, features, grad), features,
            strict=True,
        ):  # fmt: skip
            assert torch.equal(ours, theirs)
            assert ours.stride() == f.stride()


def test_by_hand(pool: Pool) -> None:
    """A 4 x 4 ramp with values 10 y + x: a bin's mean is the ramp's value at the bin's centre; gradients are bilinear
    weights."""
    ramp = (torch.arange(4.0)[:, None] * 10 + torch.arange(4.0)).view(1, 1, 4, 4).requires_grad_()
    boxes = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0], [0.0, 0.5, 1.5, 2.5, 3.5]])  # in cells: pixels at stride 1
    pooled = pool([ramp], [1.0], boxes, torch.zeros(2, dtype=torch.int64), 1)
    # Centres of the boxes, (2, 2) and (1.5, 2.5), are at 1.5, 1.5 and at 1.0, 2.0 in cell coordinates.
    torch.testing.assert_close(pooled.flatten(), torch.tensor([16.5, 21.0]))
    (grad,) = torch.autograd.grad(pooled[1].sum(), ramp)
    # Four samples, half a cell around (1, 2): the outer product of (1/4, 1/2, 1/4) with itself.
    line = torch.tensor([0.25, 0.5, 0.25])
    expected = torch.zeros(4, 4)
    expected[1:4, 0:3] = line[:, None] * line
    torch.testing.assert_close(grad[0, 0], expected)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_box_agrees_with_torchvision(pool: Pool, ratio: int, layout: torch.memory_format) -> None:
    boxes, index = random_boxes(60, [3, 2, 1], 128, seed=ratio)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        features = maps(dtype, layout)
        ours, theirs = (
            pool(features, STRIDES, boxes, index, 7, ratio),
            roi_align(features, STRIDES, boxes, index, 7, ratio),
        )
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        grad = torch.randn_like(ours)
        pairs = zip(torch.autograd.grad(ours, features, grad), torch.autograd.grad(theirs, features, grad), strict=True)
        for a, b in pairs:
            # A cell is the sum over up to 60 boxes.
            torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)


def test_a_scaled_map_with_scaled_boxes_is_the_same(pool: Pool) -> None:
    """A stride only sets the unit of boxes."""
    features, (boxes, index) = maps(torch.float64, torch.channels_last)[:1], random_boxes(20, [3], 128, seed=1)
    half = boxes * torch.tensor([1, 0.5, 0.5, 0.5, 0.5])
    assert torch.equal(pool(features, [32.0], boxes, index, 5), pool(features, [16.0], half, index, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [0, 2])
def test_errs_at_most_twice_as_much_as_plain_pytorch(
    pool: Pool, dtype: torch.dtype, layout: torch.memory_format, ratio: int
) -> None:
    check_errors(pool, maps(dtype, layout, channels=24), *random_boxes(40, [3, 2, 1], 128, seed=3), 7, ratio)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_twice(pool: Pool, layout: torch.memory_format) -> None:
    features, (boxes, index) = maps(torch.float64, layout, channels=2), random_boxes(6, [3, 2, 1], 128, seed=5)
    boxes[0, 1:] = torch.tensor([0.0, 0.0, 64.0, 64.0])  # a copied box
    boxes[0, 0], index[0] = 1, 0

    def run(*f: Tensor) -> Tensor:
        return pool(list(f), STRIDES, boxes, index, 2)

    assert torch.autograd.gradcheck(run, features)
    if pool is region_pool:
        assert torch.autograd.gradgradcheck(run, features)


def test_any_strides_of_memory(pool: Pool) -> None:
    """Slices, transposes, and gradients that are expanded or have another layout, are read without a copy."""
    whole = torch.randn(4, 9, 12, 10, dtype=torch.float64)
    boxes, index = random_boxes(30, [2], 100, seed=2)
    odd = whole[::2, 1::2].transpose(2, 3)
    for features in (odd, whole[::2, 1::2].contiguous(memory_format=torch.channels_last)[:, :, ::3]):
        features = features.detach().requires_grad_()
        plain = features.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        ours, theirs = pool([features], [8.0], boxes, index, 3), pool([plain], [8.0], boxes, index, 3)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
        weights = torch.randn(1, 4, 1, 3, dtype=torch.float64)
        (a,), (b,) = (torch.autograd.grad(o, f, weights.expand_as(o)) for o, f in ((ours, features), (theirs, plain)))
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_boxes_that_are_none_give_zero_and_no_gradient(pool: Pool, ratio: int, layout: torch.memory_format) -> None:
    features = maps(torch.float32, layout)
    good = [0.0, 10.0, 20.0, 70.0, 80.0]
    bad = [[*good[:i], value, *good[i + 1 :]] for i in range(5) for value in SPECIAL]
    bad += [[0, 70, 20, 10, 80], [0, 10, 80, 70, 20]]  # reversed
    bad += [[0, -3e38, 0, 3e38, 50]]  # the width overflows a float
    bad += [[0, 500, 500, 600, 600], [0, -200, -200, -100, -100], [0, 1e30, 1e30, 2e30, 2e30]]  # outside
    bad += [[-1, *good[1:]], [3, *good[1:]], [1e9, *good[1:]]]  # no such row
    boxes = torch.tensor([*bad, good, good, good])
    index = torch.zeros(len(boxes), dtype=torch.int64)
    index[-2:] = torch.tensor([-1, 3])  # no such map
    pooled = pool(features, STRIDES, boxes, index, 3, ratio)
    there = len(bad)
    assert pooled[there].abs().sum() > 0
    pooled_elsewhere = torch.cat([pooled[:there], pooled[there + 1 :]])
    assert torch.equal(pooled_elsewhere, torch.zeros_like(pooled_elsewhere))
    every = torch.autograd.grad(pooled.sum(), features)
    only = torch.autograd.grad(pool(features, STRIDES, boxes[[there]], index[[there]], 3, ratio).sum(), features)
    assert all(torch.equal(a, b) for a, b in zip(every, only, strict=True))


def test_boxes_without_area(pool: Pool) -> None:
    """Adaptive sampling covers no cell, so the result is 0. A fixed ratio takes all samples at one point, as in
    torchvision."""
    features, index = maps(torch.float32, torch.contiguous_format)[:1], torch.zeros(2, dtype=torch.int64)
    boxes = torch.tensor([[1.0, 50.0, 50.0, 50.0, 50.0], [1.0, 50.0, 10.0, 50.0, 90.0]])
    assert pool(features, [32.0], boxes, index, 2).count_nonzero() == 0
    pooled = pool(features, [32.0], boxes, index, 2, 1)
    torch.testing.assert_close(pooled, roi_align(features, [32.0], boxes, index, 2, 1))
    assert pooled.count_nonzero() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_not_finite_stays_where_it_is(special: float, layout: torch.memory_format) -> None:
    """Beside a box, it is never multiplied by a weight of zero; in a box, it reaches only the bins that have a weight
    on it."""
    features = torch.ones(1, 3, 8, 8).contiguous(memory_format=layout)
    features[0, :, :, 4] = special
    features.requires_grad_()
    boxes = torch.tensor([[0, 0, 0, 4, 4.0], [0, 0, 0, 8, 4], [0, 0.5, 0, 4.5, 4], [0, 0.25, 0, 4.25, 4]])
    pooled = region_pool([features], [1.0], boxes, torch.zeros(4, dtype=torch.int64), 4, 1)
    # The second box has bins of two cells, with samples between cells. The others have one sample per cell; the third
    # is half a cell off the centres, so that its last bin reads the special column.
    finite = torch.tensor([[True] * 4, [True, True, False, True], [True] * 3 + [False], [True] * 3 + [False]])
    assert torch.equal(pooled[:, 0, 0].isfinite(), finite)
    assert bool((pooled.where(pooled.isfinite(), 1) == 1).all())

    grad = torch.ones_like(pooled)
    grad[0, :, 1] = special
    (grads,) = torch.autograd.grad(pooled, features, grad)
    expected = torch.ones(8, dtype=torch.bool)
    expected[1] = False
    assert torch.equal(grads[0, 0, :, 0].isfinite(), expected)
    assert bool(grads[0, :, :, 4:].isfinite().all())


def test_maps_of_one_cell_no_canvas_no_box_and_no_channel(pool: Pool) -> None:
    one = torch.full((1, 2, 1, 1), 3.0).requires_grad_()
    boxes = torch.tensor([[0.0, 0.0, 0.0, 32.0, 32.0], [0.0, 8.0, 8.0, 40.0, 24.0]])
    pooled = pool([one], [32.0], boxes, torch.zeros(2, dtype=torch.int64), 2)
    assert torch.equal(pooled, torch.full((2, 2, 2, 2), 3.0))
    assert torch.autograd.grad(pooled.sum(), one)[0].flatten().tolist() == [8, 8]

    none = torch.empty(0, 2, 4, 4, requires_grad=True)
    pooled = pool([none, one], [8.0, 32.0], boxes, torch.zeros(2, dtype=torch.int64), 2)
    assert pooled.count_nonzero() == 0
    grads = torch.autograd.grad(pooled.sum(), [none, one])
    assert (grads[0].shape, grads[1].count_nonzero().item()) == (none.shape, 0)

    no_box = pool([one], [32.0], boxes[:0], torch.zeros(0, dtype=torch.int64), 2)
    assert no_box.shape == (0, 2, 2, 2)
    assert torch.autograd.grad(no_box.sum(), one)[0].count_nonzero() == 0
    assert pool([one[:, :0]], [32.0], boxes, torch.zeros(2, dtype=torch.int64), 2).shape == (2, 0, 2, 2)


def test_huge_boxes_take_no_more_samples_than_the_map_has_cells(pool: Pool) -> None:
    features = torch.ones(1, 1, 4, 4, requires_grad=True)
    boxes = torch.tensor([[0.0, -1e6, -1e6, 1e6, 1e6]])
    pooled = pool([features], [1.0], boxes, torch.zeros(1, dtype=torch.int64), 7)
    assert bool(pooled.isfinite().all())
    torch.autograd.grad(pooled.sum(), features)


@pytest.mark.parametrize("ratio", [0, 2])
def test_torchvision_in_its_place_gives_the_same(ratio: int) -> None:
    """For tiles and any boxes, in float64, forward and backward, except for bins that are larger than their map."""
    boxes, index = random_boxes(200, [3, 2, 1], 128, seed=8 + ratio)
    boxes[:20, 1:] *= 3
    features = maps(torch.float64, torch.channels_last)
    ours, theirs = (p(features, STRIDES, boxes, index, 4, ratio) for p in (region_pool, without_the_extension))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(o, features, grad) for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


def test_hundred_backwards_give_one_hash() -> None:
    """On all threads, with overlapping boxes; in bf16, in which the order of additions shows most."""
    hashes = set()
    for layout in LAYOUTS:
        features = maps(torch.bfloat16, layout, channels=64)
        boxes, index = random_boxes(200, [3, 2, 1], 128, seed=9)
        pooled = region_pool(features, STRIDES, boxes, index, 7)
        grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        for repetition in range(100):
            torch.set_num_threads(1 + repetition % 3)
            grads = torch.autograd.grad(pooled, features, grad, retain_graph=True)
            raw = b"".join(g.contiguous().view(torch.int16).numpy().tobytes() for g in grads)
            hashes.add((layout, hashlib.sha256(raw).hexdigest()))
    assert len(hashes) == 2


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: torch.memory_format) -> None:
    boxes, index = random_boxes(9, [3, 2, 1], 128, seed=4)
    features = maps(torch.float32, layout)
    torch.library.opcheck(torch.ops.mcl.region_pool.default, (features, STRIDES, boxes, index, 3, 2))
    grad = torch.randn(9, 5, 3, 3, requires_grad=True)
    sizes = [side for f in features for side in f.shape]
    last = layout == torch.channels_last
    torch.library.opcheck(torch.ops.mcl.region_pool_backward.default, (grad, sizes, STRIDES, boxes, index, 2, last))


class Regions(nn.Module):
    """A convolution, and pooling of regions from its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, a: Tensor, b: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
        return region_pool([self.conv(a), self.conv(b)], [8.0, 4.0], boxes, index, 2)


def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    boxes, index = random_boxes(7, [2, 1], 32, seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 4, 4, generator=generator), torch.randn(1, 3, 8, 8, generator=generator), boxes, index


def test_compile_fullgraph_and_export() -> None:
    module = Regions()
    expected = module(*inputs())
    grads = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    compiled_module = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled_module(*inputs()), expected)
    again = torch.autograd.grad(compiled_module(*inputs()).square().sum(), list(module.parameters()))
    torch.testing.assert_close(again, grads)

    exported = torch.export.export(module, inputs())
    assert "mcl.region_pool" in str(exported.graph)
    torch.testing.assert_close(exported.module()(*inputs(1)), module(*inputs(1)))


def test_autocast_keeps_boxes_and_widens_maps() -> None:
    module = Regions()
    a, b, boxes, index = inputs()
    boxes += 0.001  # bf16 cannot represent it
    with torch.autocast("cpu", torch.bfloat16):
        low = module(a, b, boxes, index)
        mixed = region_pool([module.conv(a), b[:, [0, 0, 0, 0]]], [8.0, 4.0], boxes, index, 2)
        bare = region_pool([a, b], [8.0, 4.0], boxes, index, 2)
    assert (low.dtype, mixed.dtype, bare.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(bare, region_pool([a, b], [8.0, 4.0], boxes, index, 2))
    low.sum().backward()
    assert module.conv.weight.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "features: 0 maps"),
        ({"features": [torch.zeros(1, 2, 4, 4)] * 9, "strides": [1.0] * 9}, "features: 9 maps; 1 to 8"),
        ({"features": [torch.zeros(2, 4, 4)]}, r"features: shapes \[\(2, 4, 4\)\]"),
        ({"features": [torch.zeros(1, 2, 0, 4)]}, "no empty side"),
        ({"features": [torch.zeros(1, 2, 4, 4, dtype=torch.int64)]}, "floating-point"),
        ({"strides": [1.0, 2.0]}, "strides:"),
        ({"strides": [0.0]}, "strides:"),
        ({"boxes": torch.zeros(3, 4)}, r"boxes: .*\(3, 4\) must be"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "index: torch.int32"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, r"index: .*\(2,\)"),
        ({"boxes": torch.zeros(3, 5, device="meta")}, "one device"),
        ({"output_size": 0}, "output_size: 0"),
        ({"sampling_ratio": -1}, "sampling_ratio: -1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    right = {
        "features": [torch.zeros(1, 2, 4, 4)],
        "strides": [1.0],
        "boxes": torch.zeros(3, 5),
        "index": torch.zeros(3, dtype=torch.int64),
        "output_size": 2,
    }
    with pytest.raises(ValueError, match=message):
        region_pool(**{**right, **change})


def test_the_bare_operator_refuses_what_it_would_read_wrongly() -> None:
    """If called directly, without Python's checks; there must be no access out of bounds."""
    f, boxes, index = torch.zeros(1, 2, 4, 4), torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    bare = torch.ops.mcl.region_pool
    for arguments in (
        ([f], [1.0], boxes[:, :4], index, 2, 0),
        ([f], [1.0], boxes, index[:2], 2, 0),
        ([f], [1.0], boxes, index.int(), 2, 0),
        ([f, f[:, :1]], [1.0, 1.0], boxes, index, 2, 0),
        ([f], [], boxes, index, 2, 0),
        ([f], [1.0], boxes, index, 0, 0),
        ([f.long()], [1.0], boxes, index, 2, 0),
    ):
        with pytest.raises(RuntimeError, match="region_pool"):
            bare(*arguments)
    with pytest.raises(RuntimeError, match="one row per box"):
        torch.ops.mcl.region_pool_backward(torch.zeros(2, 2, 2, 2), [1, 2, 4, 4], [1.0], boxes, index, 0, False)
