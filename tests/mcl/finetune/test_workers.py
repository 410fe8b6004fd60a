"""Loading processes with too little memory, without progress, or without parent."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mcl.config import ConfigError
from mcl.finetune import settings, workers
from tests.conftest import ROOT
from tests.mcl.distributed.test_faults import children
from tests.mcl.finetune.conftest import CONFIGS, MINI
from tests.mcl.finetune.test_run import losses, words


def small(monkeypatch: pytest.MonkeyPatch, megabytes: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=megabytes * 2**20))


def test_shared_memory_of_the_papers_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 1333 x 800: 4 processes with 2 batches of 2, twice, and 2 processes with 2 batches of 1 for
    evaluation."""
    config = settings.load(CONFIGS / "mask_rcnn_r50_fpn_1x.py", ["global_batch=2"])
    needed = 3 * 1333 * 800 * (2 * 4 * 2 * 2 + 2 * 2) / 2**20
    small(monkeypatch, needed + 0.1)
    workers.check_shared_memory(config)
    small(monkeypatch, 64)  # the size in Docker
    with pytest.raises(
        ConfigError, match=r"put up to 110 MB into /dev/shm, which has 64 MB free; .*--shm-size.*workers=0"
    ):
        workers.check_shared_memory(config)
    pipeline = settings.innermost(config.train_dataloader).pipeline
    pipeline[2] = {"type": "RandomResize", "scale": [(1333, 640), (1333, 800)]}
    with pytest.raises(ConfigError, match=r"put up to 110 MB"):
        workers.check_shared_memory(config)
    config.train_dataloader.num_workers = config.val_dataloader.num_workers = 0
    workers.check_shared_memory(config)


def in_small_memory(arguments: Sequence[str]) -> list[str]:
    """Runs the command with a /dev/shm of 1 MB, in its own namespaces."""
    mount = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *arguments]


def test_small_shared_memory(folder: Path, tmp_path: Path) -> None:
    if subprocess.run(in_small_memory(["true"]), capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    more = [
        "train_dataloader.num_workers=2",
        "global_batch=8",
        "train_dataloader.dataset.dataset.pipeline.2.scales=[[320,144]]",
    ]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mcl",
        "finetune",
        str(MINI),
        *words(folder, tmp_path, "run", *more),
    ]
    done = subprocess.run(in_small_memory(command), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.search(r"into /dev/shm, which has 1 MB free; .*--shm-size.*workers=0", done.stderr.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def started(folder: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    """A run with a loading process, after its first steps."""
    arguments = words(folder, output, "run", "train_dataloader.num_workers=1", "train_cfg.max_iters=1000", *more)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "mcl", "finetune", str(MINI), *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not losses(output / "run"):
        assert process.poll() is None, "it ended before its first step"
        time.sleep(0.05)
    return process


def hang(folder: Path) -> None:
    """Makes all reading of images block forever, as with a disk that does not respond."""
    for path in (folder / "train").iterdir():
        path.unlink()
        os.mkfifo(path)


def gone(processes: Sequence[int]) -> bool:
    """Whether the processes end within seconds."""
    end = time.monotonic() + 5
    while time.monotonic() < end and any(Path(f"/proc/{process}").exists() for process in processes):
        time.sleep(0.05)
    return not any(Path(f"/proc/{process}").exists() for process in processes)


def test_processes_of_others_outlive_a_failing_loader() -> None:
    """The caller of :func:`mcl.finetune.finetune` may have other child processes."""
    other, own = (multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)) for _ in range(2))

    def load() -> None:
        with workers.reporting_loader_errors(5):
            own.start()
            raise RuntimeError("DataLoader timed out after 5 seconds")

    other.start()
    try:
        with pytest.raises(workers.LoaderError, match="no batch came"):
            load()
        own.join(5)
        assert own.exitcode == -signal.SIGKILL
        assert other.is_alive()
    finally:
        other.kill()


@pytest.mark.soak
def test_no_progress_ends_the_run(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "coco")
    process = started(copy, tmp_path, "timeout=5")
    try:
        loading = children(process.pid)
        hang(copy)
        _, err = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode == 3
    assert re.search(
        r"^mcl finetune: error: no batch came .* for 5 s \(timeout\): .*--shm-size.*workers=0.* continues the run$",
        err.splitlines()[-1],
    )
    assert gone(loading)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_a_run_that_waits_for_its_loader(number: int, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "coco")
    process = started(copy, tmp_path)
    try:
        loading = children(process.pid)
        hang(copy)
        time.sleep(2)
        process.send_signal(number)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(number)
        process.wait(10)
    finally:
        process.kill()
    assert gone(loading)


@pytest.mark.soak
def test_loading_processes_do_not_survive_their_parent(folder: Path, tmp_path: Path) -> None:
    """Even loading processes that hang end with their parent."""
    copy = shutil.copytree(folder, tmp_path / "coco")
    process = started(copy, tmp_path)
    loading = children(process.pid)
    hang(copy)
    time.sleep(1)
    process.kill()
    assert loading
    assert gone(loading)
