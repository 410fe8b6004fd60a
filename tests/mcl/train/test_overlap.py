"""Loading and computing overlap: steps take as long as the slower of the two, not as both together."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dali_pipelines.batch import MontageBatch
from dali_pipelines.source import Source, open_source
from mcl import config
from mcl.records.meters import Stopwatch
from mcl.records.metrics import Record, read
from mcl.records.timers import HostClock, Timer
from mcl.train import trainer
from tests.dali_pipelines.loading import make_loader
from tests.mcl.tiny import TINY

IMAGES = 4  # per step
STEPS = 6  # per window
WINDOWS = 5


class SlowDisk:
    """Reads one image at a time, however many threads call it, and takes a known time for each."""

    def __init__(self, read: Callable[[int], bytes], seconds: float) -> None:
        self._read, self._seconds = read, seconds
        self._turn = threading.Lock()

    def __call__(self, i: int) -> bytes:
        with self._turn:
            time.sleep(self._seconds)
        return self._read(i)


@pytest.fixture(scope="module")
def thumbnails(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs that are decoded in almost no time."""
    folder = tmp_path_factory.mktemp("thumbnails")
    for file in sorted((photos / "val").rglob("*.jpg"))[:16]:
        with Image.open(file) as photo:
            photo.convert("RGB").resize((64, 48)).save(folder / file.name)
    return folder


def slowed(folder: Path, seconds: float) -> Source:
    """A source with its images on a slow disk. Without paths, our threads read them, and not DALI's."""
    source = open_source(str(folder))
    return dataclasses.replace(source, paths=None, read=SlowDisk(source.read, seconds))


@pytest.mark.parametrize(("load", "step"), [(0.16, 0.1), (0.1, 0.16)], ids=["slow loader", "slow step"])
def test_loading_and_computing_overlap(load: float, step: float, thumbnails: Path) -> None:
    """Both only sleep. On a busy machine, one undisturbed window is enough."""
    slow = slowed(thumbnails, load / IMAGES)
    timer = Timer(HostClock())
    slower, both = max(load, step), load + step
    records: list[Record] = []

    def as_expected(record: Record) -> bool:
        seconds = IMAGES / record["images_per_s"]  # per step
        return (
            seconds < (slower + both) / 2
            and record["data_wait"] == pytest.approx(max(0.0, load - step) / slower, abs=0.2)
            and record["forward"] == pytest.approx(step / seconds, abs=0.05)
        )

    with make_loader(slow, "auto", images=IMAGES, threads=2, device="cpu") as loader:
        for _ in range(2):  # starts threads and allocates buffers
            next(loader)
        stopwatch = Stopwatch(WINDOWS * STEPS, timer)
        while not any(map(as_expected, records)):
            assert len(records) < WINDOWS, records
            for _ in range(STEPS):
                with stopwatch.waiting():
                    next(loader)
                with timer.phase("forward"):
                    time.sleep(step)
                stopwatch.lap(IMAGES)
            records.append(stopwatch.read())
    # A step prepared in advance, and one that was begun, must not make the loader look faster.
    seconds = sum(IMAGES * STEPS / record["images_per_s"] for record in records)
    assert seconds > (len(records) * STEPS - 2) * slower


@pytest.mark.usefixtures("thin_backbone")
def test_a_run_loads_while_it_computes(thumbnails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by its own records. Steps are real, and sleep in addition."""
    images, load, step = 8, 0.2, 0.1
    slow = slowed(thumbnails, load / images)
    monkeypatch.setattr(trainer, "open_images", lambda data: slow)
    words = [f"data.root={thumbnails}", f"output={tmp_path}", "trainer.epochs=12", "trainer.log_every=6"]
    run = trainer.Trainer(config.override(config.from_dict(TINY), [*words, f"trainer.global_batch={images}"]))
    compute = run.train_step

    def sleep_too(query: MontageBatch, key: MontageBatch) -> Any:
        time.sleep(step)
        return compute(query, key)

    run.train_step = sleep_too  # type: ignore[method-assign]
    run.fit()
    records = [record for record in read(tmp_path / "tiny" / "metrics.jsonl") if record["kind"] == "train"]
    assert len(records) == 4
    seconds = [images / record["images_per_s"] for record in records]  # per step, for each window
    # One undisturbed window is enough; the first includes work that is done once.
    assert min(seconds[1:]) < (load + load + step) / 2
    assert 0.05 < max(record["data_wait"] for record in records[1:]) < 0.7
    # Over the whole run, since a window may use batches prepared during a slower one. Some batches were ready before.
    assert 6 * sum(seconds) > (24 - 4) * load
