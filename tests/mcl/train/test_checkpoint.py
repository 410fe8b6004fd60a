"""Checkpoint files: every changed bit is detected, a failed save keeps the previous file; and the thread that writes
them."""

import itertools
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mcl import config
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from mcl.train.saving import Saver


def state(step: int, size: int = 100) -> dict[str, Any]:
    """A state with all fields of a checkpoint."""
    resumed = {key: {} for key in ("optimizer", "scaler", "rng", "environment")} | {"files": "none", "config": {}}
    model = {"weight": torch.full((size,), float(step))}
    return {"step": step, "model": model, "loader": {"bad": {3: "broken"}}, **resumed}


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot exceed `size` bytes, as on a full disk or with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault("a bit of a checkpoint that flips, many positions")
def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In weights, metadata, the archive's directory and the checksum itself."""
    path = checkpoint.save(tmp_path, state(1), keep=1)
    content = path.read_bytes()
    positions = [*range(0, len(content) - 100, 11), *range(len(content) - 100, len(content))]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"step_00000001\.pt: .*use an earlier one of the same folder"):
            checkpoint.load(path)
    path.write_bytes(content)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["model"]["weight"], torch.ones(100))
    assert loaded.keys() == {"format", *state(1)}


@pytest.mark.fault("a checkpoint that was cut short, at many lengths")
def test_every_cut_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=1)
    content = path.read_bytes()
    for length in [*range(0, len(content), 29), len(content) - 73, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


@pytest.mark.fault("a damaged newest checkpoint")
def test_the_one_before_a_damaged_one_is_taken(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    newest = checkpoint.save(tmp_path, state(2), keep=2)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step_00000002\.pt: damaged: .*checksum.* trying the previous one"):
        latest = checkpoint.latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 1


def test_files_of_earlier_versions_have_no_checksum(tmp_path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, **state(4)}, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")["step"] == 4


@pytest.mark.fault("a disk that is full after {size} bytes of a save")
@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    with small_disk(size), pytest.raises(CheckpointError, match=r"step_00000002\.pt: cannot save .* unchanged. Free"):
        checkpoint.save(tmp_path, state(2, size=100_000), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "step_00000001.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1


@pytest.mark.fault("a folder of checkpoints that cannot be written")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    """There is a file where the folder should be, so that not even root can write there."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoints/step_00000001\.pt: cannot save .*permissions"):
        checkpoint.save(tmp_path / "checkpoints", state(1), keep=1)


@pytest.mark.fault("what a process left that was killed while it saved")
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000003.partial").write_bytes(b"half")
    (tmp_path / "last.pt.partial").symlink_to("step_00000003.pt")
    checkpoint.save(tmp_path, state(4), keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "step_00000004.pt"]


def test_a_save_takes_the_state_of_its_moment(tmp_path: Path) -> None:
    """Training continues while the file is written, which must not change the file."""
    saver, current = Saver(tmp_path, keep=3), state(5, size=1_000_000)
    saver.save(current)
    current["model"]["weight"].zero_()
    current["loader"]["bad"][4] = "broken, too"
    saver.wait()
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(loaded["model"]["weight"], torch.full((1_000_000,), 5.0))
    assert loaded["loader"]["bad"] == {3: "broken"}


def test_a_save_does_not_wait_for_the_disk_but_the_next_one_does(tmp_path: Path) -> None:
    slow, write = 0.2, checkpoint.write

    def slowly(*arguments: Any) -> None:
        time.sleep(slow)
        write(*arguments)

    saver = Saver(tmp_path, keep=3)
    with mock.patch.object(checkpoint, "write", slowly):
        moments = [time.perf_counter()]
        for step in (1, 2):
            saver.save(state(step))
            moments.append(time.perf_counter())
        saver.wait()
    first, second = (b - a for a, b in itertools.pairwise(moments))
    assert first < slow / 2
    assert second > slow / 2
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step_00000001.pt", "step_00000002.pt"]


def test_a_failed_save_is_reported_at_the_next_check(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=3)
    saver.check()
    with small_disk(1000):
        saver.save(state(1, size=100_000))
        saver.settle()
    with pytest.raises(CheckpointError, match="cannot save"):
        saver.check()
    saver.save(state(2))  # the earlier failure was reported, and the disk has space again
    saver.wait()
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize(
    "change",
    [
        *({"format": value} for value in (2, "1", None, torch.ones(2))),
        *({"config": value} for value in (None, "x", [], torch.ones(2))),
        *({"step": value} for value in (None, 0.5, "3", torch.ones(2))),
        *({"model": value} for value in (None, {}, [torch.ones(2)], {"weight": 3.0}, {3: torch.ones(2)})),
        {"model": {"weight": torch.ones(2).to_sparse()}},
        {"model": {"weight": torch.ones(2, device="meta")}},
    ],
)
def test_other_contents_are_no_checkpoint(tmp_path: Path, change: dict[str, Any]) -> None:
    torch.save({"format": checkpoint.FORMAT, **state(1), **change}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt: not a checkpoint of mcl"):
        checkpoint.load(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["optimizer", "scaler", "loader", "files", "rng", "environment"])
def test_weights_alone_are_not_resumed(tmp_path: Path, key: str) -> None:
    """As written by mcl import-openselfsup."""
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": checkpoint.FORMAT, **{k: v for k, v in state(1).items() if k != key}}, path)
    assert checkpoint.load(path)["step"] == 1
    with (
        pytest.warns(UserWarning, match=r"step_00000001\.pt: contains weights only; start a new run with model\.init"),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints can be read"),
    ):
        checkpoint.latest(tmp_path)


def test_a_model_takes_no_memory_before_its_weights_are_known_to_fit(tmp_path: Path) -> None:
    """A small file claims more numbers than fit into memory."""
    cfg = config.from_dict({"model": {"backbone": "resnet18", "width": 2**16, "hidden": 2**20}})
    torch.save({"format": checkpoint.FORMAT, **state(1), "config": config.to_dict(cfg)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="weights of another model"):
        checkpoint.load_model(tmp_path / "x.pt")
