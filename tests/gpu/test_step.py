"""Training steps on a GPU are as exact as on the CPU, in every precision and variant, and the host does not wait."""

import functools
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mcl import config
from mcl.config import Config, TrainerConfig
from mcl.objectives import MCL
from mcl.records.meters import Meter
from mcl.signals import Interrupted
from mcl.train import arithmetic
from mcl.train.step import TrainingStep
from mcl.train.trainer import Trainer
from tests.fp64 import fast_convolutions
from tests.gpu.conftest import unwaiting
from tests.mcl.tiny import equal
from tests.mcl.train.test_step import Recorder
from tests.mcl.train.test_trainer import before_step, last_weights
from tests.step import FOUR_LEVELS, build, configure, views

SIZES = {"cpu": ("trainer.global_batch=8",), "cuda": ("trainer.global_batch=16", *FOUR_LEVELS)}
FP16 = ("trainer.precision=fp16", "trainer.max_loss_scale=256")
PRECISIONS = {
    "fp64": ("trainer.precision=fp64",),
    "fp32": ("trainer.precision=fp32", "trainer.tf32=false"),
    "tf32": ("trainer.precision=fp32", "trainer.tf32=true"),
    "bf16": ("trainer.precision=bf16",),
    "fp16": FP16,
}
ON_THE_CPU = PRECISIONS | {"tf32": FP16}
"""Precision of the CPU to compare with: TF32 keeps as many bits of a factor as fp16."""
WAYS = {
    "eager": (),
    "recompute": ("trainer.recompute=true",),
    "accumulate": ("trainer.accumulate=2",),
    "graph": ("trainer.cuda_graph=true",),
    "queue": ("model.targets=all", "model.queue=40", "trainer.cuda_graph=true"),
}


@pytest.fixture(autouse=True)
def _cheap(device: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU, uses a cheap backbone and fake graphs. Restores PyTorch's switches."""
    if device.type == "cpu":
        request.getfixturevalue("thin_backbone")
        monkeypatch.setattr(TrainingStep, "_recorder", lambda step: Recorder(step.model))
    yield
    arithmetic.choose(TrainerConfig())


def outcome(cfg: Config, device: torch.device) -> dict[str, Tensor]:
    """Running statistics and gradients, in float64, of the second of two steps that do not change weights."""
    arithmetic.choose(cfg.trainer)
    step = build(cfg, device)
    for seed in (1, 3):  # a graph is captured in the first step and replayed in the second
        step(*views(cfg, seed), lr=0, momentum=1)
    gradients = {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}
    parts = {
        "statistics": [b for b in step.model.buffers() if b.is_floating_point()],
        "gradients behind the backbone": [g for name, g in gradients.items() if ".backbone." not in name],
        "gradients of the backbone": [g for name, g in gradients.items() if ".backbone." in name],
    }
    return {name: torch.cat([t.detach().flatten().double().cpu() for t in part]) for name, part in parts.items()}


@functools.cache
def on_the_cpu(*words: str) -> dict[str, Tensor]:
    """With plain sums: oneDNN adds in float32 more exactly than a GPU."""
    cfg = configure(*words)
    with torch.backends.mkldnn.flags(enabled=cfg.trainer.precision != "fp32"), fast_convolutions():
        return outcome(cfg, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_errs_at_most_twice_as_much_as_the_cpus(device: torch.device, precision: str, way: str) -> None:
    """In float64 results are equal. In lower precision, a ReLU that rounding switches changes all gradients before it
    at random."""
    different = ("trainer.accumulate", "model.")  # variants that compute something else
    common = (*SIZES[device.type], *(word for word in WAYS[way] if word.startswith(different)))
    truth = on_the_cpu(*common, *PRECISIONS["fp64"])
    plain = on_the_cpu(*common, *ON_THE_CPU[precision])
    ours = outcome(configure(*SIZES[device.type], *WAYS[way], *PRECISIONS[precision]), device)
    for name, exact in truth.items():
        error = (ours[name] - exact).norm()
        if precision == "fp64":
            assert error <= 1e-9 * exact.norm(), name
        elif name != "gradients of the backbone":
            assert error <= 2 * (plain[name] - exact).norm(), name


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=bf16",),
        ("trainer.precision=bf16", "trainer.recompute=true", "trainer.accumulate=2", "optim.name=sgd"),
        ("trainer.precision=fp32", "trainer.on_nonfinite=skip", "optim.name=adamw", "optim.clip_norm=1"),
        (*FP16, "model.compute=released"),
    ],
    ids=" ".join,
)
def test_the_host_waits_for_no_step(device: torch.device, words: tuple[str, ...]) -> None:
    cfg = configure(*SIZES[device.type], *words)
    arithmetic.choose(cfg.trainer)
    step = build(cfg, device)
    meter = Meter(
        len(cfg.montage.ratios), MCL.scores, device, cfg.trainer.precision == "fp16", cfg.trainer.on_nonfinite == "skip"
    )
    for i in range(2):  # libraries choose algorithms, and state is created
        meter.add(i, *step(*views(cfg), lr=0.1, momentum=0.99))
    batch = views(cfg)
    with unwaiting(device):
        meter.add(2, *step(*batch, lr=0.1, momentum=0.99))
    assert meter.failure() is None


@pytest.mark.parametrize("words", [("trainer.precision=fp32",), ("trainer.precision=bf16",)], ids=" ".join)
def test_a_resumed_run_ends_with_the_weights_of_another(
    device: torch.device, tiny: Config, words: tuple[str, ...]
) -> None:
    words = (*words, "trainer.deterministic=true", f"trainer.device={device.type}", "data.device=cpu")
    whole, stopped = (config.override(tiny, [*words, f"name={name}"]) for name in ("whole", "stopped"))
    Trainer(whole).fit()
    trainer = Trainer(stopped)
    before_step(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        trainer.fit()
    Trainer(stopped).fit()
    ours, theirs = (last_weights(cfg) for cfg in (stopped, whole))
    assert all(equal(ours[part], theirs[part]) for part in ("model", "optimizer"))
