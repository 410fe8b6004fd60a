"""Processes that differ are refused at the start, with the rank and the remedy."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import mcl
from dali_pipelines import pipelines
from dali_pipelines.source import Source
from mcl import config, distributed
from mcl.config import Config, ConfigError
from mcl.ops import steps
from mcl.train import agreement
from mcl.train.trainer import Trainer
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import TINY

Words = list[list[str]]  # by rank


def refusals(runs: list[Words], output: str) -> list[str]:
    """The error of this rank for each run, whose words differ between ranks; empty if the run may start."""
    said = []
    for words in runs:
        cfg = config.override(config.from_dict(TINY), [f"output={output}", *words[distributed.rank()]])
        said.append(refusal(cfg))
    return said


def refusal(cfg: Config, names: tuple[str, ...] = (), step: int | None = None) -> str:
    """The error of this rank for given images and step of the checkpoint; empty if the run may start."""
    labels, sizes = np.zeros(len(names), np.int64), np.ones((len(names), 2), np.int32)
    source = Source("", "flat", names, labels, sizes, "", lambda i: b"")
    try:
        agreement.check(cfg, "cpu", source, step)
    except ConfigError as error:
        return str(error)
    return ""


def test_configurations_must_be_the_same(tmp_path: Path) -> None:
    """Except for paths of images and numbers of threads."""
    runs: list[Words] = [
        [[], []],
        [["data.root=/local/a", "data.threads=2"], ["data.root=/local/b", "data.index=/local/index"]],
        [["optim.base_lr=0.5"], []],
        [[], ["trainer.seed=7", "montage.ratios=[1,4]"]],
        [["name=a"], ["name=b"]],
    ]
    first, second = in_ranks(2, refusals, runs, str(tmp_path))
    same = "start all processes with the same configuration"
    assert (
        first
        == second
        == [
            "",
            "",
            f"optim.base_lr: 1.0 on rank 1, 0.5 on rank 0; {same}",
            f"montage.ratios: (1, 4) on rank 1, (1, 2) on rank 0; {same}",
            f"name: 'b' on rank 1, 'a' on rank 0; {same}",
        ]
    )


def other_machine(root: str) -> list[str]:
    """The errors of all ranks if the last ones have other code, libraries, images and checkpoints.

    A changed line or a renamed file is other code; compiled Python files are not.
    """
    own = distributed.rank() > 1
    folder = Path(root) / ("own" if own else "shared")
    folder.mkdir(exist_ok=True)
    said = [refusal(config.from_dict(TINY))]
    for file, value in (("a.py", 1), ("a.py", 2), ("b.py", 1)) if own else [("a.py", 1)] * 3:
        code = Path(tempfile.mkdtemp(dir=folder))
        (code / file).write_text(f"x = {value}\n")
        (code / f"{os.getpid()}.pyc").write_text("compiled")
        with mock.patch.object(mcl, "__path__", [str(code)]):
            said.append(refusal(config.from_dict(TINY)))
    with mock.patch.object(torch, "__version__", "2.10.0") if own else nullcontext():
        said.append(refusal(config.from_dict(TINY)))
    with mock.patch.object(agreement, "_BUILT_FROM", Path("nowhere")) if own else nullcontext():
        said.append(refusal(config.from_dict(TINY)))
    with mock.patch.object(steps, "compiled", lambda name, device: name != "lars_") if own else nullcontext():
        said.append(refusal(config.from_dict(TINY)))
    with mock.patch("nvidia.dali.__version__", "1.50.0") if own else nullcontext():
        said.append(refusal(config.from_dict(TINY)))
    with mock.patch.object(pipelines, "PLUGIN", Path("nowhere")) if own else nullcontext():
        said.append(refusal(config.override(config.from_dict(TINY), ["data.engine=fused"])))
    said.append(refusal(config.from_dict(TINY), names=("b",) if own else ("a",)))
    said.append(refusal(config.from_dict(TINY), step=None if own else 4))
    return said


def test_code_libraries_images_and_checkpoints_must_be_the_same(tmp_path: Path) -> None:
    said = in_ranks(4, other_machine, str(tmp_path))
    assert said[0] == said[1] == said[2] == said[3]
    allowed, same_code, changed, renamed, version, sources, operators, dali, plugin, images, newest = said[0]
    assert allowed == same_code == ""
    for code in (changed, renamed):
        assert code.startswith("the code of mcl: ")
        assert " on rank 2, 3, " in code
        assert code.endswith(" on rank 0; install the same commit on all machines")
    assert version == f"PyTorch: 2.10.0 on rank 2, 3, {torch.__version__} on rank 0; " + (
        "install the same version on all machines"
    )
    assert sources.startswith("the sources of the extension: unknown on rank 2, 3, ")
    assert sources.endswith(" on rank 0; rebuild it on all machines: pip install --no-build-isolation -e .")
    assert operators.startswith(
        "the operators: mcl: region_pool, batch_norm, norms, ema_; PyTorch: lars_, clip, cross_entropy on"
    )
    assert operators.endswith("on rank 0; mcl doctor reports why on each machine; build the extension on all of them")
    engine = "the engine of the loader: "
    assert dali.startswith(f"{engine}fused on cpu (DALI 1.50.0) on rank 2, 3, fused on cpu (DALI 2.4.0) on rank 0; mcl")
    assert plugin.startswith(
        f"{engine}none (data.engine: fused is not available: no CUDA device; mcl's DALI plugin is not"
    )
    assert images.startswith("data.root: 1 images with the fingerprint ")
    assert images.endswith("on rank 0; give all machines the same files: names, classes, sizes and broken ones")
    assert newest.startswith(
        "the newest checkpoint: none on rank 2, 3, of step 4 on rank 0; put output on a file system"
    )


def test_a_single_process_makes_no_group(tmp_path: Path, photos: Path, thin_backbone: None) -> None:
    words = [f"data.root={photos / 'val'}", f"output={tmp_path}", "trainer.epochs=1"]
    trainer = Trainer(config.override(config.from_dict(TINY), words))
    try:
        assert not dist.is_initialized()
        trainer.train_step(*next(trainer.loader))
        assert not dist.is_initialized()
    finally:
        trainer.loader.close()


def train(words: Words) -> Any:
    with mock.patch.object(distributed, "setup"):
        try:
            Trainer(config.override(config.from_dict(TINY), words[distributed.rank()]))
        except ConfigError as error:
            return str(error)


def test_a_trainer_asks_before_it_works(tmp_path: Path, photos: Path) -> None:
    """It does not create a run folder."""
    words = [f"data.root={photos / 'val'}", f"output={tmp_path / 'runs'}", "trainer.global_batch=16"]
    first, second = in_ranks(2, train, [words, [*words, "optim.ema=0.5"]])
    assert (
        first == second == "optim.ema: 0.5 on rank 1, 0.99 on rank 0; start all processes with the same configuration"
    )
    first, second = in_ranks(2, train, [[*words, "trainer.global_batch=9"]] * 2)
    assert first == second == "trainer.global_batch: 9 is not divisible by 2 processes"
    assert not list(tmp_path.iterdir())
