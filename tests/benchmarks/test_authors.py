"""The authors' step in plain PyTorch has the results of their code and of ``compute: released``."""

import statistics
import time

import pytest
import torch

from benchmarks.authors import Authors, AuthorsStep
from benchmarks.step import CONTENDERS, Setting, Step
from mcl import config
from mcl.exporters.openselfsup import their_name
from mcl.objectives import MCL
from tests.conftest import random_view
from tests.fp64 import fast_convolutions
from tests.mcl.train.test_reference import configure, differs, draw, read, views


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("r18", 3, marks=pytest.mark.soak),
        pytest.param("r50", 2, marks=pytest.mark.soak),
    ],
)
def test_every_recorded_value_of_every_step(name: str, steps: int) -> None:
    reference = read(name)
    c, cfg = reference["config"], configure(reference["config"])
    model = Authors(cfg.model, cfg.montage.cells)
    state = {n: draw(c["seed"], n, shape) for n, shape in reference["shapes"].items() if "num_batches" not in n}
    state |= {n.replace("encoder_q", "encoder_k"): value for n, value in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all("num_batches" in n for n in missing)
    assert not unexpected
    parameters = dict(model.double().named_parameters())
    update = AuthorsStep(config.override(cfg, ["optim.clip_norm=0"]), model)
    for step, expected in enumerate(reference["steps"][:steps]):
        with fast_convolutions():
            log = update(*views(reference, cfg, step, torch.float64), c["lr"], c["ema"])
        state = model.state_dict()
        ours = {key: value.item() for key, value in log.items()}
        ours |= {f"gradient of {n}": parameters[n].grad.norm().item() for n in expected["grad_norm"]}
        ours |= {f"{n} after": state[n].norm().item() for n in expected["norm_after"]}
        theirs = expected["losses"] | {f"gradient of {n}": value for n, value in expected["grad_norm"].items()}
        theirs |= {f"{n} after": value for n, value in expected["norm_after"].items()}
        assert ours.keys() == theirs.keys()
        assert not {key: (ours[key], theirs[key]) for key in ours if differs(ours[key], theirs[key])}, f"step {step}"


def test_released_computes_the_same() -> None:
    """Loss, gradients and running statistics are equal in float64."""
    model = {"backbone": "resnet18", "width": 16, "hidden": 32, "compute": "released"}
    cfg = config.from_dict({"montage": {"cells": 1}, "model": model})
    torch.manual_seed(0)
    released, authors = MCL(cfg).double(), Authors(cfg.model, cfg.montage.cells).double()
    authors.load_state_dict({their_name(name): value for name, value in released.state_dict().items()})
    query, key = (random_view(cfg.montage, 32, seed, torch.float64) for seed in (1, 2))
    with fast_convolutions():
        ours, theirs = released(query, key), authors(query, key)
        ours.loss.backward()
        loss = sum(value for name, value in theirs.items() if name.startswith("loss"))
        loss.backward()
    torch.testing.assert_close(ours.loss, loss, rtol=1e-9, atol=0)
    gradients = {name: p.grad for name, p in authors.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max() for gradient in gradients.values())
    trained = {their_name(name): p.grad for name, p in released.named_parameters() if p.grad is not None}
    assert trained.keys() == gradients.keys()
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-9, atol=1e-9 * scale, msg=name)
    state = authors.state_dict()
    for name, value in released.named_buffers():
        torch.testing.assert_close(value, state[their_name(name)], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.soak
def test_released_takes_no_longer() -> None:
    """Compares steps of ResNet-18 at 64 px in pairs, on one thread and by CPU time, which other processes hardly
    affect."""
    setting = Setting("resnet18", cells=2, images=32, precision="fp32", device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = [CONTENDERS[name][1](setting).start() for name in ("authors", "released")]
        rounds = [[_cpu_seconds(step) for step in steps] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    ratios = [released / authors for authors, released in rounds[1:]]  # the first round is a warm-up
    assert statistics.median(ratios) < 1.1, ratios


def _cpu_seconds(step: Step) -> float:
    start = time.process_time()
    step(64)
    return time.process_time() - start
