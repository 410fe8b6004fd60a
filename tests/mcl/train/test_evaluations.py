"""Evaluations during a run do not change its results, are recorded, and can be interrupted."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from mcl import commands, config, distributed
from mcl.config import Config, ConfigError
from mcl.evaluation import knn_linear, retrieval
from mcl.objectives import MCL
from mcl.records.metrics import read
from mcl.signals import Interrupted
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import TINY, equal

PRESET: dict[str, Any] = TINY | {  # all levels, so that every map has a gradient
    "montage": {"cells": 1, "images_per_canvas": [1, 2, 2, 2]},
    "model": TINY["model"] | {"loss_weights": [0.25] * 4},
}
EVALUATED = [
    *("evaluation.every=1", "evaluation.during=[retrieval, knn, linear]", "evaluation.gallery=8"),
    *("evaluation.galleries=3", "evaluation.k=3", "evaluation.features=p4", "trainer.keep_best=knn"),
]


def train(cfg: Config) -> dict[str, Any]:
    """The final state of a run of this process, in whatever group it is."""
    with (
        mock.patch("mcl.models.encoder.Backbone", ThinBackbone),
        mock.patch.object(distributed, "setup"),
        mock.patch.object(knn_linear, "_PROBE_STEPS", 5),
        mock.patch.object(retrieval, "_STATISTICS_BATCHES", 2),
    ):
        trainer = Trainer(cfg)
        trainer.fit()
        state = trainer.state_dict()
        return {key: state[key] for key in ("step", "model", "loader", "rng")}


def both(words: Sequence[str]) -> tuple[bool, list[dict[str, Any]]]:
    """Whether a run with evaluations ends like one without, and the records of the former."""
    cfg = config.override(config.from_dict(PRESET), words)
    plain = train(config.override(cfg, ["name=plain"]))
    evaluated = train(config.override(cfg, EVALUATED))
    return equal(plain, evaluated), read(cfg.run_folder / "evaluations.jsonl")


@pytest.fixture(scope="module")
def photographs(few_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Small photographs, loaded by the engine that starts fastest."""
    root = tmp_path_factory.mktemp("small")
    for file in few_photos.rglob("*.jpg"):
        (root / file.parent.name).mkdir(exist_ok=True)
        with Image.open(file) as photo:
            photo.reduce(8).save(root / file.parent.name / file.name)
    return [f"data.root={root}", f"data.val_root={root}", "data.engine=torchvision"]


@pytest.fixture(scope="module")
def alone(photographs: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """An undisturbed run with evaluations in one process, and its final state."""
    words = [*photographs, f"output={tmp_path_factory.mktemp('alone')}", *EVALUATED]
    cfg = config.override(config.from_dict(PRESET), words)
    return cfg, train(cfg)


@pytest.fixture
def words(photographs: list[str], tmp_path: Path) -> list[str]:
    return [*photographs, f"output={tmp_path}"]


def test_a_run_with_evaluations_computes_the_same(alone: tuple[Config, dict[str, Any]], words: list[str]) -> None:
    """Bit for bit; the best checkpoint is kept."""
    cfg, state = alone
    assert equal(train(config.override(config.from_dict(PRESET), words)), state)
    records = read(cfg.run_folder / "evaluations.jsonl")
    found = [(record["name"], record["split"], record["step"], record["epoch"]) for record in records]
    assert found == [(name, "val", 4 * e, e) for e in (0, 1, 2) for name in ("retrieval", "knn", "linear")]
    assert records[0]["levels"] == records[0]["random"] != records[3]["levels"]  # before the first step
    assert all(records[i]["random"] == records[i + 3]["random"] for i in range(6))
    scores = {record["step"]: record["accuracy"] for record in records if record["name"] == "knn" and record["step"]}
    best = max(scores, key=scores.__getitem__)
    assert os.readlink(cfg.run_folder / "checkpoints" / "best.pt") == f"step_{best:08d}.pt"


def test_two_processes_with_evaluations_compute_the_same(
    alone: tuple[Config, dict[str, Any]], words: list[str]
) -> None:
    """Scores are those of one process where the networks are the same: before the first step."""
    parts = in_ranks(2, both, [*words])
    assert [same for same, _ in parts] == [True, True]
    ours, theirs = parts[0][1], read(alone[0].run_folder / "evaluations.jsonl")
    assert [record["epoch"] for record in ours] == [record["epoch"] for record in theirs]
    assert ours[:3] == theirs[:3]


def at_montage(number: int, do: Callable[[], object]) -> Any:
    """Calls a function in retrieval when a network processes the montages with the given number."""
    count, matches = 0, MCL.matches

    def wrapped(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            do()
        return matches(*arguments)

    return mock.patch.object(MCL, "matches", wrapped)


@pytest.mark.parametrize(("montage", "step"), [pytest.param(2, 0, marks=pytest.mark.soak), (27, 8)])
def test_a_signal_during_an_evaluation(
    alone: tuple[Config, dict[str, Any]], words: list[str], montage: int, step: int
) -> None:
    """Two networks process five montages each time: the run stops in its first or last evaluation, and continues
    there."""
    undisturbed, state = alone
    cfg = config.override(config.from_dict(PRESET), [*words, *EVALUATED])
    with at_montage(montage, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Interrupted):
        train(cfg)
    saved = checkpoint.latest(cfg.run_folder / "checkpoints")
    assert (saved["step"] if saved else 0) == step
    assert {record["step"] for record in read(cfg.run_folder / "evaluations.jsonl")} == set(range(0, step, 4))
    assert equal(train(cfg), state)
    ours, theirs = (read(run.run_folder / "evaluations.jsonl") for run in (cfg, undisturbed))
    assert ours == theirs


@pytest.mark.usefixtures("thin_backbone")
def test_the_best_checkpoint_outlives_the_others(words: list[str], tmp_path: Path) -> None:
    """With given scores, of which the second epoch's is the best."""
    cfg = config.override(config.from_dict(PRESET), [*words, "trainer.epochs=4", "trainer.keep=1"])
    cfg = config.override(cfg, ["evaluation.every=1", "evaluation.during=[knn]", "trainer.keep_best=knn"])
    scores = iter([0.9, 0.2, 0.5, 0.4, 0.1])

    def evaluate(names: list[str], *_: Any) -> list[dict[str, Any]]:
        own = {"split": "val", "accuracy": next(scores), "target": 0, "random": 0, "chance": 0, "classes": 4}
        return [{"kind": "eval", "name": names[0], **own}]

    with mock.patch("mcl.evaluation.evaluate", evaluate):
        Trainer(cfg).fit()
    folder = cfg.run_folder / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "last.pt", "step_00000008.pt", "step_00000016.pt"]
    assert (os.readlink(folder / "best.pt"), os.readlink(folder / "last.pt")) == (
        "step_00000008.pt",
        "step_00000016.pt",
    )


def test_the_best_by_what_is_never_evaluated(tiny: Config) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.keep_best: knn is not evaluated during the run; set"):
        config.override(tiny, ["trainer.keep_best=knn", "evaluation.during=[knn]"])


@pytest.mark.usefixtures("thin_backbone")
def test_later_evaluations_are_kept_and_shown(words: list[str], tmp_path: Path) -> None:
    """In the run folder, and shown in its report; a checkpoint elsewhere leaves no record."""
    cfg = config.override(
        config.from_dict(PRESET), [*words, "evaluation.every=2", "evaluation.gallery=8", "evaluation.galleries=2"]
    )
    commands.pretrain(cfg)
    saved = cfg.run_folder / "checkpoints" / "step_00000004.pt"
    (record,) = commands.evaluate("knn", saved, ["evaluation.labels=0.5", "evaluation.k=1"])
    assert (record["labels"], record["images"], record["split"]) == (0.5, 32, "val")
    *own, last = read(cfg.run_folder / "evaluations.jsonl")
    assert [(r["name"], r["step"], r["by"]) for r in own] == [("retrieval", 0, "run"), ("retrieval", 8, "run")]
    assert last == {**record, "step": 4, "by": "mcl evaluate"}
    page = (cfg.run_folder / "report.html").read_text()
    assert "The classes of 50.0% of the training images are used." in page
    assert 'aria-label="Retrieval, held-out images"' in page
    (tmp_path / "copy.pt").write_bytes(saved.read_bytes())
    commands.evaluate("knn", tmp_path / "copy.pt", [])
    assert not (tmp_path / "evaluations.jsonl").exists()
