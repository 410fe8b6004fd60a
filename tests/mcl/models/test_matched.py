"""`matched` has the same results as `released`, with less computation."""

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import Geometry
from mcl import config
from mcl.objectives import MCL
from mcl.train.loss import info_nce, over_levels, total_loss
from tests.conftest import ThinBackbone, random_view
from tests.fp64 import fast_convolutions

CASES = [
    pytest.param({}, 32, id="default-32"),
    pytest.param({}, 96, id="default-96"),
    pytest.param({}, 160, id="default-160"),
    pytest.param({"ratios": (1, 2), "images_per_canvas": (1, 4)}, 12, id="two-levels-12"),
    pytest.param({"ratios": (1, 2, 4), "images_per_canvas": (1, 4, 16)}, 16, id="three-levels-16"),
    pytest.param({"ratios": (1, 2, 4), "images_per_canvas": (1, 4, 16)}, 48, id="three-levels-48"),
]


def models(backbone: str, geometry: Geometry) -> tuple[MCL, MCL]:
    """The same random network, computed in both ways; BatchNorms have random statistics and scales."""
    weights = [0.5, 0.25, 0.125, 0.125][: geometry.levels]
    cfg = config.from_dict(
        {
            "montage": dataclasses.asdict(geometry),
            "model": {
                "backbone": "resnet18" if backbone == "thin" else backbone,
                "width": 16,
                "hidden": 32,
                "loss_weights": weights,
            },
        }
    )
    torch.manual_seed(0)
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone) if backbone == "thin" else nullcontext():
        matched = MCL(cfg).double()
        released = MCL(config.override(cfg, ["model.compute=released"])).double()
    for module in matched.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    released.load_state_dict(matched.state_dict())
    return matched.eval(), released.eval()


@pytest.mark.soak
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("geometry", "images"), CASES)
def test_same_losses_and_gradients_with_every_backbone(backbone: str, geometry: dict[str, Any], images: int) -> None:
    compare(backbone, geometry, images)


@pytest.mark.parametrize(("geometry", "images"), CASES)
def test_same_losses_and_gradients_in_evaluation_mode(geometry: dict[str, Any], images: int) -> None:
    compare("thin", geometry, images)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_same_losses_and_gradients_with_real_backbones(backbone: str) -> None:
    compare(backbone, {"ratios": (1, 2), "images_per_canvas": (1, 4)}, 12)


def calibrated(matched: MCL, released: MCL, query: MontageBatch, key: MontageBatch) -> tuple[MCL, MCL]:
    """Both models, with the statistics of a batch.

    With statistics that fit no data, embeddings hardly differ, and nine digits of a gradient cancel.
    """
    for module in released.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad(), fast_convolutions():
        released.train()(query, key)
    matched.load_state_dict(released.eval().state_dict())
    return matched, released


def compare(backbone: str, geometry: dict[str, Any], images: int) -> None:
    geometry = Geometry(cells=1, **geometry)
    query, key = (random_view(geometry, images, seed, torch.float64) for seed in (1, 2))
    results = []
    for model in calibrated(*models(backbone, geometry), query, key):
        with fast_convolutions():
            output = model(query, key)
            output.loss.backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (a, a_grads), (b, b_grads) = results
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-10, atol=0)
    torch.testing.assert_close(a.scores["positive"], b.scores["positive"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-10, atol=0)
    assert a_grads.keys() == b_grads.keys()
    scale = max(g.abs().max() for g in b_grads.values())
    for name, gradient in b_grads.items():
        assert (a_grads[name] - gradient).norm() <= 1e-10 * max(gradient.norm(), 1e-3 * scale), name


def test_matched_computes_only_what_the_loss_reads() -> None:
    """Tiles that the head processes: 640 of 14,620 per view at the default geometry with N = 128, and 128 for
    targets."""
    geometry = Geometry(cells=1)
    matched, released = models("thin", geometry)
    query, key = (random_view(geometry, 32, seed, torch.float64) for seed in (1, 2))
    counts = []
    for model in (matched, released):
        seen = {"online": 0, "target": 0}

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], _: Any, seen: dict[str, int] = seen) -> None:
            seen["online" if module is model.online.head else "target"] += len(inputs[0])  # noqa: B023

        model.online.head.register_forward_hook(count)
        model.target.head.register_forward_hook(count)
        with torch.no_grad():
            model(query, key)
        counts.append(seen)
    tiles = sum(geometry.tiles(32))
    everything = sum(geometry.canvases(32)) * (1 + 4 + 16 + 64)
    assert counts[0] == {"online": 2 * tiles, "target": 2 * 32}
    assert counts[1] == {"online": 2 * everything, "target": 2 * everything}


def test_running_statistics_update_level_by_level() -> None:
    """In training mode each lateral, output, head and projector norm processes each level once per view, level 0
    first."""
    geometry = Geometry(cells=2)
    matched, _ = models("thin", geometry)
    norms = {
        name: m for name, m in matched.online.head.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    order: dict[str, list[int]] = {name: [] for name in norms}
    for name, module in norms.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: order[name].extend(inputs[1]))
    matched.train()
    with torch.no_grad():
        matched(*(random_view(geometry, 32, seed, torch.float64) for seed in (1, 2)))
    assert len(order) > 2
    assert all(seen == 2 * list(geometry.tiles(32)) for seen in order.values())
    assert matched.online.fpn.laterals[0].norm.num_batches_tracked == 2 * geometry.levels
    assert matched.target.fpn.laterals[0].norm.num_batches_tracked == 2
    assert matched.target.head.convs[0].norm.num_batches_tracked == 2


class OneByOne(MCL):
    """Networks process each view separately."""

    def targets(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        return [super(OneByOne, self).targets([view])[0] for view in views]

    def embeddings(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        return [super(OneByOne, self).embeddings([view])[0] for view in views]

    def predictions(self, embeddings: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        return [super(OneByOne, self).predictions([view])[0] for view in embeddings]


@pytest.mark.parametrize(
    ("backbone", "geometry", "images"),
    [
        ("thin", Geometry(cells=2), 32),
        # One of the strides is skipped.
        ("thin", Geometry(cells=2, ratios=(1, 4), images_per_canvas=(1, 16), queries=(2, 1)), 32),
        ("resnet18", Geometry(cells=2, ratios=(1, 2), images_per_canvas=(1, 4)), 4),
    ],
)
def test_views_together_are_the_views_one_by_one(backbone: str, geometry: Geometry, images: int) -> None:
    """Losses, gradients and running statistics are equal."""
    views = [random_view(geometry, images, seed, torch.float64) for seed in (1, 2)]
    views = [dataclasses.replace(view, query_counts=geometry.query_canvases(images)) for view in views]
    together, _ = models(backbone, geometry)
    together.train()
    one_by_one = copy.deepcopy(together)
    one_by_one.__class__ = OneByOne
    for model in (one_by_one, together):
        model(*views).loss.backward()
    assert dict(together.named_buffers()).keys() == dict(one_by_one.named_buffers()).keys()
    for (name, ours), theirs in zip(together.named_buffers(), one_by_one.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)
    gradients = [p.grad for p in one_by_one.parameters() if p.grad is not None]
    scale = max(float(g.abs().max()) for g in gradients)
    assert len(gradients) > 20
    found = [p.grad for p in together.parameters() if p.grad is not None]
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.parametrize("compute", ["matched", "released"])
def test_gradients_of_fewer_queries_are_those_without_the_other_terms(compute: str) -> None:
    """One in four canvases of level 0, all tiles of level 1, and every image as a target."""
    geometry = Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 4), queries=(4, 1))
    views = [random_view(geometry, 16, seed, torch.float64) for seed in (1, 2)]
    matched, released = models("thin", geometry)
    model = {"matched": matched, "released": released}[compute]
    few = geometry.query_canvases(16)
    assert few == (4, 4)
    output = model(*(dataclasses.replace(view, query_counts=few) for view in views))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, parameters)

    cfg, targets = model.config.model, matched.targets(views[::-1])
    predicted = matched.predictions(matched.embeddings(views))
    losses = []
    for view, (full, tiles), (bank,) in zip(views, predicted, targets, strict=True):
        own, others = matched.positives(view)
        predictions, banks = [full[:4], tiles], [F.normalize(bank, dim=1)]
        compare = partial(info_nce, temperature=cfg.temperature)
        losses.append(over_levels(predictions, [own[:4], others], banks, [[0], [0]], compare)[0])
    loss = total_loss(torch.stack(losses), cfg.loss_weights, 2 * cfg.temperature)
    expected = torch.autograd.grad(loss, [p for p in matched.parameters() if p.requires_grad])
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    scale = max(g.abs().max() for g in expected)
    for gradient, other in zip(found, expected, strict=True):
        assert (gradient - other).norm() <= 1e-10 * max(other.norm(), 1e-3 * scale)


def test_queries_take_the_first_canvases_of_each_level() -> None:
    geometry = Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 4))
    matched, _ = models("thin", geometry)
    query = random_view(geometry, 8, 1, torch.float64)
    with torch.no_grad():
        (full,) = matched.predictions(matched.embeddings([query]))
        part = dataclasses.replace(query, query_counts=(3, 1))
        (few,) = matched.predictions(matched.embeddings([part]))
        rows = matched.positives(part)
    assert [len(p) for p in few] == [3, 4]
    torch.testing.assert_close(few[0], full[0][:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(few[1], full[1][:4], rtol=1e-12, atol=1e-12)
    assert rows[1].tolist() == query.tile_images[8:12].tolist()
