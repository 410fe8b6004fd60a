"""Processes that are killed, stopped, hang or lose their images: all processes end, and the same command continues.

Two ranks over gloo, forked from a server that has imported what they need, run ``mcl pretrain`` on photographs.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from mcl import cli, config
from mcl.distributed import hang
from mcl.objectives import MCL
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import ROOT, ThinBackbone
from tests.mcl.ranks import free_port
from tests.mcl.tiny import TINY, equal

Record = Callable[[str, object], None]
"""Adds a name and a value to the report of a test; tests/conftest.py prints them in a table."""

RANKS = 2
STEPS_PER_EPOCH = 4
TRIALS = 30
ENDED = "another process ended or hangs, so a collective of rank"
PATIENCE = 240  # seconds, enough for a busy machine
PRESET: dict[str, Any] = TINY | {
    "data": {"threads": 1},
    "montage": {"cells": 1, "images_per_canvas": [1, 2, 2, 2]},  # all levels, so that every map has a gradient
    "model": TINY["model"] | {"loss_weights": [0.25] * 4},
    "trainer": TINY["trainer"]
    | {
        "global_batch": 8,
        "epochs": 3,
        "checkpoint_epochs": 0.5,
        "log_every": 1,
        "threads": 1,
        "timeout": 60,
        "keep": 3,
    },
}


@pytest.fixture(scope="module")
def images(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 photographs."""
    root = tmp_path_factory.mktemp("photos")
    for file in sorted((photos / "val").rglob("*.jpg"))[: 8 * STEPS_PER_EPOCH]:
        (root / file.name).symlink_to(file)
    return root


@pytest.fixture(scope="module")
def preset(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "faults.yaml"
    path.write_text(yaml.safe_dump(PRESET | {"data": {"threads": 1, "root": str(images)}}))
    return path


def rank_main(rank: int, port: int, words: list[str], plant: Callable[[int], Any] | None) -> None:
    """The work of one process; `plant` prepares a fault in it."""
    os.environ |= {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    with mock.patch("mcl.models.encoder.Backbone", ThinBackbone):
        if plant is not None:
            plant(rank)
        cli.main(["pretrain", *words])


class Run:
    """Both processes of a run, which are ended with the context."""

    def __init__(
        self, preset: Path, output: Path, *words: str, plant: Callable[[int], Any] | None = None, of_second: str = ""
    ) -> None:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(
            ["mcl.commands", "dali_pipelines.pipelines", "tests.mcl.distributed.test_faults"]
        )
        port = free_port()
        arguments = [str(preset), f"output={output}", *words]
        self.folder = output / "tiny"
        self.ranks: list[BaseProcess] = [
            processes.Process(
                target=rank_main, args=(r, port, [*arguments, of_second] if r and of_second else arguments, plant)
            )
            for r in range(RANKS)
        ]

    def __enter__(self) -> "Run":
        for process in self.ranks:
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def reach(self, step: int) -> None:
        """Waits until the run has logged a step."""
        end = time.monotonic() + PATIENCE
        while self.step() < step:
            assert all(p.is_alive() for p in self.ranks), f"over before step {step}"
            assert time.monotonic() < end, f"step {step} never came"
            time.sleep(0.005)

    def step(self) -> int:
        records = read(self.folder / "metrics.jsonl")
        return int(records[-1]["step"]) if records else 0

    def saved(self) -> int:
        latest = checkpoint.latest(self.folder / "checkpoints")
        return latest["step"] if latest else 0

    def ends(self) -> list[int | None]:
        """Returns the exit codes of both processes."""
        for process in self.ranks:
            process.join(PATIENCE)
        return [process.exitcode for process in self.ranks]

    def log(self) -> str:
        return (self.folder / "train.log").read_text()


@pytest.fixture(scope="module")
def undisturbed(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The final state of a run without faults."""
    with Run(preset, tmp_path_factory.mktemp("undisturbed")) as run:
        assert run.ends() == [0, 0]
    return checkpoint.load(run.folder / "checkpoints" / "last.pt")


def check_same_end(folder: Path, undisturbed: dict[str, Any]) -> None:
    ours = checkpoint.load(folder / "checkpoints" / "last.pt")
    assert all(equal(ours[key], undisturbed[key]) for key in ("step", "model", "optimizer", "loader", "rng"))


def kill(run: Run, victims: Sequence[int]) -> None:
    for victim in victims:
        os.kill(run.ranks[victim].pid or 0, signal.SIGKILL)


@pytest.mark.fault("SIGKILL of one rank, then of all")
def test_killed_one_then_all_and_resumed(preset: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The survivor ends, too; the final weights are those of an undisturbed run."""
    with Run(preset, tmp_path) as run:
        run.reach(3)
        kill(run, [1])
        assert run.ends() == [3, -signal.SIGKILL]
    assert f"PeerError: {ENDED}" in run.log()
    assert checkpoint.steps(run.folder / "checkpoints")
    with Run(preset, tmp_path) as run:
        run.reach(7)
        kill(run, [0, 1])
        assert run.ends() == [-signal.SIGKILL] * RANKS
    with Run(preset, tmp_path) as run:
        assert run.ends() == [0, 0]
    check_same_end(run.folder, undisturbed)


EVALUATED = ["evaluation.every=1", "evaluation.gallery=8", "evaluation.galleries=4"]


def die_in_an_evaluation(rank: int) -> None:
    """Kills rank 1 in the evaluation after the first epoch."""
    matches, count = MCL.matches, itertools.count()

    def die(*arguments: Any) -> Any:
        # After 16 montages for statistics (two networks, eight each) and some galleries.
        if rank == 1 and next(count) == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        return matches(*arguments)

    MCL.matches = die  # type: ignore[method-assign]


@pytest.mark.fault("SIGKILL of one rank in an evaluation")
@pytest.mark.soak
def test_killed_in_an_evaluation_and_resumed(preset: Path, tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    """The evaluation is repeated, and the weights are those of a run without evaluations."""
    with Run(preset, tmp_path, *EVALUATED, plant=die_in_an_evaluation) as run:
        assert run.ends() == [3, -signal.SIGKILL]
    assert run.saved() == STEPS_PER_EPOCH
    assert {record["step"] for record in read(run.folder / "evaluations.jsonl")} == {0}
    with Run(preset, tmp_path, *EVALUATED) as run:
        assert run.ends() == [0, 0]
    check_same_end(run.folder, undisturbed)
    found = [record["step"] for record in read(run.folder / "evaluations.jsonl")]
    assert found == [0, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH, 3 * STEPS_PER_EPOCH]


@pytest.mark.fault("SIGTERM to rank {victim}, twice")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_sigterm_to_one_stops_all_with_a_checkpoint(
    preset: Path, tmp_path: Path, undisturbed: dict[str, Any], victim: int
) -> None:
    """At the same step, and soon, although checkpoints are rare; a second SIGTERM does not interrupt the save."""
    with Run(preset, tmp_path, "trainer.checkpoint_epochs=99") as run:
        run.reach(4)
        for _ in range(2):
            os.kill(run.ranks[victim].pid or 0, signal.SIGTERM)
        assert run.ends() == [128 + signal.SIGTERM] * RANKS
    saved = checkpoint.load(run.folder / "checkpoints" / "last.pt")["step"]
    assert 4 <= saved < undisturbed["step"]
    assert f"stopped by signal 15 at step {saved}" in run.log()
    with Run(preset, tmp_path) as run:
        assert run.ends() == [0, 0]
    check_same_end(run.folder, undisturbed)


def fill_memory_in_third_step(rank: int) -> None:
    """Raises an out-of-memory error in rank 1, which is recorded as under torchrun."""
    step = Trainer.train_step

    def fail(trainer: Trainer, *views: Any) -> Any:
        if rank == 1 and trainer.step == 2:
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(trainer.folder / "error.json")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(trainer, *views)

    Trainer.train_step = fail  # type: ignore[method-assign]


@pytest.mark.fault("a rank out of memory")
def test_out_of_memory_on_one_rank(preset: Path, tmp_path: Path) -> None:
    """The launcher gets the line with the remedy, and the log has the traceback."""
    with Run(preset, tmp_path, plant=fill_memory_in_third_step) as run:
        assert run.ends() == [3, 2]
    said = json.loads((run.folder / "error.json").read_text())["message"]["message"]
    assert said.startswith(
        "OutOfMemoryError: not enough memory: a step of 4 images did not fit into the memory of rank 1"
    )
    assert "; set trainer.recompute=true (" in said
    assert "Tried to allocate 2.00 GiB" in run.log()


def hang_in_fifth_step(rank: int) -> None:
    """Makes rank 1 sleep instead of loading."""
    from dali_pipelines.loader import MontageLoader

    load = MontageLoader.__next__

    def fall_asleep(loader: MontageLoader) -> Any:
        if rank == 1 and loader.position == 4:
            time.sleep(1000)
        return load(loader)

    MontageLoader.__next__ = fall_asleep  # type: ignore[method-assign]
    hang.GRACE = 3.0


@pytest.mark.fault("a rank that hangs in its loader")
def test_a_hung_rank_leaves_its_stack(preset: Path, tmp_path: Path) -> None:
    """The other rank ends by the timeout of its collective; the stacks of both are in files."""
    with Run(preset, tmp_path, "trainer.timeout=5", plant=hang_in_fifth_step) as run:
        assert run.ends() == [3, 1]
    assert f"PeerError: {ENDED}" in run.log()
    assert "in train_step" in run.log()
    assert [path.name for path in (run.folder / "hangs").iterdir()] == ["rank_1.txt"]
    said = (run.folder / "hangs" / "rank_1.txt").read_text()
    assert said.startswith("Timeout (0:00:08)!")
    assert "in fall_asleep" in said


@pytest.mark.fault("SIGSTOP of rank {victim}")
@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
def test_nobody_waits_for_a_stopped_rank(preset: Path, tmp_path: Path, victim: int) -> None:
    with Run(preset, tmp_path, "trainer.timeout=5") as run:
        run.reach(3)
        os.kill(run.ranks[victim].pid or 0, signal.SIGSTOP)
        other = run.ranks[1 - victim]
        other.join(PATIENCE)
        assert other.exitcode == 3
    assert f"PeerError: {ENDED}" in run.log()


def test_what_ends_one_rank_as_training_begins_ends_the_others(preset: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "tensorboard").touch()  # blocks the folder that rank 0 creates first
    with Run(preset, tmp_path, "log.tensorboard=true", "trainer.timeout=5") as run:
        assert run.ends() == [2, 3]
    assert "the run ends: ConfigError" in run.log()


def hang_while_saving(rank: int) -> None:
    """The disk does not respond to the first save."""
    from mcl.train import saving

    def write(*_: Any) -> None:
        time.sleep(1000)

    if rank == 0:
        checkpoint.write = write
        saving._PATIENCE = 2.0


@pytest.mark.soak
@pytest.mark.fault("a disk that hangs in a save of rank 0, then SIGKILL of rank 1")
def test_a_save_that_hangs_does_not_block_the_exit(preset: Path, tmp_path: Path) -> None:
    with Run(preset, tmp_path, plant=hang_while_saving) as run:
        run.reach(3)
        kill(run, [1])
        assert run.ends() == [3, -signal.SIGKILL]


@pytest.mark.fault("a rank whose images vanish")
def test_a_rank_whose_images_vanish_says_so(preset: Path, images: Path, tmp_path: Path) -> None:
    """The rank ends with its own error, which ends the other rank."""
    copy = tmp_path / "copy"
    shutil.copytree(images, copy, symlinks=True)
    words = ["trainer.timeout=5", "trainer.epochs=1000", "trainer.checkpoint_epochs=1000"]
    with Run(preset, tmp_path, *words, of_second=f"data.root={copy}") as run:
        run.reach(2)
        shutil.rmtree(copy)
        assert run.ends() == [3, 2]
    assert "rank 1: the run ends: BadDataError" in run.log()
    assert "Traceback" in run.log()


def fill_the_disk(rank: int) -> None:
    """From the fifth step on, no file of rank 0 can exceed 64 KiB, as on a full disk."""
    from dali_pipelines.loader import MontageLoader

    load = MontageLoader.__next__

    def fill(loader: MontageLoader) -> Any:
        if rank == 0 and loader.position == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        return load(loader)

    MontageLoader.__next__ = fill  # type: ignore[method-assign]


@pytest.mark.soak
@pytest.mark.fault("a disk that is full at a save of rank 0, then has room again")
def test_a_full_disk_ends_all_with_the_checkpoint_before(
    preset: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with Run(preset, tmp_path, plant=fill_the_disk) as run:
        assert run.ends() == [2, 3]
    said = re.search(r"CheckpointError: .*step_0000000([46])\.pt: cannot save .*File too large", run.log())
    assert said  # the save of step 4 may not be finished when the disk fills
    assert run.saved() == int(said[1]) - 2
    with Run(preset, tmp_path) as run:
        assert run.ends() == [0, 0]
    check_same_end(run.folder, undisturbed)


# ---------------------------------------------------------------------------------------------------- long ones


@pytest.mark.fault("SIGKILL of one rank or both at random moments, then the same command again")
@pytest.mark.soak
def test_thirty_random_kills(
    preset: Path, tmp_path: Path, undisturbed: dict[str, Any], record_property: Record
) -> None:
    """Kills one rank or both at random moments: no step before the last checkpoint is lost, and the final weights are
    the same."""
    chance = random.Random(0)
    interval = STEPS_PER_EPOCH // 2
    for trial in range(TRIALS):
        victims = chance.choice([[0], [1], [0, 1]])
        with Run(preset, tmp_path / str(trial)) as run:
            run.reach(chance.randint(3, undisturbed["step"] - 4))
            time.sleep(chance.random() * 0.05)
            kill(run, victims)
            expected = [-signal.SIGKILL if rank in victims else 3 for rank in range(RANKS)]
            assert run.ends() == expected
        reached, saved = run.step(), run.saved()
        # The save under way may be lost, but not the one before.
        assert saved >= reached // interval * interval - interval
        with Run(preset, tmp_path / str(trial)) as run:
            assert run.ends() == [0] * RANKS
        assert f"resumed at step {saved} of" in run.log()
        check_same_end(run.folder, undisturbed)
    record_property("survived", f"{TRIALS} of {TRIALS}")


@pytest.mark.fault("SIGKILL of one rank under torchrun --nnodes={machines} --max-restarts=4")
@pytest.mark.soak
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_restarts_all_from_the_last_checkpoint(
    preset: Path, tmp_path: Path, machines: int, record_property: Record
) -> None:
    """One rank is killed three times, and the run that torchrun started ends as if nothing had happened.

    Each torchrun counts only the failures of its own processes.
    """

    def torchrun(name: str) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}", "--max-restarts=4"]
        command += [f"--nproc_per_node={RANKS // machines}", "--rdzv_backend=c10d", f"--rdzv_id={name}"]
        command += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "-m", "mcl", "pretrain", str(preset)]
        return [subprocess.Popen([*command, f"output={tmp_path}", f"name={name}"], cwd=ROOT) for _ in range(machines)]

    assert [agent.wait(300) for agent in torchrun("undisturbed")] == [0] * machines
    agents = torchrun("tiny")
    log = tmp_path / "tiny" / "metrics.jsonl"
    try:
        for goal in (3, 6, 9):
            end = time.monotonic() + PATIENCE
            while not (records := read(log)) or records[-1]["step"] < goal:
                assert time.monotonic() < end
                time.sleep(0.01)
            os.kill(max(children(agents[-1].pid)), signal.SIGKILL)
            time.sleep(1)
        assert [agent.wait(300) for agent in agents] == [0] * machines
    finally:
        for agent in agents:
            agent.kill()
    said = (tmp_path / "tiny" / "train.log").read_text()
    assert said.count("resumed at step") == 3
    check_same_end(tmp_path / "tiny", checkpoint.load(tmp_path / "undisturbed" / "checkpoints" / "last.pt"))
    record_property("survived", "3 of 3")


def children(parent: int) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and int((process / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(process.name))
    return found


@pytest.mark.fault("saving the demo every epoch: largest share of the time for which training stands still")
@pytest.mark.soak
def test_saving_takes_less_than_a_fiftieth_of_the_time_between_saves(tmp_path: Path, record_property: Record) -> None:
    """For the demo's network, saved five times as often as in the demo."""
    words = [f"output={tmp_path}", "trainer.epochs=4", "trainer.checkpoint_epochs=1", "trainer.log_every=7"]
    Trainer(config.load(ROOT / "mcl" / "presets" / "mcl_r18_fpn_demo.yaml", words)).fit()
    records = read(tmp_path / "demo" / "metrics.jsonl")
    shares = [record["saving"] for record in records[1:]]  # each has the save after the previous record
    assert len(shares) == 3
    assert all(0 < share < 0.02 for share in shares)
    record_property("survived", f"{max(shares):.2%}")
