"""The variables of launchers; and the SLURM script, run unchanged with replacements for srun and scontrol."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from mcl import distributed
from mcl.config import ConfigError
from mcl.distributed import launch
from mcl.records.metrics import read
from mcl.train import checkpoint
from tests.conftest import ROOT
from tests.mcl.ranks import free_port, in_ranks
from tests.mcl.tiny import TINY

SCRIPT = ROOT / "scripts" / "slurm.sbatch"

SRUN = """
import os, signal, subprocess, sys
open(os.environ["SAID"], "a").write(" ".join(["srun", *sys.argv[1:]]) + "\\n")
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
task = subprocess.Popen(command)
signal.signal(signal.SIGTERM, lambda number, _: task.send_signal(number))
sys.exit(task.wait())
"""

SCONTROL = """
import os, sys
open(os.environ["SAID"], "a").write(" ".join(["scontrol", *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1", "node2", sep="\\n")
if sys.argv[1:3] == ["show", "job"]:
    print("JobId=1 JobName=mcl JobState=" + os.environ["STATE"], "Reason=None Requeue=1")
"""


class Job:
    """A SLURM job that runs the script; its processes train until they are stopped."""

    def __init__(self, folder: Path, photos: Path) -> None:
        self.folder, self.said = folder, folder / "said"
        for name, program in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(f"#!{sys.executable}\n{program}")
            (folder / name).chmod(0o755)
        (folder / "python").symlink_to(sys.executable)
        preset = {**TINY, "trainer": {**TINY["trainer"], "log_every": 1, "checkpoint_epochs": 1000, "epochs": 1000}}
        preset["montage"] = {"cells": 1, "images_per_canvas": [1, 2, 2, 2]}
        preset["model"] = {**TINY["model"], "loss_weights": [0.25] * 4}
        (folder / "tiny.yaml").write_text(yaml.safe_dump(preset))
        self.words = [f"data.root={photos / 'val'}", f"output={folder}", f"data.index={folder / 'index'}"]

    def start(self, *words: str, state: str = "RUNNING") -> "subprocess.Popen[str]":
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
        slurm |= {"SLURM_JOB_NUM_NODES": "1", "PROCESSES_PER_NODE": "2"}
        # In a virtual environment Python finds packages by the path with which it was started.
        environment = {**os.environ, **slurm, "SAID": str(self.said), "STATE": state}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        environment["PATH"] = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(SCRIPT), str(self.folder / "tiny.yaml"), *self.words, *words],
            **{"env": environment, "cwd": ROOT, "text": True, "start_new_session": True},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )

    def steps(self) -> int:
        return len([r for r in read(self.folder / "tiny" / "metrics.jsonl") if r["kind"] == "train"])


def stop(job: Job, after: int, state: str = "RUNNING") -> str:
    """Sends SIGTERM to the script, as SLURM does, after the given number of steps; returns the job's output."""
    running = job.start(state=state)
    while job.steps() < after and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 1, printed  # of torchrun
    return printed


def test_sbatch_is_a_script() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    options = re.findall(r"^#SBATCH --([a-z-]+)", SCRIPT.read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal", "requeue", "open-mode", "output"} <= set(options)


@pytest.mark.fault("a SLURM job before its time is up")
def test_before_its_time_is_up_a_job_saves_and_goes_back_to_the_queue(tmp_path: Path, photos: Path) -> None:
    job = Job(tmp_path, photos)
    printed = stop(job, after=2)
    assert "stopped by signal 15" in printed
    assert checkpoint.load(tmp_path / "tiny" / "checkpoints" / "last.pt")["step"] >= 2
    hostnames, srun, _, requeue = job.said.read_text().splitlines()
    assert hostnames == "scontrol show hostnames node[1-2]"
    assert srun.startswith("srun --kill-on-bad-exit=1 --wait=0 --cpu-bind=none --cpus-per-task=1 python -m torch.dist")
    assert requeue == f"scontrol requeue {os.getpid()}"


@pytest.mark.soak
@pytest.mark.fault("scancel of a SLURM job")
def test_a_cancelled_job_saves_and_stays_away(tmp_path: Path, photos: Path) -> None:
    job = Job(tmp_path, photos)
    assert "stopped by signal 15" in stop(job, after=2, state="COMPLETING")
    assert "scontrol requeue" not in job.said.read_text()


@pytest.mark.fault("a SLURM job stopped twice, and one that fails")
@pytest.mark.soak
def test_queued_again_it_goes_on_where_it_stopped(tmp_path: Path, photos: Path) -> None:
    """It continues however often it is stopped; a job that fails is not queued again."""
    job = Job(tmp_path, photos)
    stop(job, after=2)
    stopped = checkpoint.load(tmp_path / "tiny" / "checkpoints" / "last.pt")["step"]
    stop(job, after=stopped + 2)
    resumed = job.start("trainer.global_batch=9")
    printed, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 1
    assert "trainer.global_batch: 9 is not divisible by 2 processes" in printed
    commands = [line.split()[:2] for line in job.said.read_text().splitlines()]
    assert commands.count(["scontrol", "requeue"]) == 2
    records = [r["step"] for r in read(tmp_path / "tiny" / "metrics.jsonl")]
    assert records == list(range(1, len(records) + 1))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def variables(**values: Any) -> dict[str, str]:
    return {f"SLURM_{name.upper()}": str(value) for name, value in values.items()}


TORCHRUN = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("", "2", "-1", "one", "1.0", " ")),
        *(("WORLD_SIZE", value) for value in ("", "0", "two", "99999999999")),
        *(("LOCAL_RANK", value) for value in ("", "2")),
        *(("LOCAL_WORLD_SIZE", value) for value in ("", "0", "3")),
        *(("MASTER_PORT", value) for value in ("", "83120", "0", "http")),
        *(("MASTER_ADDR", value) for value in ("", "no.such.host.invalid", "a" * 300, "..")),
    ],
)
def test_a_wrong_variable_is_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setattr(launch, "_RESOLVE", 0.5)
    for right in TORCHRUN.items():
        environment.setenv(*right)
    assert launch.world_size() == 2
    environment.setenv(name, value)
    with pytest.raises(ConfigError, match=f"^{name}: "):
        launch.world_size()


@pytest.mark.parametrize(
    "left",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "3", "LOCAL_RANK": "3", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "83120"},
        variables(procid=0, localid=0, nodeid=0, ntasks=1, step_num_tasks=1, step_tasks_per_node=1),
        variables(ntasks=8),  # in a shell started by salloc
        variables(ntasks=8, procid=0, localid=0, nodeid=0),  # in a batch script, without srun
    ],
)
def test_variables_left_behind_make_a_single_process(environment: pytest.MonkeyPatch, left: dict[str, str]) -> None:
    for name, value in left.items():
        environment.setenv(name, value)
    distributed.setup("cpu")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert (distributed.local_rank(), distributed.local_world_size()) == (0, 1)


def test_processes_of_srun_alone_are_refused(environment: pytest.MonkeyPatch) -> None:
    for name, value in variables(procid=1, step_num_tasks=8).items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS: srun started 8 processes without torchrun"):
        distributed.setup("cpu")


def test_processes_that_do_not_meet(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "MASTER_PORT": str(free_port())}.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError, match=r"2 processes did not meet at 127\.0\.0\.1:"):
        distributed.setup("cpu", 1)


def test_an_nccl_that_cannot_start_says_why(environment: pytest.MonkeyPatch) -> None:
    said = "NCCL error in: x.cpp:1, unhandled system error\nncclSystemError: failed.\nLast error:\nNo space in /dev/shm"
    stack = "\nException raised from create at x.cpp:1 (most recent call first):\nframe #0"
    for name, value in {**TORCHRUN, "MASTER_PORT": str(free_port())}.items():
        environment.setenv(name, value)
    environment.setattr(distributed, "gpus", lambda: 8)
    environment.setattr("torch.cuda.set_device", lambda _: None)
    environment.setattr("mcl.distributed.launch.meet", lambda _: (dist.HashStore(), 0, 2))
    environment.setattr(dist, "init_process_group", mock.Mock(side_effect=dist.DistBackendError(said + stack)))
    with pytest.raises(ConfigError, match=r"^NCCL cannot start on rank 0, GPU 1 .*Last error: No space in /dev/shm\)"):
        distributed.setup("cuda", 1)


def meet(port: int, sizes: list[str], devices: list[str], timeout: float, gpus: int) -> str:
    """What this rank is told when it joins a group of the given size on the given device; `gpus` are visible."""
    distributed.teardown()
    rank = int(os.environ["RANK"])
    os.environ |= {"WORLD_SIZE": sizes[rank], "LOCAL_WORLD_SIZE": sizes[rank], "MASTER_PORT": str(port)}
    start = time.monotonic()
    with mock.patch.object(distributed, "gpus", return_value=gpus), mock.patch.object(torch.cuda, "set_device"):
        try:
            distributed.setup(devices[rank], timeout)
        except ConfigError as error:
            assert time.monotonic() - start < timeout + 60
            return str(error)
        return str(distributed.world_size())


def test_processes_that_belong_together_meet() -> None:
    assert in_ranks(2, meet, free_port(), ["2", "2"], ["cpu", "cpu"], 60.0, 0) == ["2", "2"]


@pytest.mark.parametrize("sizes", [["3", "3"], ["2", "4"], ["4", "2"]])
def test_processes_that_do_not_are_refused(sizes: list[str]) -> None:
    """One process is missing, or was started as one of another number."""
    for said, size in zip(in_ranks(2, meet, free_port(), sizes, ["cpu", "cpu"], 3.0, 0), sizes, strict=True):
        assert said.startswith(f"MASTER_ADDR, MASTER_PORT, WORLD_SIZE: {size} processes did not meet at 127.0.0.1:")
        assert "start all of them, on the same kind of device" in said


def test_processes_must_see_their_gpus() -> None:
    _, second = in_ranks(2, meet, free_port(), ["2", "2"], ["cpu", "cuda"], 3.0, 1)
    assert second.startswith("trainer.device: process 1 of its machine sees 1 GPUs; start one process per GPU, and let")
    assert second.endswith("(under SLURM: no --gpus-per-task)")
