"""Assignment of targets, losses and queue: compared with computations by hand, in float64, for one and two processes;
and in training."""

import cmath
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from mcl import config, distributed
from mcl.budget import budget, count
from mcl.config import Config, ConfigError
from mcl.evaluation import evaluate
from mcl.exporters import export
from mcl.objectives import MCL
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import PHOTOS, ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import resumed_without_its_end
from tests.step import FOUR_LEVELS, build, configure, views

TARGETS = ("top", "same_level", "adjacent", "all")
TEMPERATURE, WEIGHTS = 0.5, (0.75, 0.25)

# Outputs of the networks for the tiles of three images, as angles, per process, view and level; level 1 shows each
# image twice.
SHOWN = [0, 1, 2], [2, 0, 1, 1, 2, 0]
PREDICTED, TARGETED = (
    [[[rng.integers(0, 360, len(shown)) for shown in SHOWN] for _ in range(2)] for _ in range(2)]
    for rng in map(np.random.default_rng, (0, 1))
)
CHOSEN = {"top": [[0], [0]], "same_level": [[0], [1]], "adjacent": [[0, 1], [0, 1]], "all": [[0, 1], [0, 1]]}


def unit(degrees: float) -> complex:
    return cmath.exp(1j * np.deg2rad(degrees))


def bank(process: int, view: int, level: int, turned: float = 0) -> list[complex]:
    """Targets of the three images of a process."""
    said = zip(SHOWN[level], TARGETED[process][view][level], strict=True)
    sums = np.zeros(3, complex)
    for image, angle in said:
        sums[image] += unit(angle + turned)
    return list(sums / abs(sums))


def by_hand(
    targets: str, loss: str, process: int, processes: int, former: Any = None, turned: float = 0
) -> np.ndarray[Any, Any]:
    """Loss, own and other cosine of each view and level of a process.

    Args:
        former: targets of former steps, per view and level.
        turned: angle by which targets are rotated, degrees.
    """
    everyone = range(processes) if loss == "infonce" else [process]
    result = np.zeros((3, 2, 2))
    for view, level in itertools.product(range(2), range(2)):
        terms = []
        for j in CHOSEN[targets][level]:
            found = [t for other in everyone for t in bank(other, 1 - view, j, turned)] + (
                former[1 - view][j] if former else []
            )
            for image, angle in zip(SHOWN[level], PREDICTED[process][view][level], strict=True):
                cosines = [(unit(angle) * target.conjugate()).real for target in found]
                own = cosines.pop(image + 3 * everyone.index(process))
                wrong = sum(np.exp(c / TEMPERATURE) for c in cosines)
                entropy = -np.log(np.exp(own / TEMPERATURE) / (np.exp(own / TEMPERATURE) + wrong))
                terms.append((entropy if loss == "infonce" else 2 - 2 * own, own, np.mean(cosines)))
        result[:, view, level] = np.mean(terms, 0)
    return result


class Known(MCL):
    """MCL whose networks return the angles above, as vectors of any length."""

    turned = 0.0

    def targets(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        said = TARGETED[distributed.rank()]
        return [[vectors(angles + self.turned, 2) for angles in of_view[: self._levels]] for of_view in said]

    def embeddings(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        return [[vectors(angles, 3) for angles in of_view] for of_view in PREDICTED[distributed.rank()]]

    def predictions(self, embeddings: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        return [list(of_view) for of_view in embeddings]


def vectors(degrees: Any, longest: float) -> Tensor:
    x = torch.view_as_real(torch.tensor([unit(angle) for angle in degrees], dtype=torch.complex128))
    return x * torch.linspace(1, longest, len(x), dtype=x.dtype)[:, None]


def known(*words: str) -> tuple[Known, MontageBatch]:
    """The model, and a view that shows the images above."""
    cfg = configure(f"model.temperature={TEMPERATURE}", "model.width=2", f"model.loss_weights={list(WEIGHTS)}", *words)
    nothing, tiles = torch.empty(0), torch.tensor([*SHOWN[0], *SHOWN[1]])
    view = MontageBatch(nothing, nothing, torch.arange(3), tiles, nothing, nothing, (3, 6), (3, 6), (1, 1), 1, 0, 0)
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        return Known(cfg).double(), view


def said(model: MCL, view: MontageBatch) -> tuple[np.ndarray[Any, Any], float]:
    output = model(view, view)
    return torch.stack([output.losses, *output.scores.values()]).numpy(), output.loss.item()


def everything() -> list[tuple[np.ndarray[Any, Any], float]]:
    return [
        said(*known(f"model.targets={targets}", f"model.loss={loss}"))
        for targets in TARGETS
        for loss in ("infonce", "cosine")
    ]


def check(found: list[tuple[np.ndarray[Any, Any], float]], process: int, processes: int) -> None:
    for (values, total), (targets, loss) in zip(found, itertools.product(TARGETS, ("infonce", "cosine")), strict=True):
        expected = by_hand(targets, loss, process, processes)
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12, err_msg=f"{targets} {loss}")
        factor = 2 * TEMPERATURE if loss == "infonce" else 1
        assert total == pytest.approx(factor * (expected[0].sum(0) * WEIGHTS).sum(), rel=1e-12)


def test_three_images_by_hand() -> None:
    check(everything(), 0, 1)


def test_three_images_of_each_of_two_processes_by_hand() -> None:
    for process, found in enumerate(in_ranks(2, everything)):
        check(found, process, 2)


def queued() -> list[np.ndarray[Any, Any]]:
    """Results of four steps, in which targets rotate, with a queue of 8."""
    model, view = known("model.targets=all", "model.queue=8")
    found = []
    for _ in range(4):
        prepared = model.prepare([(view, view)])
        with torch.no_grad():
            output = model(view, view, prepared)
        model.finish(prepared)
        found.append(torch.stack([output.losses, *output.scores.values()]).numpy())
        model.turned += 25
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_a_queue_has_the_latest_targets_of_former_steps(processes: int) -> None:
    """The queue is empty at first, then partly filled, then full and overwritten from the start; also if a step has
    more targets than it holds."""
    for process, found in enumerate(in_ranks(2, queued) if processes == 2 else [queued()]):
        former: list[list[list[complex]]] = [[[], []], [[], []]]
        for step, values in enumerate(found):
            latest = [[of_level[-8:] for of_level in of_view] for of_view in former]
            expected = by_hand("all", "infonce", process, processes, latest, 25 * step)
            np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
            for view, level in itertools.product(range(2), range(2)):
                former[view][level] += [t for p in range(processes) for t in bank(p, view, level, 25 * step)]


# ---------------------------------------------------------------------------------------------------- in training

THREE_LEVELS = ("montage.ratios=[1,2,4]", "montage.images_per_canvas=[1,2,2]", "model.loss_weights=[0.4,0.3,0.3]")
VARIANTS = [
    ("model.targets=same_level", "model.loss=cosine"),
    ("model.targets=all", "model.queue=20", *THREE_LEVELS),
    ("model.targets=adjacent", "model.queue=6", "model.temperature=0.2", *FOUR_LEVELS),
    ("model.targets=adjacent", "model.compute=released", *THREE_LEVELS),
    ("model.assembly=stack", "augment.shared_crop=true", "montage.cells=2"),
]
variants = pytest.mark.parametrize("words", VARIANTS, ids=lambda words: ",".join(words[:2]))


@variants
@pytest.mark.usefixtures("thin_backbone")
def test_the_loss_falls(words: tuple[str, ...]) -> None:
    cfg = configure("trainer.global_batch=8", *words)
    step, batch = build(cfg), views(cfg)
    losses = [float(step(*batch, lr=0.1, momentum=0.99)[0].loss) for _ in range(30)]
    settled = 4 if cfg.model.queue else 0  # while the queue fills, negatives become more
    assert losses[-1] < losses[settled] - 0.05
    assert np.isfinite(losses).all()


@variants
@pytest.mark.usefixtures("thin_backbone")
def test_a_resumed_run_has_the_same_bits(words: tuple[str, ...], tiny: Config, tmp_path: Path) -> None:
    """In two micro-batches; the queue is part of the state."""
    cfg = config.override(tiny, [*words, "trainer.global_batch=16", "trainer.accumulate=2", "trainer.epochs=4"])
    Trainer(cfg).fit()
    state = resumed_without_its_end(cfg, tmp_path / "again")
    if cfg.model.queue:
        assert state["model"]["queued"] == 8 * min(16, cfg.model.queue)
        assert state["model"]["queue"].norm(dim=-1) == pytest.approx(1)


@pytest.mark.usefixtures("thin_backbone")
def test_a_skipped_step_leaves_the_queue_alone() -> None:
    cfg = configure("model.queue=6", "trainer.on_nonfinite=skip")
    step, batch = build(cfg), views(cfg)
    step(*batch, lr=0.1, momentum=0.9)
    before = step.model.queue.clone(), step.model.queued.clone()
    handle = step.model.predictors[0][0].weight.register_hook(lambda grad: grad * torch.inf)
    step(*batch, lr=0.1, momentum=0.9)
    assert torch.equal(before[0], step.model.queue)
    assert before[1] == step.model.queued == 4
    handle.remove()
    step(*batch, lr=0.1, momentum=0.9)
    assert step.model.queued == 8


@pytest.mark.usefixtures("thin_backbone")
def test_targets_and_queue_do_not_depend_on_micro_batches() -> None:
    words = ("trainer.precision=fp64", "trainer.global_batch=8", "model.targets=all", "model.queue=12", *FOUR_LEVELS)
    results = []
    for parts in (1, 2):
        step = build(configure(*words, f"trainer.accumulate={parts}"))
        step.model.eval()
        outputs = [step(*views(configure(*words), seed), lr=0.0, momentum=1.0)[0] for seed in (1, 3)]
        results.append((*(o.losses for o in outputs), *(o.scores["negative"] for o in outputs), step.model.queue))
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("thin_backbone")
def test_the_momentum_network_runs_on_the_levels_that_have_targets() -> None:
    geometry = configure(*FOUR_LEVELS).montage
    for targets in TARGETS:
        step = build(configure(*FOUR_LEVELS, f"model.targets={targets}", "trainer.global_batch=8"))
        seen: list[int] = []
        step.model.target.head.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        step(*views(configure(*FOUR_LEVELS, "trainer.global_batch=8")), lr=0.1, momentum=0.9)
        assert seen == [2 * (8 if targets == "top" else sum(geometry.tiles(8)))]


@pytest.mark.usefixtures("thin_backbone")
def test_a_budget_counts_further_levels_gathers_and_queue() -> None:
    """Per view, one gather of all levels; none without negatives."""
    cfg = configure("trainer.global_batch=8", *FOUR_LEVELS)
    top, every, queue, cosine = (
        count.step.__wrapped__(config.override(cfg, words), 8, 2)  # keeps counts of thin models out of the cache
        for words in ([], ["model.targets=all"], ["model.targets=all", "model.queue=48"], ["model.loss=cosine"])
    )
    bank = 8 * 16 * 4  # images, width, bytes
    assert [list(c.gathered) for c in (top, every, queue, cosine)] == [[bank] * 2, [4 * bank] * 2, [4 * bank] * 2, []]
    assert every.forward["momentum network"] > 1.5 * top.forward["momentum network"]
    assert queue.forward["loss"] == 4 * every.forward["loss"]  # 16 targets, then 64
    assert cosine.forward["loss"] < top.forward["loss"]
    state = [count.state(config.override(cfg, words)) for words in ([], ["model.queue=48", "model.targets=all"])]
    assert state[1]["parameters"] - state[0]["parameters"] == 2 * 48 * bank // 8 * 4 + 8


def test_a_queue_without_negatives_is_refused(tiny: Config) -> None:
    cfg = config.override(tiny, ["model.queue=64", "model.loss=cosine"])
    for start in (Trainer, budget):
        with pytest.raises(
            ConfigError, match=r"model\.queue: 64, but model\.loss=cosine has no negatives; set model\.queue=0 or"
        ):
            start(cfg)


# ---------------------------------------------------------------------------------------------------- the real thing


@pytest.mark.soak
@pytest.mark.parametrize(
    "words",
    [
        ("model.targets=same_level",),
        ("model.targets=adjacent",),
        ("model.targets=all", "model.queue=224"),
        ("model.loss=cosine",),
        ("model.assembly=stack", "augment.shared_crop=true"),
        ("montage.ratios=[1,2,4]", "montage.images_per_canvas=[1,4,16]", "model.loss_weights=[0.5,0.25,0.25]"),
        ("montage.ratios=[1,2]", "montage.images_per_canvas=[1,4]", "model.loss_weights=[0.5,0.5]", "model.queue=224"),
    ],
    ids=lambda words: ",".join(words[:1]),
)
def test_a_run_on_photographs(words: tuple[str, ...], tmp_path: Path) -> None:
    """The demo, but shorter: its loss decreases, tiles find their images, and its weights are exported and verified."""
    keys = [f"data.root={PHOTOS / 'train'}", f"data.val_root={PHOTOS / 'val'}", f"output={tmp_path}"]
    cfg = config.load(
        "mcl_r18_fpn_demo", [*keys, "trainer.epochs=6", "evaluation.at_end=[]", "trainer.log_every=4", *words]
    )
    Trainer(cfg).fit()
    losses = [record["loss"] for record in read(cfg.run_folder / "metrics.jsonl")]
    assert losses[-1] < losses[len(losses) // 3]
    path = cfg.run_folder / "checkpoints" / checkpoint.LAST
    assert export(path, "torchvision", check=True).path.exists()
    train, _ = evaluate(["retrieval"], *checkpoint.load_model(path), torch.device("cpu"))
    assert train["levels"][0] > train["chance"]
