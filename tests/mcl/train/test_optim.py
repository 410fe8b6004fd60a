"""LARS, schedules, exclusion and momentum network, compared with written-out scalar formulas."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcl import config
from mcl.train import ema
from mcl.train.optim import LARS, LossScaler, build_optimizer, excluded, learning_rate, load_state, set_learning_rate
from tests.mcl.detector import Detector


def scalar_lars(w: float, g: float, buffer: float, lr: float, decay: float, adapt: bool) -> tuple[float, float]:
    trust = 1e-3 * abs(w) / (abs(g) + decay * abs(w)) if adapt else 1.0
    buffer = 0.9 * buffer + lr * trust * (g + decay * w)
    return w - buffer, buffer


def test_lars_by_hand() -> None:
    """Three steps of two parameters with one element, of which one is adapted and decayed."""
    a, b = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (2.0, 3.0))
    groups = [{"params": [a], "weight_decay": 0.1}, {"params": [b], "adapt": False}]
    optimizer = LARS(groups, lr=0.5)
    expected = [(2.0, 0.0), (3.0, 0.0)]
    for g in (0.5, -1.0, 2.0):
        a.grad, b.grad = (torch.tensor([g], dtype=torch.float64) for _ in range(2))
        optimizer.step()
        expected = [
            scalar_lars(expected[0][0], g, expected[0][1], 0.5, 0.1, True),
            scalar_lars(expected[1][0], g, expected[1][1], 0.5, 0.0, False),
        ]
        assert a.item() == pytest.approx(expected[0][0], rel=1e-14)
        assert b.item() == pytest.approx(expected[1][0], rel=1e-14)


def test_lars_at_zero() -> None:
    """A zero weight never changes; a zero gradient without decay changes nothing, and nothing becomes NaN."""
    zero, still, unused = (nn.Parameter(torch.full((3,), v)) for v in (0.0, 1.0, 1.0))
    optimizer = LARS([zero, still, unused], lr=1.0)
    zero.grad, still.grad = torch.ones(3), torch.zeros(3)
    optimizer.step()
    assert zero.tolist() == [0, 0, 0]
    assert still.tolist() == unused.tolist() == [1, 1, 1]


def test_exclusion_by_rank_and_as_released() -> None:
    vector, matrix = torch.zeros(3), torch.zeros(3, 3)
    assert excluded("online.backbone.layer1.0.downsample.1.weight", vector, "ndim<=1")
    assert not excluded("online.backbone.layer1.0.downsample.1.weight", vector, "released")
    assert not excluded("online.head.projector.1.weight", vector, "released")
    assert excluded("online.backbone.bn1.weight", vector, "released")
    assert excluded("online.fpn.laterals.0.norm.weight", vector, "released")
    assert excluded("online.head.projector.0.bias", vector, "released")
    assert not excluded("online.backbone.conv1.weight", matrix, "ndim<=1")


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_groups(name: str) -> None:
    cfg = config.from_dict({"optim": {"name": name, "weight_decay": 0.3}})
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    model[0].bias.requires_grad_(False)
    usual, vectors = build_optimizer(cfg.optim, model).param_groups
    assert [p is q for p, q in zip(usual["params"], [model[0].weight], strict=True)] == [True]
    assert len(vectors["params"]) == 2
    assert (usual["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)


NAMES = ["lars", "sgd", "adamw"]


def build(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network and its optimiser; always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(config.from_dict({"optim": {"name": name, "weight_decay": 0.1}}).optim, model)
    set_learning_rate(optimizer, 0.1)
    return model, optimizer


def set_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"].values()
    return [*model.parameters(), *(tensor for each in states for tensor in each.values())]


def check_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_with_found_inf_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """In the first step, which creates the state, and a later one: bit for bit as an optimiser that never had these
    steps."""
    (model, optimizer), (twin, other) = build(name, dtype), build(name, dtype)
    for seed in (1, 2, 3):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        with Detector("cpu"):
            optimizer.step()
        optimizer.found_inf = torch.zeros(()) if seed == 3 else None  # type: ignore[attr-defined]
        for each, its in ((model, optimizer), (twin, other)):
            set_gradients(each, seed)
            its.step()
        check_equal(everything(model, optimizer), everything(twin, other))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unscale", [True, False])
def test_gradscaler_hands_over_what_it_found(name: str, unscale: bool) -> None:
    """It leaves the decision to our optimiser, and gradients are divided by the scale exactly once."""
    (model, optimizer), (twin, other) = build(name), build(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # creates its state
    for seed in (1, 2, 3):
        set_gradients(model, seed)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= math.nan if seed == 2 else scaler.get_scale()
        with Detector("cpu"):
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        if seed != 2:
            set_gradients(twin, seed)
            other.step()
        check_equal(everything(model, optimizer), everything(twin, other))
    assert scaler.get_scale() == 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_kernels_compute_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compared with PyTorch's loop over tensors, in float64. One parameter gets its first gradient later than the
    others."""
    (model, optimizer), (twin, other) = build(name, dtype), build(name, torch.float64)
    for group in other.param_groups:
        group["fused"] = group["foreach"] = False
    for seed in (1, 2, 3):
        set_gradients(model, seed)
        if seed == 1:
            model[0].bias.grad = None  # type: ignore[union-attr]
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        if seed == 1:  # its weights are those of the other, rounded
            twin.load_state_dict(model.state_dict())
        optimizer.step()
        other.step()
    for ours, theirs in zip(everything(model, optimizer), everything(twin, other), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def written_before(name: str, optimizer: torch.optim.Optimizer, case: str) -> dict[str, Any]:
    """The state of `optimizer` as written by versions that used PyTorch's foreach implementations."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        if name != "lars":
            del group["fused"]
            group["foreach"] = True
        if name == "adamw":
            group["capturable"] = case == "skip"
    if case == "none":  # a momentum of 0
        state["state"][0]["momentum_buffer"] = None
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


@pytest.mark.parametrize(
    ("name", "case"), [("lars", "stop"), ("sgd", "stop"), ("sgd", "none"), ("adamw", "stop"), ("adamw", "skip")]
)
def test_states_of_earlier_versions_are_taken_up(name: str, case: str) -> None:
    """They continue like current ones: with fused kernels, which can skip steps, bit for bit."""
    model, optimizer = build(name)
    for seed in (1, 2):
        set_gradients(model, seed)
        optimizer.step()
    saved = written_before(name, optimizer, case)
    (resumed, other) = build(name)
    resumed.load_state_dict(model.state_dict())
    load_state(other, saved)
    set_learning_rate(other, 0.1)
    assert all(
        group.keys() == own.keys() for group, own in zip(other.param_groups, optimizer.param_groups, strict=True)
    )
    assert all(group.get("fused", True) for group in other.param_groups)
    if case == "none":
        optimizer.state[model[0].weight]["momentum_buffer"].zero_()  # type: ignore[union-attr,index]
    for found in (1.0, 0.0):
        for each, its in ((model, optimizer), (resumed, other)):
            set_gradients(each, 3)
            its.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
            its.step()
        check_equal(everything(model, optimizer), everything(resumed, other))


def test_learning_rate_of_the_released_run() -> None:
    """31,200 steps; the peak after the warm-up is about 15.6, since the cosine starts at step 0."""
    optim = config.from_dict({}).optim
    rates = [learning_rate(optim, 4096, step, 31_200, 312) for step in range(31_200)]
    assert rates[0] == pytest.approx(16e-4)
    half = 1564  # half of the warm-up's 3,127 steps
    cosine = 1e-4 + (16 - 1e-4) * (math.cos(math.pi * half / 31_200) + 1) / 2
    assert rates[half] == pytest.approx(cosine * (1e-4 + (1 - 1e-4) * half / 3127))
    assert max(rates) == pytest.approx(15.6, abs=0.05)
    assert 3100 < rates.index(max(rates)) < 3140
    assert rates[-1] == pytest.approx(1e-4, rel=1e-2)


def test_momentum_schedule_and_update() -> None:
    assert ema.momentum(0.99, 0, 100) == pytest.approx(0.99)
    assert ema.momentum(0.99, 50, 100) == pytest.approx(0.995)
    assert ema.momentum(0.99, 100, 100) == 1
    target, online = nn.Linear(2, 2), nn.Linear(2, 2)
    before = target.weight.clone()
    ema.update(target.parameters(), online.parameters(), 0.9)
    torch.testing.assert_close(target.weight, 0.9 * before + 0.1 * online.weight)


def test_loss_scale_is_bounded() -> None:
    scaler = LossScaler("cpu", 8.0, True)
    scaler.set_growth_interval(1)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_gradients_may_lie_in_another_order_than_their_weights(name: str) -> None:
    """As libraries sometimes return them; PyTorch's fused kernels assume the same order."""
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        optimizer = build_optimizer(config.from_dict({"optim": {"name": name}}).optim, model)
        optimizer.param_groups[0]["lr"] = 0.1
        for _ in range(2):
            grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
            model.weight.grad = grad.contiguous(memory_format=layout)
            optimizer.step()
            assert model.weight.grad.is_contiguous(memory_format=layout)
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(ends[1], ends[0])
