"""Figures of collapse, compared with NumPy, for several processes; and when a run warns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mcl import config, distributed
from mcl.config import Config
from mcl.models.heads import MLP
from mcl.objectives import Output
from mcl.records import collapse
from mcl.records.collapse import CollapseWarning
from mcl.records.metrics import COLLAPSE, describe, read
from mcl.train import checkpoint
from mcl.train.step import TrainingStep
from mcl.train.trainer import Trainer
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import equal
from tests.step import build, configure, views

NONE = torch.zeros(())


def output(embeddings: Sequence[Sequence[Tensor]], targets: Sequence[Tensor]) -> Output:
    return Output(NONE, NONE, {}, embeddings, targets)


def draw(rows: int, directions: int, seed: int) -> Tensor:
    """Vectors of 12 dimensions and various lengths, which differ in the given number of directions."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(directions, 12, generator=generator)
    return torch.randn(rows, directions, generator=generator) @ basis + 0.5 * basis[0]


def oracle(rows: Sequence[Tensor]) -> tuple[float, float]:
    """Standard deviation and effective rank by definition, in float64."""
    vectors = torch.cat(list(rows)).double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    share = np.linalg.svd(unit, compute_uv=False)
    share = share / share.sum()
    return unit.std(0).mean(), np.exp(-(share * np.log(share + 1e-300)).sum())


@pytest.mark.parametrize("rows", [5, 40])
def test_figures_are_those_of_their_definitions(rows: int) -> None:
    """Of both views together, for every level; also with fewer vectors than dimensions."""
    made = [[draw(rows, d, 10 * d + view) for d in (12, 3, 1)] for view in range(2)]
    banks = [torch.stack([draw(rows, d, 100 + view) for d in (12, 2)], 1) for view in range(2)]
    found = collapse.figures(output(made, banks))
    expected = [oracle(level) for level in zip(*made, strict=True)]
    assert found["embedding_std"] == pytest.approx([std for std, _ in expected], rel=1e-7)
    expected = [oracle(level) for level in zip(*(bank.unbind(1) for bank in banks), strict=True)]
    assert found["target_rank"] == pytest.approx([rank for _, rank in expected], rel=1e-5)


def test_ends_of_the_scale() -> None:
    """The unit vectors of the axes are spread evenly; a single vector has collapsed."""
    even, same = torch.cat([torch.eye(8), -torch.eye(8)]), torch.ones(16, 8)
    found = collapse.figures(output([[even, same]], [torch.stack([even, same], 1)]))
    assert found["embedding_std"] == pytest.approx([8**-0.5, 0], abs=1e-7)
    assert found["target_rank"] == pytest.approx([8, 1], abs=1e-5)
    assert np.isnan(collapse.figures(output([], [even[:, None] / 0]))["target_rank"]).all()
    assert collapse.figures(output([], [])) == {}


def of_rank(whole: Sequence[Sequence[Tensor]], banks: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Figures if a process has half of the vectors; targets may be those of all processes or its own."""
    part = slice(20 * distributed.rank(), 20 * distributed.rank() + 20)
    mine = [[z[part] for z in view] for view in whole]
    return [collapse.figures(output(mine, targets)) for targets in (banks, [bank[part] for bank in banks])]


def test_processes_have_the_figures_of_the_whole_batch() -> None:
    """This includes targets, whether the objective has gathered them or not."""
    whole = [[draw(40, d, d + view) for d in (12, 3)] for view in range(2)]
    banks = [draw(40, 4, 7 + view)[:, None] for view in range(2)]
    expected = collapse.figures(output(whole, banks))
    for of_process in in_ranks(2, of_rank, whole, banks):
        for found in of_process:
            assert found == {name: pytest.approx(values, rel=1e-6) for name, values in expected.items()}


@pytest.mark.usefixtures("thin_backbone")
@pytest.mark.parametrize("objective", ["mcl", "supervised_contrastive"])
def test_objectives_return_the_vectors_that_they_compare(objective: str) -> None:
    """MCL returns the normalised targets of the levels that have some, without the queue; micro-batches return all of
    theirs."""
    parts = 1 if objective == "supervised_contrastive" else 2
    words = [f"objective={objective}", f"trainer.accumulate={parts}", "trainer.global_batch=8"]
    cfg = configure(*words, *(["model.targets=all", "model.queue=8"] if objective == "mcl" else []))
    made, _ = build(cfg)(*views(cfg), lr=0.1, momentum=0.9)
    assert [len(view) for view in made.embeddings] == [2] * 2 * parts
    assert [bank.shape for bank in made.targets] == ([(8, 2, 16)] * 2 if objective == "mcl" else [])
    assert not any(z.requires_grad for view in made.embeddings for z in view)
    assert all(torch.allclose(bank.norm(dim=2), torch.ones(())) for bank in made.targets)


def record(step: int, stds: Sequence[float], ranks: Sequence[float]) -> dict[str, Any]:
    return {"step": step, "embedding_std": stds, "target_rank": ranks}


def test_a_warning_comes_once_after_two_records(caplog: pytest.LogCaptureFixture) -> None:
    """There are 4 images, so the largest rank is 8 and the limit 1; the width is 16, so the limit of the deviation is
    1/16."""
    warn = CollapseWarning(configure())
    with caplog.at_level("WARNING", "mcl"):
        for step, stds, ranks in [
            (1, [0.06, 0.2], [1.1]),
            (2, [0.2, 0.2], [float("nan")]),  # above the limit again
            (3, [0.2, 0.06], [1.1]),
        ]:
            warn(record(step, stds, ranks))
        warn({"step": 3})  # an objective that returns no vectors
        assert not caplog.records
        for step in (4, 5, 6):
            warn(record(step, [0.06, 0.05], [0.9]))
    (std, rank) = caplog.messages
    assert std.startswith("step 5: the embeddings of level 0, 1 are nearly the same for all images (standard deviation")
    assert "0.05, 0.25 if they were spread evenly): they collapse" in std
    assert rank.startswith("step 5: the targets of level 0 differ in few directions only (effective rank 0.9 of 8): ")
    assert "optim.base_lr" in rank
    assert "docs/evaluation.md" in rank


def test_an_objective_that_starts_alike_is_warned_of_when_it_falls(caplog: pytest.LogCaptureFixture) -> None:
    """Projectors without BatchNorm at the end start like this."""
    warn = CollapseWarning(config.override(configure(), ["objective=supervised_contrastive"]))
    for step, std in enumerate([0.01, 0.02, 0.03, 0.2, 0.03, 0.01]):
        assert not caplog.records
        warn(record(step, [std], []))
    assert caplog.messages[0].startswith("step 5: the embeddings of level 0 ")


@pytest.mark.usefixtures("thin_backbone")
def test_records_have_the_figures_and_training_does_not_notice(tiny: Config) -> None:
    """Figures are those of the last step. The final state of a run is bit-identical, however often they are
    computed."""
    ends = []
    for every in (1, 8):
        cfg = config.override(tiny, [f"name=every{every}", f"trainer.log_every={every}"])
        Trainer(cfg).fit()
        records = read(cfg.run_folder / "metrics.jsonl")
        assert [[len(r[name]) for name in COLLAPSE] for r in records] == [[2, 1]] * len(records)
        ends.append((checkpoint.load(cfg.run_folder / "checkpoints" / "last.pt")["model"], records[-1]))
    assert equal(ends[0][0], ends[1][0])
    assert [ends[0][1][name] for name in COLLAPSE] == [ends[1][1][name] for name in COLLAPSE]
    assert f"rank {records[-1]['target_rank'][0]:.3g}  " in describe(records[-1])


@pytest.mark.soak
@pytest.mark.parametrize(
    ("words", "predictors", "warned"),
    [
        ([], True, False),
        (["model.loss=cosine"], True, False),
        (["optim.base_lr=8"], True, True),
        (["model.loss=cosine", "optim.base_lr=0.05", "optim.warmup_epochs=0"], False, True),
    ],
    ids=["demo", "cosine", "learning rate x 1000", "neither negatives nor predictors"],
)
def test_a_collapse_is_warned_of_within_fifty_steps(
    tmp_path: Path, photos: Path, words: list[str], predictors: bool, warned: bool
) -> None:
    own = [f"data.root={photos / 'train'}", "data.val_root=", f"output={tmp_path}", "evaluation.at_end=[]"]
    cfg = config.load("mcl_r18_fpn_demo", [*own, "log.preview=false", *words])
    trainer = Trainer(cfg)
    if not predictors:
        trainer.model.predictors = nn.ModuleList(MLP() for _ in cfg.montage.ratios)
        trainer._update = TrainingStep(cfg, trainer.model, trainer.device)
    trainer.fit()
    lines = (cfg.run_folder / "train.log").read_text().splitlines()
    steps = [int(line.split("step ")[1].split(":")[0]) for line in lines if "they collapse" in line]
    assert bool(steps) == warned
    assert all(step <= 50 for step in steps)
