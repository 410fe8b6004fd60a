"""BatchNorm with addition and ReLU, compared with PyTorch's separate operations in float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mcl.ops import fallback
from mcl.ops.batch_norm import Running, batch_norm
from mcl.ops.library import compiled

PARTS = ("stats", "stats_alone", "combine", "apply", "backward_reduce", "backward_apply")
OPERATORS = [f"batch_norm_{part}" for part in PARTS]


@pytest.fixture(params=["compiled", "fallback"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fallback":
        for name in OPERATORS:
            monkeypatch.setattr(torch.ops.mcl, name, getattr(fallback, name))


both = pytest.mark.usefixtures("_implementation")
NONE = (None, None, None)
SHAPES = [
    ((6, 5, 3, 4), [6]),
    ((6, 5, 3, 4), [4, 2]),
    ((7, 16, 1, 1), [3, 4]),
    ((3, 33, 40, 40), [1, 2]),  # several chunks per group, and channels that do not fill vectors
    ((9, 70), [2, 7]),
    ((600, 300), [600]),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias, running mean and variance, residual, gradient."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values

    wide = torch.promote_types(dtype, torch.float32)
    parameters = [noise(shape[1]).to(wide) for _ in range(3)]
    return [3 + 2 * noise(*shape), *parameters, parameters[0].square() + 0.5, noise(*shape), noise(*shape)]


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: Running, counts: list[int],
    residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    groups = [F.batch_norm(rows, *running[:2], weight, bias, True, 0.1, 1e-5) for rows in x.split(counts)]
    y = torch.cat(groups)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


@both
@pytest.mark.parametrize(("added", "relu", "affine"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize(("shape", "counts"), SHAPES, ids=str)
def test_equals_pytorch(shape: tuple[int, ...], counts: list[int], added: bool, relu: bool, affine: bool) -> None:
    x, weight, bias, mean, var, residual, grad = inputs(shape, torch.float64)
    leaves = [x, *([weight, bias] if affine else []), *([residual] if added else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for function in (batch_norm, reference):
        running = mean.clone(), var.clone(), None
        parameters = (weight, bias) if affine else (None, None)
        options = (0.1, 1e-5) if function is batch_norm else ()
        y = function(x, *parameters, running, counts, *options, residual if added else None, relu)  # type: ignore[operator]
        results.append([y, *running[:2], *torch.autograd.grad(y, leaves, grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_is_as_close_to_the_truth_as_pytorchs(dtype: torch.dtype, added: bool) -> None:
    given = inputs((8, 64, 30, 30), dtype)
    results = []
    for function, kind in ((reference, torch.float64), (reference, dtype), (batch_norm, dtype)):
        wide = torch.promote_types(kind, torch.float32)
        x, residual, grad = (given[i].detach().to(kind).requires_grad_() for i in (0, 5, 6))
        weight, bias = (given[i].detach().to(wide).requires_grad_() for i in (1, 2))
        running = given[3].to(wide, copy=True), given[4].to(wide, copy=True), None
        options = (0.1, 1e-5) if function is batch_norm else ()
        y = function(x, weight, bias, running, [5, 3], *options, residual if added else None, True)  # type: ignore[operator]
        assert y.dtype == dtype or kind == torch.float64
        gradients = torch.autograd.grad(y, [x, weight, bias, *([residual] if added else [])], grad)
        results.append([t.double() for t in (y, *running[:2], *gradients)])
    for truth, theirs, ours in zip(*results, strict=True):
        assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm() + 1e-6 * truth.norm()


@both
def test_by_hand() -> None:
    """Two groups of two rows: means 2 and 4, standard deviations 1 and 2."""
    x = torch.tensor([[1.0], [3.0], [2.0], [6.0]], requires_grad=True)
    weight, bias = torch.tensor([3.0]), torch.tensor([1.0])
    running = torch.zeros(1), torch.zeros(1), torch.tensor(3)
    residual = torch.tensor([[0.0], [1.0], [4.0], [-9.0]], requires_grad=True)
    y = batch_norm(x, weight, bias, running, [2, 2], 0.5, 0.0, residual, relu=True)
    assert y.tolist() == [[0.0], [5.0], [2.0], [0.0]]  # -2 + 0, 4 + 1, -2 + 4, 4 - 9
    assert running[0].tolist() == [0.5 * (0.5 * 2) + 0.5 * 4]
    assert running[1].tolist() == [0.5 * (0.5 * 2) + 0.5 * 8]  # unbiased: 2 and 8
    assert running[2].item() == 5
    (of_x, of_residual) = torch.autograd.grad(y.sum(), (x, residual))
    assert of_residual.tolist() == [[0.0], [1.0], [1.0], [0.0]]
    assert of_x.tolist() == [[0.0]] * 4  # of two values, one always becomes -1 and the other 1


@both
def test_statistics_of_values_far_from_zero() -> None:
    """The sum of squares minus the square of the sum would have no correct digit."""
    generator = torch.Generator().manual_seed(0)
    x = (1e4 + torch.randn(64, 8, 32, 32, generator=generator)).contiguous(memory_format=torch.channels_last)
    running = torch.zeros(8), torch.zeros(8), None
    batch_norm(x, None, None, running, [64], 1.0, 1e-5)
    torch.testing.assert_close(running[0].double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(running[1].double(), x.double().var((0, 2, 3)), rtol=1e-3, atol=0)


def test_threads_do_not_change_a_bit() -> None:
    x, weight, bias, mean, var, residual, grad = inputs((16, 48, 40, 40), torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x.grad = residual.grad = None
            y = batch_norm(
                x.requires_grad_(), weight, bias, (mean, var, None), [9, 7], 0.0, 1e-5, residual.requires_grad_(), True
            )
            y.backward(grad)
            results.append([y, x.grad, residual.grad])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@both
def test_what_is_not_finite_stays_so() -> None:
    x = inputs((4, 3, 2, 2), torch.float32)[0]
    x[0, 1] = torch.nan
    y = batch_norm(x, None, None, NONE, [4], 0.1, 1e-5, relu=True)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@both
def test_any_memory_format_is_taken() -> None:
    x = inputs((4, 3, 2, 5), torch.float64)[0]
    other = x.contiguous().clone()
    y = batch_norm(other.requires_grad_(), None, None, NONE, [4], 0.1, 1e-5)
    assert torch.equal(y, batch_norm(x, None, None, NONE, [4], 0.1, 1e-5))
    (of_x,) = torch.autograd.grad(y, other, torch.ones(4, 3, 2, 5, dtype=torch.float64))
    torch.testing.assert_close(of_x, torch.zeros_like(of_x), rtol=0, atol=1e-12)  # shifts change nothing


@both
def test_running_statistics_without_momentum_are_means_of_all_groups() -> None:
    x = inputs((9, 3, 2, 2), torch.float64)[0]
    running = torch.zeros(3).double(), torch.ones(3).double(), torch.tensor(0)
    for counts in ([2, 3], [4]):
        batch_norm(x[: sum(counts)], None, None, running, counts, None, 1e-5)
    groups = [x[:2], x[2:5], x[:4]]
    for found, expected in zip(running, (Tensor.mean, Tensor.var), strict=False):
        torch.testing.assert_close(found, torch.stack([expected(g, (0, 2, 3)) for g in groups]).mean(0))
    assert running[2].item() == 3


@both
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 2, 3)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...], added: bool, relu: bool) -> None:
    x, weight, bias, _, _, residual, _ = (t.requires_grad_() for t in inputs(shape, torch.float64))

    def normalized(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return batch_norm(x, weight, bias, NONE, [2, shape[0] - 2], 0.1, 1e-2, residual, relu)

    assert torch.autograd.gradcheck(normalized, [x, weight, bias, *([residual] if added else [])])


def arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator."""
    x, weight, bias, mean, var, residual, grad = inputs((6, 5, 3, 4), dtype)
    statistics = fallback.batch_norm_stats_alone(x, [4, 2], None, None, None, 0.1, 1e-5)
    y = fallback.batch_norm_apply(x, weight, bias, statistics, [4, 2], residual, True)
    sums, _, passed = fallback.batch_norm_backward_reduce(grad, x, y, weight, bias, statistics, [4, 2], True)
    values = [
        (x, [4, 2]),
        (x, [4, 2], mean, var, torch.tensor(7), None, 1e-5),
        (torch.cat([fallback.batch_norm_stats(x, [4, 2])] * 3), mean, var, torch.tensor(7), None, 1e-5),
        (x, weight, bias, statistics, [4, 2], residual, True),
        (grad, x, y, weight, bias, statistics, [4, 2], True),
        (passed, x, weight, bias, statistics, sums, [4, 2], False),
    ]
    return dict(zip(OPERATORS, values, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        torch.library.opcheck(getattr(torch.ops.mcl, name), arguments(dtype)[name])


def test_errors() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"groups of \[3, 1\]: more than one value per channel"):
        batch_norm(x, None, None, NONE, [3, 1], 0.1, 1e-5)
    with pytest.raises(ValueError, match=r"shape \(4, 3, 1\) must be \(n, c\) or \(n, c, h, w\)"):
        batch_norm(x[:, :, None], None, None, NONE, [4], 0.1, 1e-5)


@pytest.mark.skipif(not compiled("batch_norm_stats", "cpu"), reason="the extension is not built")
def test_errors_of_the_extension() -> None:
    operators, x = torch.ops.mcl, torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="counts must add up"):
        operators.batch_norm_stats.default(x, [3])
    statistics = torch.ones(1, 7)
    with pytest.raises(RuntimeError, match="weight must be contiguous"):
        operators.batch_norm_apply.default(x, torch.ones(3).double(), None, statistics, [4], None, False)
    with pytest.raises(RuntimeError, match="residual must have the shape"):
        operators.batch_norm_apply.default(x, None, None, statistics, [4], torch.ones(4, 2), False)
    with pytest.raises(RuntimeError, match="statistics must be contiguous"):
        operators.batch_norm_combine.default(torch.ones(7), None, None, None, 0.1, 1e-5)
    parts, mean, variance = torch.ones(1, 1, 7), torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="without momentum, num_batches_tracked is needed"):
        operators.batch_norm_combine.default(parts, mean, variance, None, None, 1e-5)
