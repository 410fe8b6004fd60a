"""LARS, schedules, exclusion, momentum network: against scalar formulas written out."""

import math

import pytest
import torch
from torch import nn

from mcl import config
from mcl.train import ema
from mcl.train.optim import LARS, LossScaler, build_optimizer, excluded, learning_rate


def scalar_lars(w: float, g: float, buffer: float, lr: float, decay: float, adapt: bool) -> tuple[float, float]:
    trust = 1e-3 * abs(w) / (abs(g) + decay * abs(w)) if adapt else 1.0
    buffer = 0.9 * buffer + lr * trust * (g + decay * w)
    return w - buffer, buffer


def test_lars_by_hand() -> None:
    """Three steps of two one-element parameters, one adapted with decay, one neither."""
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
    """A zero weight never moves; zero gradient and no decay move nothing, and nothing becomes NaN."""
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


def test_learning_rate_of_the_released_run() -> None:
    """31,200 steps; the peak behind the warm-up is about 15.6, since the cosine starts at step 0."""
    optim = config.from_dict({}).optim
    rates = [learning_rate(optim, 4096, step, 31_200, 312) for step in range(31_200)]
    assert rates[0] == pytest.approx(16e-4)
    half = 1564  # of 3,127 steps of warm-up
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
