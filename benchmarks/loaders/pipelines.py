"""Contenders that run DALI in this process: decoding alone, and mcl's loader.

A DALI pipeline always works some batches ahead, so it is built anew for every turn and gone after it. The batches that
fill its queue are not counted: as many are then in the making when the clock starts as when it stops.
"""

import gc
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Literal

import numpy as np

from benchmarks.loaders import Job, Loader, Missing, Turn
from dali_pipelines.loader import MontageLoader
from mcl.config import ConfigError, DataConfig

AHEAD = DataConfig().prefetch


class Decode(Loader):
    """The ceiling: DALI reads and decodes the files on the CPU, and nothing else."""

    def __init__(self, job: Job, threads: int) -> None:
        if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
            raise Missing("NVIDIA DALI is not installed; pip install nvidia-dali-cuda130")
        self._job, self._threads = job, threads
        self._steps = itertools.count()

    def turn(self, batches: int) -> Turn:
        from nvidia.dali import Pipeline, fn, types

        images = self._job.plan.images
        pipeline = Pipeline(images, self._threads, None, prefetch_queue_depth=AHEAD, exec_dynamic=True)
        with pipeline:
            content = fn.io.file.read(fn.external_source(source=self._paths, batch=True))
            pipeline.set_outputs(fn.decoders.image(content, output_type=types.RGB, adjust_orientation=False))
        pipeline.build()
        turn = _timed(pipeline.run, batches, images)
        del pipeline
        gc.collect()  # what Python keeps in a circle would go on decoding
        return turn

    def _paths(self) -> list[np.ndarray]:
        batch = self._job.batch(next(self._steps))
        return [np.frombuffer(self._job.paths[i].encode(), np.uint8) for i in batch]


class Montages(Loader):
    """mcl: two views of four levels, tiled into canvases and normalised."""

    def __init__(self, job: Job, threads: int, engine: Literal["fused", "stock"]) -> None:
        data = DataConfig(engine=engine, device="cpu")
        try:
            self._loader = MontageLoader(job.source, job.plan, data, threads=threads)
        except ConfigError as error:
            raise Missing(str(error)) from error

    def turn(self, batches: int) -> Turn:
        with self._loader as loader:
            turn = _timed(lambda: next(loader), batches, loader.plan.images)
        gc.collect()
        return turn


def _timed(take: Callable[[], object], batches: int, images: int) -> Turn:
    for _ in range(AHEAD):
        take()
    start, core_start = time.perf_counter(), time.process_time()
    for _ in range(batches):
        take()
    return Turn(batches * images, time.perf_counter() - start, time.process_time() - core_start)
