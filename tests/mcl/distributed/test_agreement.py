"""Processes that do not belong together are refused at the start, with the rank and the remedy."""

import datetime
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import mcl
from dali_pipelines import pipelines
from mcl import config, distributed
from mcl.config import Config, ConfigError
from mcl.distributed import agreement, launch
from mcl.ops import steps
from mcl.train.trainer import Trainer
from tests.mcl.ranks import free_port, in_ranks
from tests.mcl.tiny import TINY

Words = list[list[str]]  # by rank


def refusals(runs: list[Words], output: str) -> list[str]:
    """What this rank is told about each run, whose words differ between ranks; empty where it may start."""
    said = []
    for words in runs:
        cfg = config.override(config.from_dict(TINY), [f"output={output}", *words[distributed.rank()]])
        said.append(refusal(cfg))
    return said


def refusal(cfg: Config) -> str:
    try:
        agreement.check(cfg, "cpu")
    except ConfigError as error:
        return str(error)
    return ""


def test_configurations_must_be_the_same(tmp_path: Path) -> None:
    """But for where a machine keeps its images, and for its threads."""
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
    """What all are told when the last ranks have other code, other libraries, and a run folder of their own.

    A changed line, and a file of another name, are other code; what Python compiles is not.
    """
    own = distributed.rank() > 1
    folder = Path(root) / ("own" if own else "shared")
    (folder / "tiny" / "checkpoints").mkdir(parents=True, exist_ok=True)
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
    if not own:
        (folder / "tiny" / "checkpoints" / "step_00000004.pt").touch()
    distributed.barrier()
    with mock.patch.object(Config, "run_folder", folder / "tiny"):
        said.append(refusal(config.from_dict(TINY)))
    return said


def test_code_pytorch_and_run_folder_must_be_the_same(tmp_path: Path) -> None:
    said = in_ranks(4, other_machine, str(tmp_path))
    assert said[0] == said[1] == said[2] == said[3]
    allowed, same_code, changed, renamed, version, sources, operators, dali, plugin, folder = said[0]
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
    assert operators.endswith("on rank 0; mcl doctor says on each machine why; build the extension on all of them")
    engine = "the engine of the loader: "
    assert dali.startswith(f"{engine}fused on cpu (DALI 1.50.0) on rank 2, 3, fused on cpu (DALI 2.4.0) on rank 0; mcl")
    assert plugin.startswith(
        f"{engine}none (data.engine: fused cannot be had: no CUDA device; mcl's DALI plugin is not"
    )
    assert folder == "the newest checkpoint: none on rank 2, 3, step_00000004.pt on rank 0; " + (
        "put output on a file system that all machines share"
    )


def start(
    cases: list[tuple[list[str], int]], devices: list[str], patience: float, gpus: int = 8, late: int | None = None
) -> list[str]:
    """What this rank is told when it joins a group of the size that its case says, on `devices`; `gpus` are seen, and
    rank `late` comes after the others."""
    distributed.teardown()
    said = []
    for sizes, port in cases:
        os.environ |= {"WORLD_SIZE": sizes[int(os.environ["RANK"])], "MASTER_PORT": str(port)}
        time.sleep(2 if late == int(os.environ["RANK"]) else 0)
        with (
            mock.patch.object(launch, "_ROLL_CALL", datetime.timedelta(seconds=patience)),
            mock.patch.object(torch.cuda, "set_device"),
            mock.patch.object(torch.cuda, "device_count", return_value=gpus),
        ):
            try:
                distributed.setup(devices[int(os.environ["RANK"])])
                said.append(str(distributed.world_size()))
            except ConfigError as error:
                said.append(str(error))
            distributed.teardown()
    return said


def test_processes_must_be_of_one_group() -> None:
    cases = [(sizes, free_port()) for sizes in (["2", "2"], ["2", "4"], ["4", "2"])]
    first, second = in_ranks(2, start, cases, ["cpu", "cpu"], 60.0)
    assert first == second
    assert first[0] == "2"
    for said, theirs, ours in ((first[1], 4, 2), (first[2], 2, 4)):
        assert said.startswith(
            f"WORLD_SIZE: rank 1 was started as one of {theirs} processes on cpu, rank 0 as one of {ours} processes on"
        )


def test_processes_beyond_the_number_of_rank_0_are_refused_too() -> None:
    told = in_ranks(3, start, [(["2", "2", "3"], free_port())], ["cpu"] * 3, 60.0, 8, 1)
    assert told[0] == told[1] == told[2]
    assert told[0][0].startswith("WORLD_SIZE: rank 2 was started as one of 3 processes on cpu, rank 0 as one of 2 proc")


def test_processes_must_all_come() -> None:
    first, second = in_ranks(2, start, [(["3", "3"], free_port())], ["cpu", "cpu"], 3.0)
    assert first == second
    assert first[0].startswith("WORLD_SIZE: of 3 processes, rank 2 did not come within 3 s; start as many as")


def test_processes_must_run_on_the_same_kind_of_device() -> None:
    first, second = in_ranks(2, start, [(["2", "2"], free_port())], ["cpu", "cuda"], 60.0)
    assert first == second
    assert "rank 1 was started as one of 2 processes on cuda, rank 0 as one of 2 processes on cpu" in first[0]


def test_processes_must_see_their_gpus() -> None:
    first, second = in_ranks(2, start, [(["2", "2"], free_port())], ["cuda", "cuda"], 60.0, 1)
    assert first == second
    assert first[0].startswith(
        "trainer.device: process 1 of its machine sees 1 GPUs; start one process per GPU, and let"
    )
    assert first[0].endswith("(under SLURM: no --gpus-per-task) (rank 1)")


def test_a_meeting_point_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="MASTER_PORT: not set; it must name the first machine"):
        distributed.setup("cpu")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(launch, "_ANSWER", datetime.timedelta(seconds=1))
    with pytest.raises(ConfigError, match=rf"MASTER_ADDR, MASTER_PORT: nobody listens at 127\.0\.0\.1:{port} \("):
        distributed.setup("cpu")


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
    """It makes no run folder."""
    words = [f"data.root={photos / 'val'}", f"output={tmp_path}", "trainer.timeout=2"]
    first, second = in_ranks(2, train, [words, [*words, "trainer.global_batch=12"]])
    assert (
        first
        == second
        == ("trainer.global_batch: 12 on rank 1, 8 on rank 0; start all processes with the same configuration")
    )
    first, second = in_ranks(2, train, [[*words, "trainer.global_batch=9"]] * 2)
    assert first == second == "trainer.global_batch: 9 does not divide by 2 processes"
    assert not list(tmp_path.iterdir())
