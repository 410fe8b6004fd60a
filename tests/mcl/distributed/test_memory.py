"""Data that the processes of a machine share is computed once and is in memory once."""

import os
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest import mock

import numpy as np
import pytest

from dali_pipelines.source import open_images
from mcl import distributed
from mcl.config import DataConfig
from tests.dali_pipelines import imagenet
from tests.mcl.ranks import in_ranks


def share(apart: bool) -> list[Any]:
    """How often this rank did the work, the result that it got, and its warnings; `apart`: rank 1 sees no other
    rank."""
    worked = []

    def work() -> Any:
        worked.append(1)
        columns = np.asfortranarray(np.arange(6).reshape(2, 3))
        return {"large": np.arange(100_000), "columns": columns, "none": np.zeros((0, 2)), "text": "é"}

    hidden = apart and distributed.rank() == 1
    with (
        mock.patch.object(os, "readlink", side_effect=FileNotFoundError) if hidden else nullcontext(),
        warnings.catch_warnings(record=True) as caught,
    ):
        value = distributed.once_per_machine(work)
    value["large"][0] = 5 + distributed.rank()
    distributed.barrier()
    seen = [value["large"].tolist()[:3], value["columns"].tolist(), value["none"].shape, value["text"]]
    return [len(worked), seen, [str(warning.message) for warning in caught]]


@pytest.mark.parametrize("apart", [False, True])
def test_one_process_works_and_all_share_the_result(apart: bool) -> None:
    """A process that writes to its result does not change that of others; without shared memory, each process does the
    work."""
    first, second = in_ranks(2, share, apart)
    for rank, (worked, seen, said) in enumerate((first, second)):
        assert seen == [[5 + rank, 1, 2], [[0, 1, 2], [3, 4, 5]], (0, 2), "é"]
        assert worked == (rank == 0 or apart)
        assert len(said) == (rank == 1 and apart)
    assert not apart or "rank 1 cannot read the memory of its machine's first process" in second[2][0]


def pss() -> float:
    """Memory of this process in MB; shared memory is divided by the number of processes that share it."""
    return int(Path("/proc/self/smaps_rollup").read_text().split("Pss:")[1].split()[0]) / 1e3


def open_many(root: str, index: str) -> list[float]:
    """Number of images, CPU seconds of this rank, its peak memory and the memory that it keeps, MB."""
    before, sampled, done = pss(), [0.0], Event()

    def watch() -> None:
        while not done.wait(0.2):
            sampled.append(pss())

    watching = Thread(target=watch)
    watching.start()
    start = time.process_time()
    source = distributed.once_per_machine(lambda: open_images(DataConfig(root=root, index=index)))
    source.fingerprint()
    seconds = time.process_time() - start
    distributed.barrier()
    done.set()
    watching.join()
    return [len(source), seconds, max(sampled) - before, pss() - before]


@pytest.mark.soak
def test_eight_processes_open_as_many_images_as_imagenet_has(tmp_path: Path) -> None:
    images = imagenet.make(tmp_path / "root", tmp_path / "index", 1281)
    ranks = in_ranks(8, open_many, str(tmp_path / "root"), str(tmp_path / "index"))
    seen, seconds, most, kept = zip(*ranks, strict=True)
    print(f"{sum(seconds):.1f} s of a core, at most {sum(most):.0f} MB, {sum(kept):.0f} MB afterwards")
    assert set(seen) == {images} == {1_281_000}
    assert sum(seconds) < 20
    assert sum(most) < 1500
    assert sum(kept) < 400
