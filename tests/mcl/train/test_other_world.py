"""A run resumed with another number of processes has the same images with the same crops and colours at the same
steps."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dali_pipelines.batch import MontageBatch
from mcl import config, distributed
from mcl.config import Config
from mcl.signals import Interrupted
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import TINY

PRESET = TINY | {
    "montage": {"cells": 1, "images_per_canvas": [1, 2, 2, 2]},
    "model": TINY["model"] | {"loss_weights": [0.25] * 4},
    "trainer": TINY["trainer"] | {"global_batch": 16, "checkpoint_epochs": 2, "log_every": 1},
}
Tile = tuple[Any, ...]  # image, level, crop in the image


def tiles(view: MontageBatch) -> set[Tile]:
    """The tiles of a view, regardless of their positions on montages."""
    return {
        (int(view.index[source]), level, *crop.tolist())
        for level in range(len(view.ratios))
        for source, crop in zip(view.tile_images[view.tiles(level)], view.crops[view.tiles(level)], strict=True)
    }


def train(words: list[str], stop: int | None = None) -> dict[int, list[set[Tile]]]:
    """Trains to the end, or to a signal in step `stop`; returns the tiles of every step, by view."""
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone), mock.patch.object(distributed, "setup"):
        trainer = Trainer(config.override(config.from_dict(PRESET), words))
        shown, step = {}, trainer.train_step

        def spy(*views: MontageBatch) -> Any:
            shown[trainer.step] = [tiles(view) for view in views]
            if trainer.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*views)

        trainer.train_step = spy  # type: ignore[method-assign]
        try:
            trainer.fit()
        except Interrupted:
            assert stop is not None
    return shown


def train_both(words: list[str], stop: int) -> list[dict[int, list[set[Tile]]]]:
    return [train([*words, "name=whole"]), train([*words, "name=stopped"], stop)]


def last(cfg: Config) -> dict[str, Any]:
    return checkpoint.load(cfg.run_folder / "checkpoints" / "last.pt")


def united(ranks: list[dict[int, list[set[Tile]]]]) -> dict[int, list[set[Tile]]]:
    """The tiles of every step in all processes, by view."""
    return {
        step: [set[Tile]().union(*shown) for shown in zip(*(rank[step] for rank in ranks), strict=True)]
        for step in ranks[0]
    }


@pytest.mark.parametrize(
    ("before", "after"), [(2, 1), *(pytest.param(*worlds, marks=pytest.mark.soak) for worlds in ((1, 2), (2, 4)))]
)
def test_another_number_of_processes_takes_over(photos: Path, tmp_path: Path, before: int, after: int) -> None:
    words = [f"data.root={photos / 'val'}", f"output={tmp_path}", f"data.index={tmp_path / 'index'}"]
    whole = united([undisturbed for undisturbed, _ in in_ranks(before, train_both, words, 1)])
    assert sorted(whole) == list(range(8))
    cfg = config.override(config.from_dict(PRESET), [*words, "name=stopped"])
    stopped = last(cfg)["step"]
    assert 2 <= stopped < 6

    shown = united(in_ranks(after, train, [*words, "name=stopped"]))
    assert sorted(shown) == list(range(stopped, 8))
    assert all(shown[step] == whole[step] for step in shown)
    assert "resuming, but not bit for bit: " in (said := (cfg.run_folder / "train.log").read_text())
    assert f"world_size was {before}, is {after}" in said
    a, b = last(cfg), last(config.override(cfg, ["name=whole"]))
    assert (a["step"], a["loader"]) == (b["step"], b["loader"])
    # Neighbours on montages differ, so weights differ slightly.
    names = [n for n, w in a["model"].items() if n.startswith("online.") and w.ndim > 1]
    differences = [((a["model"][n] - b["model"][n]).norm() / b["model"][n].norm()).item() for n in names]
    print(f"largest relative difference of a matrix: {max(differences):.2e}")
    assert 0 < max(differences) < 0.05
