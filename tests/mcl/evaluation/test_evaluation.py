"""Evaluations with known scores."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from dali_pipelines.source import open_source
from mcl import config
from mcl.config import Config, ConfigError
from mcl.evaluation import evaluate
from mcl.evaluation.retrieval import retrieval
from mcl.objectives import MCL
from tests.conftest import random_view


@pytest.fixture
def small(photos: Path) -> Config:
    return config.from_dict(
        {
            "data": {"root": str(photos / "train"), "val_root": str(photos / "val"), "threads": 1},
            "montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]},
            "model": {"backbone": "resnet18", "width": 16, "head_convs": 1, "hidden": 32, "loss_weights": [0.5, 0.5]},
            "evaluation": {"gallery": 8, "galleries": 4},
        }
    )


class Oracle(MCL):
    """A model that gives the right answer at level 0, and always image 0 at level 1."""

    codes = torch.eye(8)

    def targets(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        return [[self.codes[view.tile_images[view.tiles(i)]] for i in range(2)] for view in views]

    def embeddings(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        return [[self.codes, self.codes[:1].expand(len(view.index), -1)] for view in views]

    def predictions(self, embeddings: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        return [list(of_view) for of_view in embeddings]


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("targets", ["top", "all"])
def test_scores_of_an_oracle(small: Config, targets: str) -> None:
    oracle = Oracle(config.override(small, [f"model.targets={targets}", "model.width=8"]))
    views = [random_view(small.montage, 8, seed) for seed in (0, 1)]
    assert oracle.matches(*views).tolist() == [[1.0, pytest.approx(1 / 8)]] * 2


@pytest.mark.usefixtures("thin_backbone")
def test_retrieval_of_random_networks_is_reproducible(small: Config) -> None:
    torch.manual_seed(0)
    model = MCL(small)
    source = open_source(small.data.root)
    first, same = retrieval([model, model], small, source, torch.device("cpu"))
    assert first == same
    assert all(0 <= value <= 0.5 for value in first[0])
    assert len(first[1]) == 2


@pytest.mark.usefixtures("thin_backbone")
def test_retrieval_shows_every_tile_at_the_size_that_the_schedule_ends_with(small: Config) -> None:
    torch.manual_seed(0)
    model = MCL(small)
    source = open_source(small.data.root)
    scheduled = config.override(small, ["montage.queries=[4,1]", "montage.schedule=[[3,2]]"])
    last = config.override(small, ["montage.cells=2"])
    (found,), (expected,) = (retrieval([model], cfg, source, torch.device("cpu")) for cfg in (scheduled, last))
    assert found == expected


@pytest.mark.usefixtures("thin_backbone")
def test_retrieval_of_both_splits_leaves_the_model_alone(small: Config) -> None:
    torch.manual_seed(small.trainer.seed)
    model = MCL(small)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = list(evaluate(["retrieval"], model, small, torch.device("cpu")))
    assert [record["split"] for record in records] == ["train", "val"]
    # Without training it equals the random network.
    assert all(record["levels"] == record["random"] for record in records)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(("gallery", "message"), [(10, "do not fill a whole number"), (400, "has only 246 images")])
def test_impossible_galleries(small: Config, gallery: int, message: str) -> None:
    cfg = dataclasses.replace(small, evaluation=dataclasses.replace(small.evaluation, gallery=gallery))
    with pytest.raises(ConfigError, match=rf"evaluation\.gallery.*{message}"):
        retrieval([], cfg, open_source(cfg.data.root), torch.device("cpu"))


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("name", ["knn", "linear"])
def test_classes_of_real_photographs(small: Config, name: str) -> None:
    """An untrained network scores the same as itself."""
    torch.manual_seed(small.trainer.seed)
    model = MCL(small)
    (record,) = evaluate([name], model, small, torch.device("cpu"))
    assert record["accuracy"] == record["target"] == record["random"] > record["chance"] / 2
    assert (record["split"], record["classes"]) == ("val", 26)
    assert model.training


@pytest.mark.usefixtures("thin_backbone")
def test_classes_of_both_splits_are_numbered_alike(small: Config, photos: Path, tmp_path: Path) -> None:
    """Held-out images are training images of the last class, so that each finds itself, though its source has one
    class."""
    last = sorted((photos / "train").iterdir())[-1].name
    shutil.copytree(photos / "train" / last, tmp_path / "val" / last)
    cfg = config.override(small, [f"data.val_root={tmp_path / 'val'}", "evaluation.k=1"])
    (record,) = evaluate(["knn"], MCL(cfg), cfg, torch.device("cpu"))
    assert (record["accuracy"], record["chance"], record["classes"]) == (1.0, 1.0, 26)
    (tmp_path / "val" / last).rename(tmp_path / "val" / "unheard_of")
    with pytest.raises(
        ConfigError, match=r"data\.val_root: .* has classes that data\.root does not have, e\.g\. unheard_of"
    ):
        list(evaluate(["knn"], MCL(cfg), cfg, torch.device("cpu")))


def test_linear_needs_held_out_images(small: Config) -> None:
    cfg = config.override(small, ["data.val_root="])
    with pytest.raises(ConfigError, match=r"data\.val_root"):
        list(evaluate(["linear"], MCL(cfg), cfg, torch.device("cpu")))
