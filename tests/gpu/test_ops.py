"""Operators: launches, streams, alignment, and equality with the CPU."""

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mcl import ops
from mcl.ops.batch_norm import batch_norm
from mcl.ops.library import compiled
from tests.gpu.conftest import unwaiting
from tests.mcl.ops.regions import LAYOUTS, STRIDES, Pool, check_errors, maps, random_boxes
from tests.mcl.ops.test_batch_norm import OPERATORS, SHAPES, inputs, reference
from tests.mcl.ops.test_region_pool import without_the_extension
from tests.mcl.ops.test_steps import STEP, lists
from tests.mcl.train.test_optim import NAMES, build, check_equal, everything, set_gradients

pytestmark = pytest.mark.usefixtures("built")


@pytest.mark.gpu
def test_all_operators_are_built_for_cuda() -> None:
    for name in ("region_pool", "region_pool_backward", *OPERATORS, "norms", "lars_", "ema_"):
        assert compiled(name, "cuda"), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 4, 64])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("pool", [ops.region_pool, without_the_extension])
def test_regions_in_float64_equal_the_cpus(
    device: torch.device, pool: Pool, layout: torch.memory_format, channels: int, ratio: int
) -> None:
    """Includes a box that is copied and a NaN box."""
    boxes, index = random_boxes(300, [3, 2, 1], 128, seed=ratio)
    boxes[:2, 1:] = torch.tensor([[0.0, 0.0, 64.0, 64.0], [float("nan")] * 4])
    results = []
    for place, function in ((torch.device("cpu"), ops.region_pool), (device, pool)):
        features = [f.detach().to(place).requires_grad_() for f in maps(torch.float64, layout, channels)]
        pooled = function(features, STRIDES, boxes.to(place), index.to(place), 2, ratio)
        grad = torch.arange(pooled.numel(), device=place).view(pooled.shape).sin().to(pooled.dtype)
        results.append([pooled, *torch.autograd.grad(pooled, features, grad)])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-12, atol=1e-12)
        assert cuda.stride() == cpu.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 2])
def test_regions_err_at_most_twice_as_much_as_plain_pytorch(
    device: torch.device, layout: torch.memory_format, channels: int, dtype: torch.dtype, ratio: int
) -> None:
    boxes, index = random_boxes(300 if device.type == "cuda" else 20, [3, 2, 1], 128, seed=ratio)
    check_errors(ops.region_pool, maps(dtype, layout, channels), boxes, index, 2, ratio, str(device))


def test_hundred_backwards_give_one_hash(device: torch.device) -> None:
    features = [f.detach().to(device).requires_grad_() for f in maps(torch.bfloat16, torch.channels_last, 64)]
    boxes, index = (t.to(device) for t in random_boxes(500, [3, 2, 1], 128, seed=9))
    pooled = ops.region_pool(features, STRIDES, boxes, index, 7)
    grad = torch.randn_like(pooled)
    hashes = set()
    for _ in range(100 if device.type == "cuda" else 2):
        grads = torch.autograd.grad(pooled, features, grad, retain_graph=True)
        raw = b"".join(g.contiguous().view(torch.int16).cpu().numpy().tobytes() for g in grads)
        hashes.add(hashlib.sha256(raw).hexdigest())
    assert len(hashes) == 1


def normalized(
    function: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, shape: tuple[int, ...],
    counts: list[int], added: bool, relu: bool, given: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Output, running statistics and gradients on a device, in `dtype`, for values that `given` can represent."""
    wide = torch.promote_types(dtype, torch.float32)
    x, weight, bias, mean, var, residual, grad = (t.to(device) for t in inputs(shape, given))
    x, residual, grad = (t.to(dtype) for t in (x, residual, grad))
    weight, bias, mean, var = (t.to(wide) for t in (weight, bias, mean, var))
    leaves = [x, weight, bias, *([residual] if added else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    options = (0.1, 1e-5) if function is batch_norm else ()
    y = function(x, weight, bias, (mean, var, None), counts, *options, residual if added else None, relu)
    return [t.cpu() for t in (y, mean, var, *torch.autograd.grad(y, leaves, grad))]


@pytest.mark.parametrize(("added", "relu"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("shape", "counts"), SHAPES, ids=str)
def test_norms_in_float64_equal_the_cpus(
    device: torch.device, shape: tuple[int, ...], counts: list[int], added: bool, relu: bool
) -> None:
    cpu, cuda = (
        normalized(batch_norm, place, torch.float64, shape, counts, added, relu, torch.float64)
        for place in (torch.device("cpu"), device)
    )
    for ours, theirs in zip(cuda, cpu, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("added", [False, True])
def test_norms_err_at_most_twice_as_much_as_plain_pytorch(
    device: torch.device, dtype: torch.dtype, added: bool
) -> None:
    case = ((8, 64, 30, 30), [5, 3], added, True, dtype)
    truth, theirs, ours = (
        normalized(function, device, kind, *case)
        for function, kind in ((reference, torch.float64), (reference, dtype), (batch_norm, dtype))
    )
    for exact, plain, found in zip(truth, theirs, ours, strict=True):
        error = (found.double() - exact).norm()
        assert error <= 2 * (plain.double() - exact).norm() + 1e-6 * exact.norm()


def test_norms_give_equal_bits_every_time(device: torch.device) -> None:
    case = ((32, 256, 28, 28) if device.type == "cuda" else (32, 8, 2, 2), [20, 12], True, True, torch.bfloat16)
    first, *others = (normalized(batch_norm, device, torch.bfloat16, *case) for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.gpu
def test_another_stream_is_followed() -> None:
    """An operator on a side stream sees work that was queued on this stream before."""
    side = torch.cuda.Stream()
    boxes, index = (t.cuda() for t in random_boxes(50, [1], 64, seed=1))
    with torch.cuda.stream(side):
        f = torch.zeros(1, 64, 64, 64, device="cuda")
        torch.cuda._sleep(50_000_000)
        f.fill_(1.0)
        pooled = ops.region_pool([f], [1.0], boxes, index, 7)
    side.synchronize()
    assert torch.equal(pooled, ops.region_pool([f], [1.0], boxes, index, 7))


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_steps_equal_the_cpus(
    device: torch.device, dtype: torch.dtype, tolerance: float, found_inf: float | None
) -> None:
    """More tensors than fit into one launch; some are not aligned to 16 bytes."""

    def many(place: torch.device) -> list[list[Tensor]]:
        drawn = [each * 40 for each in lists(dtype)]
        moved = [[t.clone().to(place) for t in each] for each in drawn]
        for each in moved:
            storage = torch.zeros(1001, dtype=dtype, device=place)
            storage[1:] = torch.linspace(-1, 1, 1000, dtype=dtype, device=place)
            each.append(storage[1:])
        return moved

    results = []
    for place in (torch.device("cpu"), device):
        weights, grads, momenta = many(place)
        norms = ops.norms(weights + grads)
        flag = None if found_inf is None else torch.tensor(found_inf, device=place)
        ops.lars_(weights, grads, momenta, **STEP, found_inf=flag)
        ops.ema_(grads, weights, 0.9, flag)
        results.append([norms, *weights, *momenta, *grads])
        if found_inf == 1:
            check_equal([t for each in many(place) for t in each], [*weights, *grads, *momenta])
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_found_inf_changes_nothing(device: torch.device, name: str) -> None:
    """In the first step, which creates the state, and in later ones; the host does not wait to read the flag."""
    (model, optimizer), (twin, other) = (build(name, device=str(device)) for _ in range(2))
    with unwaiting(device):
        for seed in (1, 2, 3):
            for p in model.parameters():
                p.grad = torch.full_like(p, math.nan)
            optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
            for each, its in ((model, optimizer), (twin, other)):
                set_gradients(each, seed)
                its.step()
    check_equal(everything(model, optimizer), everything(twin, other))


def test_nothing_waits_for_the_host(device: torch.device) -> None:
    features = [f.detach().to(device).requires_grad_() for f in maps(torch.bfloat16, torch.channels_last, 64)]
    boxes, index = (t.to(device) for t in random_boxes(50, [3, 2, 1], 128, seed=2))
    weights, grads, momenta = ([t.to(device) for t in each] for each in lists(torch.float32))
    with unwaiting(device):
        ops.region_pool(features, STRIDES, boxes, index, 7).sum().backward()
        ops.lars_(weights, grads, momenta, **STEP)
        ops.ema_(weights, grads, 0.9)
