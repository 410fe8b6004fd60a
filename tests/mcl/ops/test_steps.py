"""Norms, LARS, momentum network, clipping and cross-entropy: compared with written-out formulas, for three backends."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl import ops
from mcl.ops import apex, fallback, steps
from mcl.ops.library import compiled
from tests.mcl.detector import Detector
from tests.mcl.ops import standin_apex

SHAPES = [(1,), (3, 5), (), (64, 3, 7, 7), (32, 16, 3, 3), (0,), (70_001,), (2, 3, 1, 1)]
STEP = {"lr": 0.7, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 1e-3}


def lists(dtype: torch.dtype, number: int = 3) -> list[list[Tensor]]:
    """Lists of tensors of many shapes; convolutions are channels_last."""
    generator = torch.Generator().manual_seed(0)
    drawn = [[torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES] for _ in range(number)]
    return [[t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in each] for each in drawn]


def lars_by_hand(w: Tensor, g: Tensor, buffer: Tensor, adapt: bool) -> tuple[Tensor, Tensor]:
    trust = 1.0
    if adapt:
        norms = [math.sqrt(math.fsum((t.double() ** 2).flatten().tolist())) for t in (w, g)]
        scale = norms[1] + STEP["weight_decay"] * norms[0]
        trust = STEP["trust_coefficient"] * norms[0] / scale if scale > 0 else 0.0
    buffer = STEP["momentum"] * buffer + STEP["lr"] * trust * (g + STEP["weight_decay"] * w)
    return w - buffer, buffer


@pytest.fixture(params=["compiled", "fallback"])
def torch_ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations of norms, lars_ and ema_, with the same interface."""
    assert all(compiled(name, "cpu") for name in ("norms", "lars_", "ema_")), "the extension is not built"
    if request.param == "fallback":
        monkeypatch.setattr(steps, "torch", _Namespace(fallback))


class _Namespace:
    """Replaces `torch` by a namespace whose mcl operators are plain functions."""

    def __init__(self, functions: Any) -> None:
        self.ops = type("ops", (), {"mcl": functions})


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_lars_by_hand(torch_ops: None, dtype: torch.dtype, tolerance: float, adapt: bool) -> None:
    weights, grads, momenta = lists(dtype)
    weights[0].zero_()
    weights[1].zero_()
    grads[1].zero_()
    before = [[t.clone() for t in each] for each in (weights, grads, momenta)]
    ops.lars_(weights, grads, momenta, **STEP, adapt=adapt)
    for t, (w, g, b) in enumerate(zip(*before, strict=True)):
        expected, buffer = lars_by_hand(w, g, b, adapt)
        torch.testing.assert_close(weights[t], expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(momenta[t], buffer, rtol=tolerance, atol=tolerance)
        assert torch.equal(grads[t], g)


def test_norms_and_momentum_network(torch_ops: None) -> None:
    targets, onlines = lists(torch.float64, 2)
    expected = [0.9 * t + 0.1 * o for t, o in zip(targets, onlines, strict=True)]
    torch.testing.assert_close(ops.norms(targets), torch.stack([t.norm() for t in targets]), rtol=1e-14, atol=0)
    ops.ema_(targets, onlines, 0.9)
    for t, e in zip(targets, expected, strict=True):
        torch.testing.assert_close(t, e, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_decides_on_the_device(torch_ops: None, dtype: torch.dtype) -> None:
    """A flag of 0 has no effect; any other value leaves all tensors unchanged, whatever the gradients are, and the host
    does not read it."""

    def step(found_inf: Tensor | None, poison: bool = False) -> list[list[Tensor]]:
        weights, grads, momenta = lists(dtype)
        targets = [w + 1 for w in weights]
        if poison:
            grads[1].fill_(math.nan)
        with Detector("cpu"):
            for adapt in (True, False):
                ops.lars_(weights, grads, momenta, **STEP, adapt=adapt, found_inf=found_inf)
            ops.ema_(targets, grads, 0.9, found_inf)
        return [weights, momenta, targets]

    weights, _, momenta = lists(dtype)
    untouched = [weights, momenta, [w + 1 for w in weights]]
    plain = step(None)
    for flag, expected in ((0.0, plain), (1.0, untouched), (0.5, untouched), (math.nan, untouched)):
        for shape in ((), (1,)):
            found = step(torch.full(shape, flag), poison=flag != 0)
            assert all(torch.equal(a, b) for ours, theirs in zip(found, expected, strict=True)
                       for a, b in zip(ours, theirs, strict=True))  # fmt: skip


def test_results_do_not_depend_on_threads() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        weights, grads, momenta = lists(torch.float32)
        ops.lars_(weights, grads, momenta, **STEP)
        results.append(weights + momenta)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("norms", lambda: (lists(torch.float32)[0],)),
        ("lars_", lambda: (*lists(torch.float32), None, 0.1, 0.9, 1e-4, 1e-3, True)),
        ("lars_", lambda: (*lists(torch.float32), torch.rand(2, len(SHAPES)), 0.1, 0.9, 1e-4, 1e-3, True)),
        ("lars_", lambda: (*lists(torch.float32), None, 0.1, 0.9, 1e-4, 1e-3, True, torch.zeros(()))),
        ("ema_", lambda: (*lists(torch.float32, 2), 0.9)),
        ("ema_", lambda: (*lists(torch.float32, 2), 0.9, torch.zeros(()))),
    ],
)
def test_opcheck(name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    torch.library.opcheck(getattr(torch.ops.mcl, name).default, arguments())


def test_lists_that_do_not_fit_are_refused() -> None:
    weights, grads, momenta = lists(torch.float32)
    for wrong, message in (
        ((weights, grads[:-1], momenta), "length"),
        ((weights, [g.double() for g in grads], momenta), "one dtype"),
        ((weights, [g.half() for g in grads], momenta), "float32 or float64"),
        ((weights, [g.contiguous() for g in grads], momenta), "order of their elements"),
        (([w.expand(2, *w.shape) for w in weights],) * 3, "gaps"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.lars_(*wrong, **STEP)
    for flag in (torch.zeros(2), torch.zeros((), dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="found_inf must be one float32"):
            ops.lars_(weights, grads, momenta, **STEP, found_inf=flag)
        with pytest.raises(RuntimeError, match="found_inf must be one float32"):
            ops.ema_(weights, grads, 0.9, flag)


# ------------------------------------------------------------------------------------------------------- apex


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[standin_apex.StandIn]:
    """A replacement for apex, which is then used for CPU tensors."""
    installed = standin_apex.install(monkeypatch)
    importlib.reload(apex)
    monkeypatch.setattr(apex, "_DEVICES", ("cpu",))
    yield installed
    monkeypatch.undo()
    importlib.reload(apex)


def test_apex_is_called_by_its_contract_with_equal_results(stand_in: standin_apex.StandIn) -> None:
    weights, grads, momenta = lists(torch.float32)
    expected = [[t.clone() for t in each] for each in (weights, grads, momenta)]
    ops.lars_(weights, grads, momenta, **STEP)
    assert stand_in.calls == [("l2norm", (1, 2 * len(SHAPES), True))]
    fallback.lars_(*expected, None, *STEP.values(), True)
    for ours, theirs in zip((weights, momenta), expected[::2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    stand_in.calls.clear()
    targets, before = weights, [w.clone() for w in weights]
    before[0].fill_(math.inf)  # overflow in a tensor must not stop this update or the next
    targets[0].fill_(math.inf)
    for _ in range(2):
        ops.ema_(targets, grads, 0.75)
        fallback.ema_(before, grads, 0.75)
    assert stand_in.calls == [("axpby", (3, 0.75, 0.25, -1))] * 2
    for ours, theirs in zip(targets, before, strict=True):
        torch.testing.assert_close(ours, theirs)

    stand_in.calls.clear()
    before = [w.clone() for w in weights]
    ops.ema_(targets, grads, 0.75, torch.ones(()))  # apex's kernel would ignore the flag
    assert stand_in.calls == []
    assert all(torch.equal(a, b) for a, b in zip(before, targets, strict=True))

    stand_in.calls.clear()
    parameter = nn.Parameter(torch.ones(1, 2, 2, 1).contiguous(memory_format=torch.channels_last))
    parameter.grad = torch.full_like(parameter, 3.0)
    for limit, grad in ((math.inf, 3.0), (7.0, 3.0), (1.5, 0.75)):
        norm = ops.clip_grad_norm_([parameter], limit)
        assert (norm.shape, norm.item()) == ((), 6)
        assert parameter.grad.flatten().tolist() == pytest.approx([grad] * 4, rel=1e-4)
    assert stand_in.calls == [("l2norm", (1, 1, False))] * 3

    stand_in.calls.clear()
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])  # label 0 counts like any other
    torch.testing.assert_close(ops.cross_entropy(logits, labels), F.cross_entropy(logits, labels))
    assert stand_in.calls == [("xentropy", (0.0, -1, False))]


def test_nothing_is_read_back_from_apex_either(stand_in: standin_apex.StandIn) -> None:
    weights, grads, momenta = lists(torch.float32)
    for w, grad in zip(weights, grads, strict=True):
        w.grad = grad
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    with Detector("cpu"):
        ops.cross_entropy(logits, labels)
        ops.clip_grad_norm_(weights, 1.0)
        ops.lars_(weights, grads, momenta, **STEP)
        ops.ema_(grads, weights, 0.9)
    assert [name for name, _ in stand_in.calls] == ["xentropy", "l2norm", "l2norm", "axpby"]


def test_apex_gets_nothing_but_fp32(stand_in: standin_apex.StandIn) -> None:
    weights, grads, momenta = lists(torch.float64)
    ops.lars_(weights, grads, momenta, **STEP)
    ops.ema_(weights, grads, 0.9)
    ops.cross_entropy(torch.randn(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    assert stand_in.calls == []


def test_backends_are_named(stand_in: standin_apex.StandIn) -> None:
    told = {task: library for task, (library, _) in ops.backends("cuda").items()}
    assert told["norms"] == told["ema_"] == told["clip"] == told["cross_entropy"] == "apex"
    assert told["lars_"] != "apex"
    assert ops.backends("cpu")["clip"] == ("PyTorch", "apex supports CUDA only")


def test_without_apex_everything_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("amp_C", "apex", "apex.multi_tensor_apply"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    importlib.reload(apex)
    assert not any(apex.supplies(task) for task in ("norms", "ema_", "clip", "cross_entropy"))
    weights, grads, momenta = lists(torch.float32)
    ops.lars_(weights, grads, momenta, **STEP)
    ops.ema_(weights, grads, 0.9)
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    assert ops.clip_grad_norm_([parameter], 1.0).item() == 2
    ops.cross_entropy(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))
    monkeypatch.undo()
    importlib.reload(apex)
