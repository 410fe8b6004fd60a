"""Processes that mcl starts itself, one per device."""

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
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mcl.config import ConfigError
from mcl.distributed import local
from mcl.records.metrics import read
from tests.conftest import ROOT
from tests.mcl.tiny import TINY


@pytest.mark.parametrize(
    ("wanted", "gpus", "numbers"),
    [
        ("auto", 8, [0, 1, 2, 3, 4, 5]),  # a batch of 24 cannot be divided by 7
        ("auto", 1, [0]),
        ("auto", 0, [0]),
        (3, 8, [0, 1, 2]),
        (2, 0, [0, 1]),
        ((5, 1), 8, [5, 1]),
    ],
)
def test_devices(wanted: Any, gpus: int, numbers: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    def fits(processes: int) -> bool:
        return processes in (1, 2, 3, 4, 6)

    with mock.patch.dict(os.environ):
        os.environ.pop("WORLD_SIZE", None)
        os.environ.pop("LOCAL_RANK", None)
        assert local.devices("trainer.devices", wanted, gpus, fits) == numbers
        idle = "2 of 8 GPUs stay idle: the batch can be divided among 6 at most\n"
        assert capsys.readouterr().out == (idle if (wanted, gpus) == ("auto", 8) else "")
        os.environ["WORLD_SIZE"] = "1"  # left over, or set by a scheduler to the number of machines
        assert local.devices("trainer.devices", wanted, gpus, fits) == numbers
        os.environ["LOCAL_RANK"] = "0"  # started by torchrun, which has priority
        assert local.devices("trainer.devices", wanted, gpus, fits) == [0]


@pytest.mark.parametrize(
    ("wanted", "gpus", "said"),
    [
        (9, 8, "9 processes need 9 GPUs; PyTorch sees 8"),
        ((0, 8), 8, "there is no GPU 8; PyTorch"),
        ((0, 1), 0, "a list"),
    ],
)
def test_devices_that_are_not_there(wanted: Any, gpus: int, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.devices: {said}"):
        local.devices("trainer.devices", wanted, gpus, lambda processes: True)


def test_gpus_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers refer to the devices in CUDA_VISIBLE_DEVICES; the environment is restored afterwards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with local._environment([2, 1], 3, 90.0):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6,GPU-5"
        assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before


def test_the_cause_is_reported_and_not_its_consequence() -> None:
    """Several processes fail within a second."""
    peer, cause = (ProcessFailure(local_rank=r, pid=r, exitcode=code, error_file="") for r, code in ((0, 3), (1, 2)))
    peer.message = {"message": "PeerError: another process ended"}
    cause.message = {"message": "SourceError: data.root: no images"}
    failed = local._first(ChildFailedError("mcl", {0: peer, 1: cause}))
    assert (str(failed), failed.exit_code) == ("data.root: no images", 2)

    killed = ProcessFailure(local_rank=1, pid=7, exitcode=-9, error_file="")
    failed = local._first(ChildFailedError("mcl", {0: peer, 1: killed}))
    assert (str(failed), failed.exit_code) == ("rank 1: Signal 9 (SIGKILL) received by PID 7", 137)


def _command(folder: Path, root: Path, *words: str) -> list[str]:
    preset = {**TINY, "output": str(folder), "data": {"threads": 1, "root": str(root)}}
    preset["trainer"] = {**TINY["trainer"], "global_batch": 16, "device": "cpu", "devices": 2, "log_every": 1}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(preset))
    return [sys.executable, "-m", "mcl", "pretrain", str(folder / "tiny.yaml"), *words]


def test_an_error_is_printed_once(tmp_path: Path) -> None:
    command = _command(tmp_path, tmp_path / "nothing")
    (temporary := tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "starting 2 processes, on the CPU; trainer.devices=1 starts one\n"
    ours = [line for line in done.stderr.splitlines() if not line.startswith("[rank")]  # without gloo's messages
    assert ours == [f"mcl pretrain: error: data.root: {tmp_path / 'nothing'} does not exist"]
    assert not (tmp_path / "tiny").exists()
    assert not list(temporary.iterdir())


@pytest.mark.soak
def test_ctrl_c_and_resume(few_photos: Path, tmp_path: Path) -> None:
    words = ("trainer.epochs=300", "trainer.checkpoint_epochs=1000")
    process = subprocess.Popen(
        _command(tmp_path, few_photos, *words),
        **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    while process.poll() is None and not read(metrics):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, output
    assert output.count("stopping: training ends after this step") == 1
    assert "Traceback" not in output
    stopped = int(re.findall(r"stopped by signal 2 at step (\d+)", output)[0])

    process = subprocess.Popen(
        _command(tmp_path, few_photos, *words),
        **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    while process.poll() is None and max(r["step"] for r in read(metrics)) <= stopped + 1:
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert f"resumed at step {stopped} of 600" in output
    assert process.returncode == 128 + signal.SIGTERM, output
