"""The mathematics does not depend on the world size: W ranks of B images compute the same as one process of W x B
images."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from dali_pipelines.batch import MontageBatch
from mcl import distributed
from mcl.config import Config
from mcl.objectives import MCL
from mcl.train.step import TrainingStep
from tests.conftest import ThinBackbone
from tests.fp64 import fast_convolutions
from tests.mcl.ranks import in_ranks, joined
from tests.step import configure
from tests.step import views as own_views

SMALL = ("model.head_convs=0", "trainer.global_batch=16", "optim.clip_norm=1")
EXACT = configure("trainer.precision=fp64", *SMALL)
SINGLE = configure(*SMALL)
RANKS = 4  # views of fewer ranks are concatenations of views of four


class TwoMaps(ThinBackbone):
    """A backbone with as many maps as levels, so that every parameter has a gradient."""

    channels = ThinBackbone.channels[:2]  # type: ignore[assignment]


def views(cfg: Config, step: int) -> list[MontageBatch]:
    """Query and key view of this rank: its share of the views of four ranks in this step."""
    world, rank = distributed.world_size(), distributed.rank()
    share = [own_views(cfg, 100 * step + 2 * r, RANKS) for r in range(RANKS)][rank * RANKS // world :][: RANKS // world]
    return [joined(cfg.montage, side) for side in zip(*share, strict=True)]


def train(cfg: Config, steps: int, device: str) -> dict[str, Any]:
    """Loss and gradient norm of every step, and the state of the model at the end."""
    torch.manual_seed(0)
    with mock.patch("mcl.models.encoder.Backbone", TwoMaps):
        model = MCL(cfg)
    step = TrainingStep(cfg, model, torch.device(device))
    losses, norms = [], []
    with fast_convolutions():
        for i in range(steps):
            output, norm = step(*views(cfg, i), lr=5.0, momentum=0.9)
            losses.append(output.loss.item())
            norms.append(norm.item())
    losses = np.mean(distributed.gather_objects(losses), axis=0)
    state = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    return {"losses": losses.tolist(), "norms": norms, "state": state, "moved": moved(cfg, model)}


def moved(cfg: Config, model: MCL) -> float:
    """Smallest relative change of a matrix or kernel in training."""
    torch.manual_seed(0)
    with mock.patch("mcl.models.encoder.Backbone", TwoMaps):
        before = dict(MCL(cfg).named_parameters())
    matrices = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    return min(((p.cpu() - before[n]).norm() / before[n].norm()).item() for n, p in matrices)


def trained(cases: Sequence[tuple[Config, int]], devices: Sequence[str] = ("cpu",)) -> list[dict[str, Any]]:
    """`devices`: those of the ranks; a single one is used by all."""
    device = devices[distributed.rank() % len(devices)]
    return [train(*case, device) for case in cases]


def check_ranks(ranks: Sequence[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Compares the results of ranks with those of one process, in float64."""
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-8)
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-8)
        for name, value in alone["state"].items():
            bound = 1e-8 * max(abs(value).max(), 1e-3)
            assert abs(rank["state"][name] - value).max() <= bound, name


@pytest.mark.parametrize(
    ("world", "steps"), [(4, 5), *(pytest.param(world, 20, marks=pytest.mark.soak) for world in (2, 4))]
)
def test_any_number_of_ranks_computes_the_same(world: int, steps: int) -> None:
    """In float64; the first step also in float32."""
    cases = [(EXACT, steps), (SINGLE, 1)]
    alone, alone_single = trained(cases)
    assert not torch.distributed.is_initialized()
    assert alone["moved"] > 0.0025 * steps
    ranks = in_ranks(world, trained, cases)
    check_ranks([exact for exact, _ in ranks], alone)
    for _, single in ranks:
        for name in ("losses", "norms"):
            assert single[name] == pytest.approx(alone_single[name], rel=1e-4)
            assert single[name] == pytest.approx(alone[name][:1], rel=1e-4)
