"""``compute: released`` against numbers that the authors' released code computed in float64 (tests/data/step_*.json).

How weights and images are drawn is part of the files' definition; see tests/data/README.md.
"""

import json
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from dali_pipelines.layout import assemble
from mcl import config
from mcl.config import Config
from mcl.exporters.openselfsup import their_name
from mcl.objectives import MCL
from mcl.train import ema
from mcl.train.optim import build_optimizer, excluded, set_learning_rate
from tests.conftest import ROOT, view
from tests.fp64 import fast_convolutions

DATA = ROOT / "tests" / "data"


def read(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"step_{name}.json").read_text())


def configure(c: dict[str, Any]) -> Config:
    return config.from_dict(
        {
            "montage": {"cells": c["canvas"] // 32, "ratios": c["ratios"]},
            "model": {
                "backbone": f"resnet{c['depth']}",
                "width": c["width"],
                "hidden": c["hidden"],
                "compute": "released",
                "temperature": c["temperature"],
                "loss_weights": c["loss_weights"],
            },
            "optim": {"exclude": "released", "weight_decay": c["weight_decay"], "momentum": c["sgd_momentum"]},
        }
    )


def draw(seed: int, name: str, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if name.endswith("running_mean"):
        return torch.zeros(shape)
    if name.endswith("running_var"):
        return torch.ones(shape)
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * (2 / values[0].numel()) ** 0.5
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values


def our_names(model: MCL) -> dict[str, str]:
    """mcl's names of a model's tensors, by the authors' names."""
    return {their_name(name): name for name in model.state_dict()}


def build(reference: dict[str, Any], dtype: torch.dtype) -> tuple[MCL, Config]:
    cfg = configure(reference["config"])
    model = MCL(cfg)
    state, names = model.state_dict(), our_names(model)
    for name, shape in reference["shapes"].items():
        ours = names[name]
        assert list(state[ours].shape) == shape
        if not name.endswith("num_batches_tracked"):
            state[ours] = draw(reference["config"]["seed"], name, shape)
            if ours.startswith("online."):
                state[ours.replace("online.", "target.")] = state[ours].clone()
    model.load_state_dict(state)
    return model.to(dtype), cfg


def views(reference: dict[str, Any], cfg: Config, step: int, dtype: torch.dtype) -> list[MontageBatch]:
    c = reference["config"]
    generator = torch.Generator().manual_seed(1000 * c["seed"] + step)
    crops = torch.randn(c["images"], 8, 3, c["canvas"], c["canvas"], generator=generator).to(dtype)
    result = []
    for first, name in ((0, "q"), (4, "k")):
        slots = [list(range(c["images"])), *reference["steps"][step]["slots"][name]]
        canvases = [
            assemble(crops[s, first + i][..., ::r, ::r], r)
            for i, (s, r) in enumerate(zip(slots, c["ratios"], strict=True))
        ]
        sources = torch.cat([torch.tensor(s) for s in slots])
        result.append(view(cfg.montage, c["images"], torch.cat(canvases), sources))
    return result


def differs(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) > max(1e-9, 1e-6 * abs(theirs))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("r18", 1),
        ("r50", 1),
        pytest.param("r18", 3, marks=pytest.mark.soak),  # including momentum and the updated target network
        pytest.param("r50", 2, marks=pytest.mark.soak),
    ],
)
def test_every_value_of_every_step(name: str, steps: int) -> None:
    reference = read(name)
    assert len(reference["steps"]) >= steps
    c = reference["config"]
    model, cfg = build(reference, torch.float64)
    optimizer = build_optimizer(cfg.optim, model)
    set_learning_rate(optimizer, c["lr"])
    parameters, names = dict(model.named_parameters()), our_names(model)
    for step, expected in enumerate(reference["steps"][:steps]):
        with fast_convolutions():
            output = model(*views(reference, cfg, step, torch.float64))
            optimizer.zero_grad()
            output.loss.backward()
        ours = {"total": output.loss.item()}
        theirs = {"total": expected["total"]}
        for v, letter in enumerate("qk"):
            for level, weight in enumerate(c["loss_weights"]):
                key = f"{letter}_level_{level}"
                ours |= {f"loss_{key}": output.losses[v, level].item() * 2 * c["temperature"] * weight}
                ours |= {f"pos_cos_dist_{key}": output.scores["positive"][v, level].item()}
                ours |= {f"neg_cos_dist_{key}": output.scores["negative"][v, level].item()}
        theirs |= expected["losses"]
        for key, value in expected["grad_norm"].items():
            gradient = parameters[names[key]].grad
            ours[f"gradient of {key}"], theirs[f"gradient of {key}"] = gradient.norm().item(), value
        optimizer.step()
        ema.update(model.target.parameters(), model.online.parameters(), c["ema"])
        state = model.state_dict()
        for key, value in expected["norm_after"].items():
            ours[f"{key} after"], theirs[f"{key} after"] = state[names[key]].norm().item(), value
        assert ours.keys() == theirs.keys()
        assert not {key: (ours[key], theirs[key]) for key in ours if differs(ours[key], theirs[key])}, f"step {step}"


@pytest.mark.parametrize("name", ["r18", "r50"])
def test_first_losses_in_float32(name: str) -> None:
    reference = read(name)
    model, cfg = build(reference, torch.float32)
    with torch.no_grad():
        output = model(*views(reference, cfg, 0, torch.float32))
    expected = reference["steps"][0]["losses"]
    assert output.loss.item() == pytest.approx(reference["steps"][0]["total"], rel=1e-5)
    for v, letter in enumerate("qk"):
        for level, weight in enumerate(reference["config"]["loss_weights"]):
            key = f"{letter}_level_{level}"
            assert output.losses[v, level].item() * 2 * weight == pytest.approx(expected[f"loss_{key}"], rel=1e-5)
            assert output.scores["positive"][v, level].item() == pytest.approx(
                expected[f"pos_cos_dist_{key}"], abs=1e-4
            )
            assert output.scores["negative"][v, level].item() == pytest.approx(
                expected[f"neg_cos_dist_{key}"], abs=1e-4
            )


@pytest.mark.parametrize("name", ["r18", "r50"])
def test_released_exclusion_finds_the_same_parameters(name: str) -> None:
    reference = read(name)
    cfg = configure(reference["config"])
    with torch.device("meta"):
        model = MCL(cfg)
    found = {n for n, p in model.named_parameters() if p.requires_grad and excluded(n, p, "released")}
    names = our_names(model)
    assert found == {names[n] for n in reference["excluded"]}
