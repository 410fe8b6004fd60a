"""A long run of the loader: every image of every epoch is shown, and memory does not grow."""

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.dali_pipelines.loading import make_loader, make_source

IMAGES = 200_000
SIZE = 1003  # files: 15 steps of 64 per epoch, and 43 left over
BATCH = 64
BOUNDS = {"resident bytes": 50_000, "allocated bytes": 5_000, "Python objects": 5}
"""Growth per 1,000 images that counts as none. The allocator sometimes grows its heaps by a MiB or more, which changes
the slope of resident memory by up to 15,000 in either direction; memory in use within the heaps is more exact."""

Write = Callable[[Path, int], list[Path]]


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "rest", "top")
    ]


def memory() -> tuple[int, int, int]:
    """The values limited by BOUNDS, for this process."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    libc.malloc_trim(0)  # returns memory that the allocator keeps for later use
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return resident, info.uordblks + info.hblkhd, sys.getallocatedblocks()


def growth(kind: str, images: list[Path], root: Path) -> dict[str, float]:
    """Growth of the values limited by BOUNDS, per 1,000 images, in the second half of a run."""
    source = make_source(kind, root, [path.read_bytes() for path in images])
    per_epoch = SIZE // BATCH
    epochs = -(-IMAGES // (per_epoch * BATCH))
    samples = np.zeros((epochs, len(BOUNDS)))  # allocated in advance, so that measuring allocates nothing
    start = time.perf_counter()
    with make_loader(source, "fused", images=BATCH) as loader:
        for epoch in range(epochs):
            seen = np.zeros(SIZE, int)
            for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                query, key = next(loader)
                assert (query.step, query.epoch) == (step, epoch)
                assert key.index.equal(query.index)
                seen[query.index.numpy()] += 1
            assert seen.max() == 1
            assert seen.sum() == per_epoch * BATCH
            samples[epoch] = memory()
        assert loader.bad == {}
    seconds = time.perf_counter() - start
    second_half = samples[epochs // 2 :]
    thousands = np.arange(len(second_half)) * per_epoch * BATCH / 1000
    slopes = dict(zip(BOUNDS, np.polyfit(thousands, second_half, 1)[0].round().tolist(), strict=True))
    print(f"{kind}: {epochs * per_epoch * BATCH} images in {seconds:.0f} s; per 1,000 images: {slopes}", flush=True)
    return slopes


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["folders", "tfrecord"])
def test_200_000_images(tmp_path: Path, folder_of: Write, kind: str) -> None:
    """Images and canvases are small, so that memory is mostly that of pipelines. Runs in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        slopes = process.submit(growth, kind, folder_of(tmp_path / "images", SIZE), tmp_path / "root").result()
    assert not {name: slope for name, slope in slopes.items() if slope >= BOUNDS[name]}
