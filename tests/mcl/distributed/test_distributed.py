"""Training, sources and teardown in two processes over gloo."""

import faulthandler
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from dali_pipelines.loader import BadDataError
from dali_pipelines.plan import order
from dali_pipelines.source import headers, open_images
from dali_pipelines.source.files import Local
from mcl import config, distributed
from mcl.config import DataConfig
from mcl.distributed import hang
from mcl.records.metrics import read
from mcl.train import checkpoint
from mcl.train.trainer import Trainer
from tests.conftest import ROOT, ThinBackbone
from tests.mcl.ranks import free_port, in_ranks
from tests.mcl.tiny import TINY


def open_once(root: str, index: str) -> list[Any]:
    """Number and names of the images that a rank sees, and how many folders, files and headers it has read."""
    calls: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> Any:
        method = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return method(*arguments)

        return mock.patch.object(owner, name, call)

    with counted(Local, "entries"), counted(Local, "stamp"), counted(headers.Image, "open"):
        source = distributed.once_per_machine(lambda: open_images(DataConfig(root=root, index=index)))
    images = [len(source), source.fingerprint(), source.read(len(source) - 1)[:200]]
    return [images, calls["entries"] > 0, calls["stamp"], calls["open"]]


def train_all(preset: dict[str, Any], runs: list[list[str]]) -> list[Any]:
    """Bad files known at the start and at the end of each run, and the error that ends the run."""
    said = []
    with (
        mock.patch("mcl.models.encoder.Backbone", ThinBackbone),
        mock.patch.object(distributed, "setup"),  # must run only once
    ):
        for words in runs:
            trainer = Trainer(config.override(config.from_dict(preset), words))
            known, error = sorted(trainer.loader.bad), ""
            try:
                trainer.fit()
            except BadDataError as raised:
                error = str(raised)
            said.append([known, sorted(trainer.loader.bad), error])
    return said


@pytest.mark.parametrize("folder", ["index", "file/index"])
def test_one_process_of_a_machine_lists_checks_and_reads(photos: Path, tmp_path: Path, folder: str) -> None:
    """The others get its result, even if no index can be written."""
    (tmp_path / "file").touch()
    first, second = in_ranks(2, open_once, str(photos / "val"), str(tmp_path / folder))
    assert first[0] == second[0]
    assert (first[0][0], first[1:], second[1:]) == (66, [True, 66, 66], [False, 0, 0])


def test_a_broken_file_that_one_rank_finds_is_known_to_all(photos: Path, tmp_path: Path) -> None:
    """The file is in the checkpoint of rank 0, is listed once, and counts towards the limit of every rank."""
    size, per_rank = 32, 8
    shown_by = [np.empty(size, int) for _ in range(2)]  # [epoch][image]: the rank that showed it
    for epoch, ranks in enumerate(shown_by):
        ranks[order(0, epoch, size)] = np.arange(size) // per_rank % 2
    only_second = int(np.flatnonzero((shown_by[0] == 1) & (shown_by[1] == 1))[0])
    only_first = int(np.flatnonzero((shown_by[0] == 0) & (shown_by[1] == 0))[0])
    both = int(np.flatnonzero((shown_by[0] == 1) & (shown_by[1] == 0))[0])

    def break_(name: str, *broken: int) -> str:
        (tmp_path / name).mkdir()
        for i, photo in enumerate(sorted((photos / "val").rglob("*.jpg"))[:size]):
            content = photo.read_bytes()
            (tmp_path / name / f"{i:03}.jpg").write_bytes(content[: len(content) // 2] if i in broken else content)
        return f"data.root={tmp_path / name}"

    preset = TINY | {
        "montage": {"cells": 1, "images_per_canvas": [1, 2, 2, 2]},  # all levels, so that every map has a gradient
        "model": TINY["model"] | {"loss_weights": [0.25] * 4},
        "trainer": TINY["trainer"] | {"global_batch": 2 * per_rank, "checkpoint_epochs": 2},
    }
    words = [f"output={tmp_path}", f"data.index={tmp_path / 'index'}"]
    tolerant = [*words, break_("a", only_second, both), "data.max_bad_fraction=0.1"]
    strict = [*words, break_("b", only_second, only_first), "data.max_bad_fraction=0.05", "name=strict"]
    first, second = in_ranks(2, train_all, preset, [tolerant, tolerant, strict])

    found = sorted([only_second, both])
    assert first[:2] == second[:2] == [[[], found, ""], [found, found, ""]]
    folder = tmp_path / "tiny"
    assert sorted(checkpoint.load(folder / "checkpoints" / "last.pt")["loader"]["bad"]) == found
    listed = [json.loads(line) for line in (folder / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(record["index"] for record in listed) == found

    for known, _, error in (first[2], second[2]):
        assert known == []
        assert error.startswith(f"2 of the 32 images in {tmp_path / 'b'} cannot be used (data.max_bad_fraction=0.05)")


@pytest.mark.soak
def test_two_processes_train_and_resume(photos: Path, tmp_path: Path) -> None:
    """Targets are those of both processes' images: the loss starts near that of a uniform guess among all 16."""
    preset = tmp_path / "tiny.yaml"
    trainer = TINY["trainer"] | {"global_batch": 16, "epochs": 1, "log_every": 1}
    preset.write_text(yaml.safe_dump(TINY | {"trainer": trainer, "evaluation": {"at_end": ["knn"]}}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += ["-m", "mcl", "pretrain", str(preset), f"data.root={photos / 'val'}", f"output={tmp_path}"]
    for _ in range(2):  # the second time, the run is already finished
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    train = [r for r in read(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4]
    uniform = math.log(16)
    assert all(value == pytest.approx(uniform, rel=0.2) for value in train[0]["loss_level"])
    assert checkpoint.load(folder / "checkpoints" / "last.pt")["environment"]["world_size"] == 2
    assert (folder / "report.html").exists()


class OursError(RuntimeError):
    """Its message may contain a path with any words."""


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"), distributed.PeerError),
        (RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 3000 ms"), distributed.PeerError),
        (dist.DistBackendError("NCCL error"), distributed.PeerError),
        (OursError("/data/gloo/run/last.pt: cannot save"), OursError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_errors_of_collectives_name_the_peers(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(Exception) as caught, distributed.naming_peers():  # noqa: PT011
        raise error
    faulthandler.cancel_dump_traceback_later()
    assert type(caught.value) is raised


def leave_and_go_on() -> bool:
    hang.end_after(0.5)
    distributed.teardown()
    time.sleep(1)
    return True


def test_work_after_the_group_has_no_deadline() -> None:
    """Evaluations of a finished run, for instance, may take any time."""
    assert in_ranks(2, leave_and_go_on) == [True, True]
