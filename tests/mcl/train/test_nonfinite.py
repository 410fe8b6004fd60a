"""Losses and gradients that are infinite or NaN: the run ends with an error, or skips such steps."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from dali_pipelines.batch import MontageBatch
from mcl import config
from mcl.config import Config
from mcl.records import report
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.trainer import NonFiniteLossError, Trainer
from tests.mcl.tiny import STEPS

pytestmark = pytest.mark.usefixtures("thin_backbone")


def test_non_finite_loss_names_step_level_and_checkpoint(tiny: Config) -> None:
    trainer = Trainer(tiny)
    train_step = trainer.train_step

    def poison(*views: Any) -> Any:
        if trainer.step == 5:
            with torch.no_grad():
                trainer.model.predictors[1][0].weight.fill_(math.nan)
        return train_step(*views)

    trainer.train_step = poison  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match=r"level 1 was not finite at step 5; last good .*step_00000004\.pt"):
        trainer.fit()


def test_infinite_gradient_is_a_failure_too(tiny: Config) -> None:
    """The loss is finite, but clipping with an infinite norm makes weights NaN, which must not be saved."""
    trainer = Trainer(tiny)

    def overflow(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if trainer.step == 3:
            output.loss.register_hook(lambda gradient: gradient * math.inf)

    trainer.model.register_forward_hook(overflow)
    with pytest.raises(NonFiniteLossError, match=r"the gradient was not finite at step 3; last good checkpoint: none"):
        trainer.fit()
    assert not checkpoint.steps(tiny.run_folder / "checkpoints")


def test_fp16_ends_when_no_finite_gradient_comes(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Occasional skipped steps adjust the loss scale, but if all steps are skipped, nothing is trained."""
    monkeypatch.setattr("mcl.train.trainer._SKIPPED_IN_A_ROW", 3)
    trainer = Trainer(config.override(tiny, ["trainer.precision=fp16", "trainer.log_every=1"]))

    def overflow(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if trainer.step >= 2:
            output.loss.register_hook(lambda gradient: gradient * math.inf)

    trainer.model.register_forward_hook(overflow)
    with pytest.raises(NonFiniteLossError, match="the gradient was not finite in the last 3 steps; last good"):
        trainer.fit()
    assert trainer.step <= 5  # the first loss scale may also be too large


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Makes the canvases of some steps NaN."""
    train_step = trainer.train_step

    def bad(query: MontageBatch, key: MontageBatch) -> Any:
        if trainer.step in steps:
            query = dataclasses.replace(query, pixels=query.pixels * math.nan)
        return train_step(query, key)

    trainer.train_step = bad  # type: ignore[method-assign]


def test_a_run_counts_what_it_skips(tiny: Config) -> None:
    """Means are over the other steps; the last record has none."""
    trainer = Trainer(config.override(tiny, ["trainer.on_nonfinite=skip"]))
    poison(trainer, {2, 6, 7})
    trainer.fit()
    records = read(tiny.run_folder / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [0, 1, 0, 2]
    assert [math.isfinite(r["loss"]) for r in records] == [True, True, True, False]
    assert "2 steps since the last record had no finite gradient" in (tiny.run_folder / "train.log").read_text()
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert report.write(tiny.run_folder).exists()


def test_a_run_that_skips_everything_ends(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcl.train.trainer._SKIPPED_IN_A_ROW", 3)
    trainer = Trainer(config.override(tiny, ["trainer.on_nonfinite=skip"]))
    poison(trainer, set(range(1, STEPS)))
    with pytest.raises(NonFiniteLossError, match=r"gradient was not finite in the last 3 steps; last good .*none"):
        trainer.fit()
