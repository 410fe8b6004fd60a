"""Objectives with labels, compared with sums written out by hand, for one and two processes; and whole runs."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from mcl import commands, config, distributed
from mcl.budget import budget
from mcl.config import Config, ConfigError
from mcl.exporters import export
from mcl.objectives import Objective, Output, build
from mcl.objectives.supervised_contrastive import SupervisedContrastive
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.step import TrainingStep
from tests.conftest import random_view
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import resumed_without_its_end
from tests.step import configure, views

IMAGES, WIDTH, TEMPERATURE, SMOOTHING = 3, 4, 0.5, 0.2
WEIGHTS = [0.7, 0.3]
LABELS = [[0, 1, 0], [1, 2, 2]]  # of the images of two processes


class Given(nn.Module):
    """An encoder whose embeddings are parameters: per view, 3 tiles of level 0 and 12 of level 1."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.head = nn.Module()
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(2, 5 * IMAGES, WIDTH, generator=generator, dtype=torch.float64)
        self.rows = nn.Parameter(rows)

    def forward(self, *views: MontageBatch) -> list[list[Tensor]]:
        return [list(rows.split([IMAGES, 4 * IMAGES])) for rows in self.rows]


def case(objective: str, seed: int) -> tuple[Objective, list[MontageBatch]]:
    """Three images on two levels of one process."""
    cfg = configure(
        f"objective={objective}",
        "montage.images_per_canvas=[1,1]",
        f"model.width={WIDTH}",
        f"model.temperature={TEMPERATURE}",
        f"model.label_smoothing={SMOOTHING}",
        f"model.loss_weights={WEIGHTS}",
    )
    model = build(cfg, ["a", "b", "c"]).double()
    model.online = Given(seed)
    if objective == "supervised":
        generator = torch.Generator().manual_seed(5)
        model.classifier.weight.data.normal_(generator=generator)
        model.classifier.bias.data.normal_(generator=generator)
    views = [random_view(cfg.montage, IMAGES, view + 2 * seed, torch.float64) for view in range(2)]
    return model, [dataclasses.replace(view, labels=torch.tensor(LABELS[seed])) for view in views]


def tiles(seed: int) -> list[tuple[Tensor, int, int, int]]:
    """Embedding, class, view and level of every tile of a process."""
    _, views = case("supervised_contrastive", seed)
    rows, found = Given(seed).rows, []
    for v, view in enumerate(views):
        for i, image in enumerate(view.tile_images.tolist()):
            found.append((rows[v, i], LABELS[seed][image], v, int(i >= IMAGES)))
    return found


def averaged(values: dict[tuple[int, int], list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([torch.stack(values[v, i]).mean() for i in range(2)]) for v in range(2)])


def by_hand(processes: int) -> list[Tensor]:
    """Losses (V, L) of supervised contrastive learning for each process, one tile after another."""
    every = [(seed, tile) for seed in range(processes) for tile in tiles(seed)]
    results = []
    for own in range(processes):
        losses: dict[tuple[int, int], list[Tensor]] = {}
        for i, (seed, (anchor, label, view, level)) in enumerate(every):
            if seed != own:
                continue
            others = [tile for j, (_, tile) in enumerate(every) if j != i]
            weights = [(F.cosine_similarity(anchor, z, dim=0) / TEMPERATURE).exp() for z, *_ in others]
            terms = [
                -(w / sum(weights)).log() for w, (_, other, *_) in zip(weights, others, strict=True) if other == label
            ]
            losses.setdefault((view, level), []).append(sum(terms) / len(terms))
        results.append(averaged(losses))
    return results


@functools.cache
def results(processes: int) -> list[dict[str, tuple[Output, Tensor | None]]]:
    """Results of each process."""
    return in_ranks(2, everything, 2) if processes == 2 else [everything(1)]


def everything(processes: int) -> dict[str, tuple[Output, Tensor | None]]:
    return {objective: run(objective, processes) for objective in ("supervised", "supervised_contrastive")}


def run(objective: str, processes: int) -> tuple[Output, Tensor | None]:
    """The output of a process, and the gradient of its embeddings by the mean loss of all processes."""
    model, views = case(objective, distributed.rank())
    output: Output = model(*views)
    (output.loss / processes).backward()
    return output.detach(), model.online.rows.grad


def total(losses: Tensor) -> Tensor:
    return sum(w * level for w, level in zip(WEIGHTS, losses.mean(0), strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("processes", [1, 2])
def test_supervised_contrastive_by_hand(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, and gradients of the mean over processes by finite differences."""
    found = [of_process["supervised_contrastive"] for of_process in results(processes)]
    for (output, _), losses in zip(found, by_hand(processes), strict=True):
        torch.testing.assert_close(output.losses, losses.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(output.loss, total(losses).detach(), rtol=1e-12, atol=1e-12)

    plain, eps = Given.__init__, 1e-6
    for seed, (view, row, column) in itertools.product(range(processes), [(0, 1, 2), (1, 7, 0)]):

        def mean(step: float, at: tuple[int, ...] = (seed, view, row, column)) -> float:
            def moved(self: Given, process: int) -> None:
                plain(self, process)
                if process == at[0]:
                    self.rows.data[at[1:]] += step

            monkeypatch.setattr(Given, "__init__", moved)
            return sum(float(total(losses).detach()) for losses in by_hand(processes)) / processes

        slope = (mean(eps) - mean(-eps)) / (2 * eps)
        assert float(found[seed][1][view, row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("processes", "process"), [(1, 0), (2, 0), (2, 1)])
def test_supervised_loss_by_hand(processes: int, process: int) -> None:
    """Each process has its own tiles; DistributedDataParallel averages their gradients."""
    model, _ = case("supervised", process)
    output, _ = results(processes)[process]["supervised"]
    weight, bias = (p.detach() for p in (model.classifier.weight, model.classifier.bias))
    losses: dict[tuple[int, int], list[Tensor]] = {}
    hits: dict[tuple[int, int], list[Tensor]] = {}
    for row, label, view, level in tiles(process):
        logits = [float(weight[c] @ row.detach() + bias[c]) for c in range(3)]
        log_sum = math.log(sum(math.exp(x) for x in logits))
        logs = [x - log_sum for x in logits]
        smoothed = -(1 - SMOOTHING) * logs[label] - SMOOTHING * sum(logs) / 3
        losses.setdefault((view, level), []).append(torch.tensor(smoothed, dtype=torch.float64))
        hits.setdefault((view, level), []).append(torch.tensor(float(logits.index(max(logits)) == label)).double())
    wanted = averaged(losses)
    torch.testing.assert_close(output.losses, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.scores["accuracy"], averaged(hits))
    torch.testing.assert_close(output.loss, total(wanted), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("objective", ["supervised", "supervised_contrastive"])
def test_a_run_resumes_and_exports(objective: str, tiny: Config, tmp_path: Path) -> None:
    tiny = config.override(tiny, [f"objective={objective}"])
    commands.pretrain(tiny)
    last = tiny.run_folder / "checkpoints" / checkpoint.LAST
    whole = resumed_without_its_end(tiny, tmp_path / "again")
    assert not any(name.startswith("target.") for name in whole["model"])
    report = export(last, "mmdet", parts=["backbone", "head"], output=tmp_path / "weights.pth")
    assert not [name for name in report.weights if "classifier" in name]
    if objective == "supervised":
        report = export(last, "hub", parts=["backbone", "head"], classifier=True)
        taken = load_file(next(report.path.glob("*.safetensors")))
        assert all(torch.equal(taken[f"classifier.{n}"], whole["model"][f"classifier.{n}"]) for n in ("weight", "bias"))
        assert json.loads((report.path / "config.json").read_text())["classes"] == list(whole["classes"])
        assert "classifier       2 " in str(report)
        assert "backbone, head, classifier, " in (report.path / "README.md").read_text()
    else:
        with pytest.raises(ConfigError, match=r"^--classifier: objective=supervised_contrastive has no classifier"):
            export(last, "hub", parts=["backbone", "head"], classifier=True)
    with pytest.raises(ConfigError, match=r"^--classifier: torchvision has no place for it, .*; use --to hub"):
        export(last, "torchvision", classifier=True)
    assert budget(tiny, gpus=1)["memory"]["momentum_network"] == 0


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("objective", ["supervised", "supervised_contrastive"])
def test_the_loss_of_objectives_with_labels_decreases(objective: str) -> None:
    cfg = configure(f"objective={objective}", "trainer.global_batch=8", "model.temperature=0.1", "optim.name=adamw")
    torch.manual_seed(0)
    step = TrainingStep(cfg, build(cfg, ["a", "b"]), torch.device("cpu"))
    query, key = (dataclasses.replace(view, labels=torch.arange(8) % 2) for view in views(cfg))
    losses = [float(step(query, key, lr=1e-2, momentum=1.0)[0].loss) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.soak
@pytest.mark.parametrize("objective", ["supervised", "supervised_contrastive"])
def test_it_learns_from_photographs(objective: str, photos: Path, tmp_path: Path) -> None:
    """The demo with labels."""
    words = [f"objective={objective}", f"data.root={photos / 'train'}", f"output={tmp_path}", "evaluation.at_end=[]"]
    cfg = config.load("mcl_r18_fpn_demo", words)
    commands.pretrain(cfg)
    losses = [record["loss"] for record in read(cfg.run_folder / "metrics.jsonl") if record["kind"] == "train"]
    assert losses[-1] < 0.95 * losses[0], losses


def test_keys_that_conflict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accumulate: objective=supervised_contrastive"):
        SupervisedContrastive.check(configure("objective=supervised_contrastive", "trainer.accumulate=2"))
