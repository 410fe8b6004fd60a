"""A step that is skipped since a gradient is not finite changes nothing but its count, and the loss scale of fp16."""

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from mcl import distributed
from mcl.config import Config
from mcl.train.step import TrainingStep
from tests.conftest import ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.step import FOUR_LEVELS, build, configure, views

Views = tuple[MontageBatch, MontageBatch]


def poisoned(pair: Views) -> Views:
    """A NaN pixel, which makes all statistics, the loss and every gradient NaN."""
    images = pair[0].pixels.clone()
    images[0, 0, 0, 0] = math.nan
    return dataclasses.replace(pair[0], pixels=images), pair[1]


def train(cfg: Config, steps: list[Views]) -> dict[str, Any]:
    """Everything that a step depends on, after some steps; the learning rate counts only steps that are not skipped."""
    step = build(cfg)
    norms = []
    for pair in steps:
        _, norm = step(*pair, lr=0.1, momentum=0.9)
        norms.append(bool(norm.isfinite()))
    return {"model": step.model.state_dict(), "state": state(step), "finite": norms}


def state(step: TrainingStep) -> list[dict[str, Tensor]]:
    return list(step.optimizer.state_dict()["state"].values())


def check_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
    assert [s.keys() for s in a["state"]] == [s.keys() for s in b["state"]]
    assert all(torch.equal(x[key], y[key]) for x, y in zip(a["state"], b["state"], strict=True) for key in y)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize(
    "words",
    [
        ["optim.name=lars"],
        ["optim.name=sgd", "trainer.precision=fp64"],
        ["optim.name=adamw", "optim.clip_norm=1", "trainer.accumulate=2", "trainer.global_batch=8"],
    ],
    ids=["lars", "sgd", "adamw"],
)
def test_a_skipped_step_changes_nothing(words: list[str]) -> None:
    """Weights, running statistics, momentum network and optimiser are bit-identical, for the first step and later
    ones."""
    skip = configure(*words, "trainer.on_nonfinite=skip")
    first, second = views(skip, 1), views(skip, 3)
    bad = poisoned(first)
    disturbed = train(skip, [bad, first, bad, second])
    assert disturbed["finite"] == [False, True, False, True]
    check_equal(disturbed, train(configure(*words), [first, second]))


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_fp16_lowers_its_loss_scale_and_changes_nothing_else(choice: str, optimizer: str) -> None:
    words = ["trainer.precision=fp16", "trainer.max_loss_scale=4", f"trainer.on_nonfinite={choice}"]
    cfg = configure(*words, f"optim.name={optimizer}")
    step, good = build(cfg), views(cfg)
    for scale in (2, 1):  # the first step, and a later one
        before = {key: tensor.clone() for key, tensor in step.model.state_dict().items()}
        momenta = [{key: tensor.clone() for key, tensor in each.items()} for each in state(step)]
        step(*poisoned(good), lr=0.1, momentum=0.9)
        now = state(step)
        assert step.scaler.get_scale() == scale
        assert all(torch.equal(before[key], tensor) for key, tensor in step.model.state_dict().items())
        assert all(torch.equal(old[key], new[key]) for old, new in zip(momenta, now, strict=False) for key in old)
        assert momenta or not any(tensor.any() for each in now for tensor in each.values())
        step(*good, lr=0.1, momentum=0.9)
        assert not torch.equal(
            before["target.backbone.convs.0.weight"], step.model.state_dict()["target.backbone.convs.0.weight"]
        )
        assert all(tensor.isfinite().all() for tensor in step.model.state_dict().values())


@pytest.mark.usefixtures("thin_backbone")
def test_a_norm_that_overflows_is_not_finite_either() -> None:
    """Every gradient is finite, but the sum of their squares is not: optimiser and momentum network both skip the
    step."""
    cfg = configure("trainer.precision=fp16", "trainer.max_loss_scale=1")
    step = build(cfg)
    before = {key: tensor.clone() for key, tensor in step.model.state_dict().items()}
    step.model.predictors[0][0].weight.register_hook(lambda grad: torch.full_like(grad, 1e30))
    _, norm = step(*views(cfg), lr=0.1, momentum=0.9)
    assert norm.isinf()
    assert all(torch.equal(before[key], tensor) for key, tensor in step.model.state_dict().items())


@pytest.mark.usefixtures("thin_backbone")
def test_weights_are_not_protected_if_no_step_is_skipped() -> None:
    cfg = configure("trainer.on_nonfinite=stop")
    after = train(cfg, [poisoned(views(cfg))])
    assert any(not tensor.isfinite().all() for tensor in after["model"].values())


def one_bad_rank(cfg: Config) -> dict[str, Any]:
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        step = build(cfg)
    good = views(cfg, 1 + 2 * distributed.rank(), world=2)
    norms = [step(*good, lr=0.1, momentum=0.9)[1]]
    before = {key: tensor.clone() for key, tensor in step.model.state_dict().items()}
    norms.append(step(*(poisoned(good) if distributed.rank() == 1 else good), lr=0.1, momentum=0.9)[1])
    undone = all(torch.equal(before[key], tensor) for key, tensor in step.model.state_dict().items())
    norms.append(step(*good, lr=0.1, momentum=0.9)[1])
    finite = [bool(norm.isfinite()) for norm in norms]
    return {"finite": finite, "undone": undone, "model": step.model.state_dict(), "state": state(step)}


def test_a_gradient_that_is_not_finite_in_one_rank_skips_the_step_in_all() -> None:
    """Gradients are averaged, so NaN in one rank is NaN in all, and ranks agree without communication."""
    cfg = configure(*FOUR_LEVELS, "trainer.on_nonfinite=skip", "trainer.global_batch=8")  # every map has a gradient
    first, second = in_ranks(2, one_bad_rank, cfg)
    for rank in (first, second):
        assert rank["finite"] == [True, False, True]
        assert rank["undone"]
    check_equal(first, second)
