"""MoCo v2 and BYOL: compared with computations by hand, in float64, for one and two processes, and with lightly; and in
training."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from mcl import commands, config, distributed, objectives
from mcl.budget import budget, count
from mcl.config import Config, ConfigError
from mcl.evaluation import evaluate
from mcl.exporters import export
from mcl.models.heads import MLP
from mcl.objectives import OBJECTIVES
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import PHOTOS, ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import resumed_without_its_end
from tests.step import ONE_LEVEL, build, configure, views

WORDS = {
    "moco_v2": ("objective=moco_v2", *ONE_LEVEL, "model.queue=12", "model.temperature=0.2"),
    "byol": ("objective=byol", *ONE_LEVEL),
}
PEERS = list(WORDS)
peers = pytest.mark.parametrize("peer", PEERS)

IMAGES, WIDTH, QUEUE, TEMPERATURE, WEIGHT = 3, 4, 4, 0.2, 0.5
SHOWN = [2, 0, 1], [1, 2, 0]  # the images of the query view and the key view, in order
STEPS = 3


def said(process: int, network: str, view: int, step: int) -> Any:
    """The network's output for the images of a view: (IMAGES, WIDTH)."""
    return np.random.default_rng([process, len(network), view, step]).normal(size=(IMAGES, WIDTH))


def first_keys() -> Any:
    rows = np.random.default_rng(9).normal(size=(QUEUE, WIDTH))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def of_image(process: int, view: int, step: int, image: int) -> Any:
    """The target of an image."""
    return said(process, "target", view, step)[SHOWN[view].index(image)]


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def moco_by_hand(process: int, processes: int, step: int) -> tuple[list[list[float]], float]:
    """Loss and cosines of each direction, and the total."""
    former = [*first_keys()]
    for at, other, image in itertools.product(range(step), range(processes), range(IMAGES)):
        former.append(of_image(other, 1, at, image))
    terms = []
    for image, row in zip(SHOWN[0], said(process, "online", 0, step), strict=True):
        own = cosine(row, of_image(process, 1, step, image))
        others = [cosine(row, key) for key in former[-QUEUE:]]
        weights = [np.exp(c / TEMPERATURE) for c in (own, *others)]
        terms.append((-np.log(weights[0] / sum(weights)), own, np.mean(others)))
    values = np.mean(terms, 0)
    return [[value] for value in values], WEIGHT * values[0]


def byol_by_hand(process: int, processes: int, step: int) -> tuple[list[list[float]], float]:
    directions = []
    for view in range(2):
        terms = []
        for image, row in zip(SHOWN[view], said(process, "online", view, step), strict=True):
            cosines = [cosine(row, of_image(process, 1 - view, step, other)) for other in range(IMAGES)]
            own = cosines.pop(image)
            terms.append((2 - 2 * own, own, np.mean(cosines)))
        directions.append(np.mean(terms, 0))
    return np.transpose(directions).tolist(), WEIGHT * sum(values[0] for values in directions)


class Given(nn.Module):
    """An encoder that returns the angles above."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network = network

    def forward(self, *views: MontageBatch) -> list[Tensor]:
        return [torch.from_numpy(said(distributed.rank(), self.network, v.epoch, v.step)) for v in views]


def everything() -> list[list[tuple[list[list[float]], float]]]:
    return [computed(peer) for peer in PEERS]


def computed(peer: str) -> list[tuple[list[list[float]], float]]:
    """Results of a process, in every step."""
    words = f"model.width={WIDTH}", f"model.loss_weights=[{WEIGHT}]", "trainer.global_batch=6"
    queue = [f"model.queue={QUEUE}"] if peer == "moco_v2" else []
    cfg = configure(*WORDS[peer], *words, *queue)
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        model = objectives.build(cfg).double()
    model.online, model.target, model.predictor = Given("online"), Given("target"), MLP()
    if peer == "moco_v2":
        model.queue.copy_(torch.from_numpy(first_keys()))
    found = []
    for step in range(STEPS):
        query, key = (
            dataclasses.replace(view, tile_images=torch.tensor(SHOWN[side]), epoch=side, step=step)
            for side, view in enumerate(views(cfg, world=2))
        )
        prepared = model.prepare([(query, key)])
        output = model(query, key, prepared)
        model.finish(prepared)
        values = torch.stack([output.losses, *output.scores.values()])[..., 0]
        found.append((values.tolist(), float(output.loss)))
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_three_images_by_hand(processes: int) -> None:
    """Over three steps, each of which advances the queue of four keys, by more than its length with two processes."""
    for process, found in enumerate(in_ranks(2, everything) if processes == 2 else [everything()]):
        for by_hand, steps in zip((moco_by_hand, byol_by_hand), found, strict=True):
            for step, (values, total) in enumerate(steps):
                expected, whole = by_hand(process, processes, step)
                np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
                assert total == pytest.approx(whole, rel=1e-12)


# ---------------------------------------------------------------------------------------------------- beside lightly's


def pooled(backbone: nn.Module, view: MontageBatch) -> Tensor:
    maps: list[Tensor] = backbone(view.pixels)
    return maps[0].mean((2, 3))


def same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    gradients = zip(ours.parameters(), theirs.parameters(), strict=True)
    for mine, other in ((p.grad, q.grad) for p, q in gradients if q.grad is not None):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("thin_backbone")
def test_moco_v2_is_that_of_lightlys_parts() -> None:
    """Losses, gradients and queue of steps that do not change weights; the queue wraps around."""
    loss = pytest.importorskip("lightly.loss")
    modules = pytest.importorskip("lightly.models.modules")
    cfg = configure(*WORDS["moco_v2"], "trainer.precision=fp64")
    step = build(cfg)
    online = copy.deepcopy(step.model.online)
    head = modules.MoCoProjectionHead(ThinBackbone.channels[0], cfg.model.hidden, cfg.model.width).double()
    head.layers.load_state_dict(online.head.projector.state_dict())
    criterion = loss.NTXentLoss(cfg.model.temperature, (cfg.model.queue, cfg.model.width))
    criterion.memory_bank.bank = step.model.queue.clone()
    for seed in range(1, 9, 2):
        query, key = views(cfg, seed)
        online.zero_grad()
        head.zero_grad()
        with torch.no_grad():
            keys = head(pooled(online.backbone, key))
        theirs = criterion(head(pooled(online.backbone, query)), keys)
        theirs.backward()
        output, _ = step(query, key, lr=0, momentum=1)
        assert float(output.loss) == pytest.approx(float(theirs.detach()), rel=1e-12)
        same_gradients(step.model.online.backbone, online.backbone)
        same_gradients(step.model.online.head.projector, head.layers)
        torch.testing.assert_close(step.model.queue, criterion.memory_bank.bank, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("thin_backbone")
def test_byol_is_that_of_lightlys_parts() -> None:
    """Ours has the paper's 2 - 2 cos, summed over both directions; lightly has the mean of - cos."""
    loss = pytest.importorskip("lightly.loss")
    modules = pytest.importorskip("lightly.models.modules")
    cfg = configure(*WORDS["byol"], "trainer.precision=fp64")
    step, (query, key) = build(cfg), views(cfg)
    model, width, hidden = copy.deepcopy(step.model), cfg.model.width, cfg.model.hidden
    head = modules.BYOLProjectionHead(ThinBackbone.channels[0], hidden, width).double()
    head.layers.load_state_dict(model.online.head.projector.state_dict())
    predictor = modules.BYOLPredictionHead(width, hidden, width).double()
    predictor.layers.load_state_dict(model.predictor.state_dict())
    criterion = loss.NegativeCosineSimilarity()
    with torch.no_grad():
        targets = [head(pooled(model.online.backbone, view)) for view in (key, query)]
    predicted = [predictor(head(pooled(model.online.backbone, view))) for view in (query, key)]
    theirs = torch.stack([criterion(p, t) for p, t in zip(predicted, targets, strict=True)])
    whole = 4 + 2 * theirs.sum()
    whole.backward()
    output, _ = step(query, key, lr=0, momentum=1)
    torch.testing.assert_close(output.losses[:, 0], 2 + 2 * theirs.detach(), rtol=1e-12, atol=0)
    assert float(output.loss) == pytest.approx(float(whole.detach()), rel=1e-12)
    same_gradients(step.model.online.backbone, model.online.backbone)
    same_gradients(step.model.online.head.projector, head.layers)
    same_gradients(step.model.predictor, predictor.layers)


# ---------------------------------------------------------------------------------------------------- in training


@peers
@pytest.mark.usefixtures("thin_backbone")
def test_the_loss_falls(peer: str) -> None:
    cfg = configure(*WORDS[peer], "trainer.global_batch=8", "optim.name=adamw")
    step, batch = build(cfg), views(cfg)
    losses = [float(step(*batch, lr=1e-2, momentum=0.99)[0].loss) for _ in range(60)]
    settled = losses[6:12]  # while the queue fills with keys, negatives become more
    assert np.mean(losses[-6:]) < np.mean(settled) - 0.1
    assert np.isfinite(losses).all()


@peers
@pytest.mark.usefixtures("thin_backbone")
def test_neither_losses_nor_keys_depend_on_micro_batches(peer: str) -> None:
    results = []
    for parts in (1, 2):
        cfg = configure(*WORDS[peer], "trainer.precision=fp64", "trainer.global_batch=8", f"trainer.accumulate={parts}")
        step = build(cfg)
        step.model.eval()
        outputs = [step(*views(cfg, seed), lr=0.0, momentum=1.0)[0] for seed in (1, 3)]
        results.append([*(o.losses for o in outputs), *step.model.buffers()])
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-10, atol=1e-12)


@peers
@pytest.mark.usefixtures("thin_backbone")
def test_a_run_resumes_and_exports(peer: str, tiny: Config, tmp_path: Path) -> None:
    """In two micro-batches, with one in two images as a query; scored with kNN."""
    words = "trainer.accumulate=2", "montage.queries=[2]", "evaluation.at_end=[knn]", "evaluation.k=3"
    cfg = config.override(tiny, [*WORDS[peer], *words])
    commands.pretrain(cfg)
    state = resumed_without_its_end(cfg, tmp_path / "again")
    if peer == "moco_v2":
        assert state["model"]["queued"] == 64  # keys of eight steps, of all images
    (score,) = read(cfg.run_folder / "evaluations.jsonl")
    assert {"accuracy", "target", "random"} <= score.keys()

    last = cfg.run_folder / "checkpoints" / checkpoint.LAST
    for network in ("online", "target"):
        report = export(last, "mmdet", parts=["backbone"], network=network, output=tmp_path / "weights.pth")  # type: ignore[arg-type]
        assert {name.split(".")[1] for name in report.names} == {"backbone"}
        assert report.metadata["method"] == peer
    with pytest.raises(ConfigError, match=rf"--parts: objective={peer} has neither FPN nor head; use --parts back"):
        export(last, "mmdet")
    model, cfg = checkpoint.load_model(last)
    with pytest.raises(ConfigError, match=rf"objective: {peer} has no targets.* use knn or linear"):
        evaluate(["retrieval"], model, cfg, torch.device("cpu"))
    assert commands.features(model, cfg, tmp_path).exists()


@pytest.mark.usefixtures("thin_backbone")
def test_the_momentum_of_moco_stays_and_that_of_byol_rises(tiny: Config) -> None:
    for peer, words, last in ("moco_v2", ["optim.ema=0.9", "optim.final_ema=0.9"], 0.9), ("byol", ["optim.ema=0.9"], 1):
        cfg = config.override(tiny, [*WORDS[peer], *words, f"name={peer}"])
        Trainer(cfg).fit()
        momenta = [record["ema"] for record in read(cfg.run_folder / "metrics.jsonl")]
        assert momenta[-1] == pytest.approx(last, abs=0.01)
        assert (momenta[0] == momenta[-1]) == (peer == "moco_v2")


@pytest.mark.usefixtures("thin_backbone")
def test_a_budget_counts_them() -> None:
    """MoCo gathers the keys of one view, and each network processes only one view; BYOL gathers nothing."""
    moco, byol = (
        # Keeps counts of thin models out of the cache.
        count.step.__wrapped__(configure(*WORDS[peer], "trainer.global_batch=8"), 8, 2)
        for peer in PEERS
    )
    assert (list(moco.gathered), list(byol.gathered)) == ([8 * 16 * 4], [])
    for counted in (moco, byol):
        assert "FPN" not in counted.forward
        assert "head" not in counted.forward
        own = counted.forward["backbone"] + counted.forward["projector"]
        assert counted.forward["momentum network"] == own > 0
    assert byol.forward["backbone"] == 2 * moco.forward["backbone"]
    assert byol.parameters["predictors"] == 2 * 16 * 32 + 2 * 32 + 16
    assert moco.forward["loss"] == 2 * 8 * 12 * 16
    state = [count.state(configure(*WORDS["moco_v2"], f"model.queue={queue}"))["parameters"] for queue in (12, 13)]
    assert state[1] - state[0] == 16 * 4


@pytest.mark.parametrize(
    ("peer", "word", "message"),
    [
        *((peer, "model.label_smoothing=0", r"label_smoothing=0\.1, or another objective$") for peer in PEERS),
        *((peer, "model.compute=released", r"model\.compute=matched, or another") for peer in PEERS),
        *((peer, "model.targets=all", r"model\.targets=top, or another") for peer in PEERS),
        ("moco_v2", "model.loss=cosine", r"set model\.loss=infonce, or another"),
        ("moco_v2", "model.queue=0", r"set model\.queue=65536"),
        ("byol", "model.queue=64", r"model\.queue=0, or another"),
        ("byol", "model.temperature=0.1", r"model\.temperature=1\.0, or another"),
        ("supervised", "model.queue=64", r"model\.queue=0, or another"),
        ("supervised_contrastive", "model.loss=cosine", r"model\.loss=infonce, or another"),
    ],
)
def test_keys_that_conflict_are_refused(peer: str, word: str, message: str) -> None:
    key, value = word.split("=")
    cfg = configure(*WORDS.get(peer, (f"objective={peer}",)), word)
    with pytest.raises(ConfigError, match=rf"^{key}: {value}.*, but objective={peer} .*{message}"):
        OBJECTIVES[peer].check(cfg)


@peers
def test_more_levels_are_refused(peer: str, tiny: Config) -> None:
    cfg = config.override(tiny, [f"objective={peer}"])
    for start in (Trainer, budget):
        with pytest.raises(
            ConfigError, match=rf"montage\.ratios: \[1, 2\], but objective={peer} .* set montage\.ratios=\[1\], mont"
        ):
            start(cfg)


@pytest.mark.soak
@peers
def test_a_run_on_photographs(peer: str, tmp_path: Path) -> None:
    """The demo with the peer's objective, and with fewer keys than images per epoch: its loss decreases, and its
    weights are exported and verified."""
    keys = [f"data.root={PHOTOS / 'train'}", f"data.val_root={PHOTOS / 'val'}", f"output={tmp_path}"]
    own = {
        "moco_v2": ["model.queue=96", "optim.base_lr=4e-3", "optim.ema=0.99", "optim.final_ema=0.99"],
        "byol": ["model.temperature=1"],
    }
    words = [*WORDS[peer], "trainer.epochs=10", "evaluation.at_end=[knn]", *own[peer]]
    cfg = config.load("mcl_r18_fpn_demo", [*keys, *words])
    commands.pretrain(cfg)
    losses = [r["loss"] for r in read(cfg.run_folder / "metrics.jsonl") if r["kind"] == "train"]
    assert losses[-1] < 0.97 * losses[len(losses) // 3], losses
    path = cfg.run_folder / "checkpoints" / checkpoint.LAST
    assert export(path, "torchvision", check=True).path.exists()
