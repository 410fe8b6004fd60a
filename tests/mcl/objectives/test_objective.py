"""An objective that is not part of mcl can be trained, resumed, evaluated, exported, reported and counted."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dali_pipelines.batch import MontageBatch
from mcl import commands as run
from mcl import config
from mcl.budget import budget
from mcl.config import Config, ConfigError
from mcl.evaluation import evaluate
from mcl.exporters import export
from mcl.models import Encoder
from mcl.objectives import OBJECTIVES, Objective, Output
from mcl.records.metrics import describe, read
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.mcl.tiny import equal
from tests.step import build, configure, views

pytestmark = pytest.mark.usefixtures("thin_backbone", "_other")


class Classes(Objective):
    """Classifies whole images, and counts steps and the views that it gets."""

    scores = ("accuracy",)
    labelled = True

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        self.online = Encoder(config.model, config.montage.ratios)
        self.classifier = nn.Linear(config.model.width, max(1, len(classes)))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(2))

    def prepare(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> Any:
        return torch.stack([view.pixels.mean().float() for view in parts[0]])

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Any = None) -> Output:
        losses, hits = [], []
        for view, levels in zip((query, key), self.online(query, key), strict=True):
            labels = view.labels.clamp_min(0)
            logits = [self.classifier(z) for z in levels]
            truth = [labels[view.tile_images[view.tiles(i)]] for i in range(len(levels))]
            losses.append(torch.stack([F.cross_entropy(x, t) for x, t in zip(logits, truth, strict=True)]))
            hits.append(torch.stack([(x.argmax(1) == t).float().mean() for x, t in zip(logits, truth, strict=True)]))
        values = torch.stack(losses)
        return Output(values.sum(), values.detach(), {"accuracy": torch.stack(hits)})

    def finish(self, prepared: Any) -> None:
        self.steps += 1
        self.seen += prepared


@pytest.fixture
def _other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "mcl", Classes)


def test_from_training_to_export(tiny: Config, tmp_path: Path) -> None:
    """It has no momentum network, its own scores, and a state that a resumed run restores."""
    tiny = config.override(tiny, ["evaluation.at_end=[knn]", "evaluation.k=3"])
    run.pretrain(tiny)
    train, scored = (read(tiny.run_folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert [r["step"] for r in train] == [2, 4, 6, 8]
    assert all(len(r["accuracy"]) == 2 and "positive" not in r for r in train)
    assert "  accuracy +" in describe(train[0])
    assert "Accuracy of tiles" in (tiny.run_folder / "report.html").read_text()
    assert scored[0]["classes"] == 4

    path = tiny.run_folder / "checkpoints" / checkpoint.LAST
    whole = checkpoint.load(path)
    assert (whole["model"]["steps"], len(whole["classes"])) == (8, 4)
    shutil.copytree(tiny.run_folder, tmp_path / "again" / tiny.name)
    (tmp_path / "again" / tiny.name / "checkpoints" / "step_00000008.pt").unlink()
    resumed = Trainer(config.override(tiny, [f"output={tmp_path / 'again'}"]))
    assert (resumed.step, int(resumed.model.steps)) == (4, 4)
    resumed.fit()
    assert equal(checkpoint.load(resumed.folder / "checkpoints" / checkpoint.LAST)["model"], whole["model"])

    model, cfg = checkpoint.load_model(path)
    assert model.classes == tuple(whole["classes"])
    with pytest.raises(ConfigError, match=r"objective: mcl has no targets.* use knn or linear"):
        list(evaluate(["retrieval"], model, cfg, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"--network: objective=mcl has no momentum network"):
        export(path, "mmdet", parts=["backbone"], network="target")


def test_an_image_without_a_class_is_refused(tiny: Config, few_photos: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(few_photos).as_posix() for path in few_photos.rglob("*.jpg"))
    (tmp_path / "list.txt").write_text(
        "".join(f"{few_photos}/{f} 1\n" for f in files[1:]) + f"{few_photos}/{files[0]}\n"
    )
    cfg = config.override(tiny, [f"data.root={tmp_path / 'list.txt'}", "data.allow_outside=true"])
    with pytest.raises(ConfigError, match=rf"objective: mcl needs .* 1 in data\.root .*/{files[0]}; use class folders"):
        Trainer(cfg)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_objective_finishes_every_step_that_is_not_skipped(parts: int) -> None:
    cfg = configure("trainer.global_batch=8", f"trainer.accumulate={parts}", "trainer.on_nonfinite=skip")
    step, good = build(cfg), views(cfg)
    bad = dataclasses.replace(good[0], pixels=good[0].pixels * torch.nan), good[1]
    for batch, steps in ((good, 1), (bad, 1), (good, 2)):
        step(*batch, lr=0.1, momentum=0.9)
        assert int(step.model.steps) == steps
        assert step.model.seen.isfinite().all()


def test_its_budget_has_a_classifier_and_nothing_to_gather(tiny: Config) -> None:
    said = budget(config.override(tiny, ["trainer.global_batch=16"]), gpus=2)
    assert said["parts"]["predictors"]["parameters"] == 1000 * (16 + 1)
    assert said["parts"]["predictors"]["forward"] > 0
    assert said["memory"]["momentum_network"] == said["parts"]["momentum network"]["parameters"] == 0
    assert "targets" not in [row["purpose"] for row in said["communication"]["per_step"]]
