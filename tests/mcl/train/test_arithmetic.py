"""Algorithms and precision of PyTorch's libraries, and runs that are bit-identical."""

import copy
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mcl import config, distributed
from mcl.config import Config, ConfigError, TrainerConfig
from mcl.ops import steps
from mcl.train import arithmetic, checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import ThinBackbone
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import equal
from tests.step import FOUR_LEVELS, build, configure, views

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, "unknown")  # restores the variable after the test
    monkeypatch.delenv(WORKSPACE)
    yield
    arithmetic.choose(TrainerConfig())


def switches() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic cuDNN": cudnn.deterministic,
        "cuDNN by timing": cudnn.benchmark,
        "TF32 convolutions": cudnn.conv.fp32_precision == "tf32",
        "products": torch.get_float32_matmul_precision(),
        "TF32 products": torch.backends.cuda.matmul.fp32_precision == "tf32",
    }


def test_switches_follow_the_configuration() -> None:
    """Matrix products never use TF32, since the loss is one, even if NVIDIA's containers set a variable that enables
    it."""
    torch.set_float32_matmul_precision("high")
    usual = {
        "deterministic algorithms": False,
        "deterministic cuDNN": False,
        "cuDNN by timing": True,
        "TF32 convolutions": True,
        "products": "highest",
        "TF32 products": False,
    }
    exact = {"deterministic algorithms": True, "deterministic cuDNN": True, "cuDNN by timing": False}
    for words, expected in (
        ({}, usual),
        ({"tf32": False}, usual | {"TF32 convolutions": False}),
        ({"deterministic": True}, usual | exact),
        ({}, usual),
    ):
        arithmetic.choose(TrainerConfig(**words))  # type: ignore[arg-type]
        assert switches() == expected


def test_a_run_says_in_which_arithmetic() -> None:
    assert arithmetic.describe(TrainerConfig(precision="fp32"), "cuda") == "fp32 (TF32 in convolutions)"
    assert arithmetic.describe(TrainerConfig(precision="fp32", tf32=False), "cuda") == "fp32"
    assert arithmetic.describe(TrainerConfig(deterministic=True), "cuda") == "bf16, deterministic"


# ---------------------------------------------------------------------------------------------------- deterministic


def test_cublas_is_configured_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = TrainerConfig(deterministic=True)
    arithmetic.choose(TrainerConfig())
    assert WORKSPACE not in os.environ
    said = rf"{WORKSPACE} is not set, and CUDA is already initialised; set it to :4096:8"
    with mock.patch("torch.cuda.is_initialized", return_value=True), pytest.raises(ConfigError, match=said):
        arithmetic.choose(exact)
    arithmetic.choose(exact)
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    arithmetic.choose(exact)
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.setenv(WORKSPACE, ":4096:2:16:8")
    with pytest.raises(ConfigError, match=rf"not deterministic with {WORKSPACE}=:4096:2:16:8; set it to :4096:8"):
        arithmetic.choose(exact)


def test_what_deterministic_algorithms_do_not_cover_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = configure("trainer.deterministic=true")
    arithmetic.check(configure(), "cuda", "gpu")
    arithmetic.check(exact, "cpu", "cpu")
    with pytest.raises(
        ConfigError, match=r"trainer\.deterministic: decoding on a GPU is not reproducible.*data\.device=cpu"
    ):
        arithmetic.check(exact, "cuda", "gpu")
    with pytest.raises(ConfigError, match=r"trainer\.deterministic: torch\.compile"):
        configure("trainer.deterministic=true", "trainer.compile=true")
    for built in (True, False):
        monkeypatch.setattr(arithmetic.ops, "compiled", lambda name, device, built=built: built)
        monkeypatch.setattr(steps, "compiled", lambda name, device, built=built: built)
        arithmetic.check(config.override(exact, ["model.compute=released"]), "cuda", "cpu")
        if built:
            arithmetic.check(exact, "cuda", "cpu")
    with pytest.raises(ConfigError, match=r"trainer\.deterministic: region pooling .*; build them"):
        arithmetic.check(exact, "cuda", "cpu")


@pytest.mark.parametrize("words", [["optim.name=adamw"], ["model.compute=released", "trainer.precision=bf16"]])
def test_on_one_cpu_it_changes_nothing(words: list[str]) -> None:
    """No operator reads memory before it is written, which PyTorch then fills with NaN."""
    weights = []
    for choice in ("false", "true"):
        cfg = configure(*words, f"trainer.deterministic={choice}")
        arithmetic.choose(cfg.trainer)
        step = build(cfg)
        for seed in (1, 3):
            step(*views(cfg, seed), lr=0.1, momentum=0.9)
        weights.append(step.model.state_dict())
    assert equal(*weights)


def resume(choice: str) -> tuple[int, Tensor]:
    """Weights of this rank that differ after a third step with and without an interruption before it, and the norms of
    all gradients."""
    cfg = configure(*FOUR_LEVELS, "trainer.global_batch=12", f"trainer.deterministic={choice}")
    arithmetic.choose(cfg.trainer)
    batches = [views(cfg, seed + 2 * distributed.rank(), world=3) for seed in (1, 101, 201)]
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        whole, resumed = build(cfg), build(cfg)
    norms = [whole(*batch, lr=0.1, momentum=0.9)[1] for batch in batches[:2]]
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    norms += [step(*batches[2], lr=0.1, momentum=0.9)[1] for step in (whole, resumed)]
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    return sum(int((a[name] != b[name]).sum()) for name in a), torch.stack(norms)


def resume_both() -> list[tuple[int, Tensor]]:
    return [resume("true"), resume("false")]


def test_three_processes_resume_bit_for_bit() -> None:
    """Gradients are in other buckets after the first step, and an all-reduce adds them in another order."""
    for (differ, norms), (_, of_all_reduce) in in_ranks(3, resume_both):
        assert differ == 0
        torch.testing.assert_close(norms, of_all_reduce)


def test_settings_that_change_results_are_refused_on_resume(tiny: Config, thin_backbone: None) -> None:
    """Or a warning, if bit-identical results are not promised."""
    exact = config.override(tiny, ["trainer.deterministic=true"])
    Trainer(exact).fit()
    assert "fp32, deterministic on cpu x 1" in (log := tiny.run_folder / "train.log").read_text()
    checkpoint.steps(tiny.run_folder / "checkpoints")[-1].unlink()
    with mock.patch("dali_pipelines.loader.choose_engine", return_value=("torchvision", "cpu", "no DALI")):
        changed = "engine was fused on cpu, is torchvision on cpu"
        with pytest.raises(ConfigError, match=rf"trainer\.deterministic: .*{changed}; restore the old values, or"):
            Trainer(exact)
        Trainer(config.override(exact, ["trainer.deterministic=false"])).loader.close()
    assert f"not bit for bit: {changed}; deterministic was True, is False" in log.read_text()
    Trainer(exact).loader.close()
