"""Contenders of :mod:`benchmarks.loader`: DALI in this process, others in worker processes of PyTorch's DataLoader.

All contenders load the images of the steps of the same plan, one step per batch. They are idle between turns:

* A DALI pipeline always prepares some batches in advance, so it is built for every turn and deleted after it. The
  batches that fill its queue are not counted, so that the same number of batches is in preparation when the clock
  starts and when it stops.
* The workers of a DataLoader wait between turns. A turn is one epoch, so that nothing is loaded before its clock starts
  or after it stops. The number of batches is a multiple of the number of workers, so that no worker waits for others.
  Views are neither normalised nor tiled, which is left to the device. Batches are passed in shared memory: 0.6 GB for
  128 images as float32, up to two batches per worker.
"""

import functools
import gc
import importlib.util
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torchvision.transforms
import torchvision.transforms.v2
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image

from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import VIEWS, Plan, blur_window
from dali_pipelines.source import Source
from mcl.config import ConfigError, DataConfig

AHEAD = DataConfig().prefetch

Read = Callable[[str], Any]
Transform = Callable[[Any], Any]


class Missing(ValueError):
    """A contender is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Job:
    """The images to load, and the plan of their augmentation."""

    source: Source
    paths: tuple[str, ...]  # files of the images that the plan shows
    plan: Plan

    def batch(self, step: int) -> list[int]:
        """The images of a step, in which those known to be broken are replaced."""
        return [int(i) for i in self.plan.samples(step, self.source.bad)]


@dataclass(frozen=True)
class Turn:
    """Measurement of some batches."""

    images: int
    seconds: float
    core_seconds: float  # CPU time of this process with all its threads, without other processes


Take = Callable[[int], Turn]
"""Loads a number of batches, which must be a multiple of the number of threads."""


def _timed(load: Callable[[], object], times: int, images: int) -> Turn:
    """Times `times` calls, which load `images` images in all."""
    start, core_start = time.perf_counter(), time.process_time()
    for _ in range(times):
        load()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Turn(images, time.perf_counter() - start, time.process_time() - core_start)


def cores(threads: int) -> list[int]:
    """The first cores that this process may use, as many as threads.

    Raises:
        ConfigError: the process may use fewer cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 0 < threads <= len(allowed):
        raise ConfigError(f"--threads: {threads} is not between 1 and the {len(allowed)} cores of this process")
    return allowed[:threads]


@contextmanager
def pinned(to: Sequence[int]) -> Iterator[None]:
    """Pins this thread, and threads that it starts in the context, to some cores; PyTorch uses one thread."""
    affinity, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, to)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, affinity)
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ DALI


@contextmanager
def decode(job: Job, threads: int) -> Iterator[Take]:
    """DALI only reads and decodes the files, on the CPU: the upper bound."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError:
        raise Missing("NVIDIA DALI is not installed; pip install nvidia-dali-cuda130") from None
    steps = itertools.count()

    def paths() -> list[np.ndarray]:
        return [np.frombuffer(job.paths[i].encode(), np.uint8) for i in job.batch(next(steps))]

    def take(batches: int) -> Turn:
        pipeline = Pipeline(job.plan.images, threads, None, prefetch_queue_depth=AHEAD, exec_dynamic=True)
        with pipeline:
            content = fn.io.file.read(fn.external_source(source=paths, batch=True))
            pipeline.set_outputs(fn.decoders.image(content, output_type=types.RGB, adjust_orientation=False))
        pipeline.build()
        turn = _ahead(pipeline.run, batches, job.plan.images)
        del pipeline
        gc.collect()  # a pipeline in a reference cycle would go on decoding
        return turn

    yield take


@contextmanager
def montages(
    job: Job, threads: int, engine: Literal["fused", "stock"], device: Literal["cpu", "gpu"] = "cpu"
) -> Iterator[Take]:
    """mcl: two views of four levels, tiled into canvases and normalised."""
    gpu = 0 if device == "gpu" and torch.cuda.is_available() else None
    try:
        loader = MontageLoader(job.source, job.plan, DataConfig(engine=engine, device=device), gpu=gpu, threads=threads)
    except ConfigError as error:
        raise Missing(str(error)) from error

    def take(batches: int) -> Turn:
        with loader:
            turn = _ahead(lambda: next(loader), batches, job.plan.images)
        gc.collect()
        return turn

    yield take


def _ahead(take: Callable[[], object], batches: int, images: int) -> Turn:
    """A turn of a contender that prepares batches in advance; the clock starts when its queue is full."""
    for _ in range(AHEAD):
        take()
    return _timed(take, batches, batches * images)


# ------------------------------------------------------------------------------------------------ DataLoader


@contextmanager
def workers(job: Job, threads: int, recipe: Callable[[Job], "Views"]) -> Iterator[Take]:
    """As many workers as threads, with one thread each, pinned together to as many cores.

    Args:
        recipe: returns the dataset, which decodes each image once and makes eight augmented views of canvas size.
    """
    # Forking this process, which has threads, could hang, and spawning every worker takes long.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    steps = itertools.count()
    planned = [[image] for image in job.batch(0)[:threads]]  # batches of the next turn
    loader: DataLoader[list[Tensor]] = DataLoader(
        recipe(job),
        batch_sampler=planned,
        num_workers=threads,
        persistent_workers=True,
        multiprocessing_context=context,
        worker_init_fn=functools.partial(_pin, cores(threads)),
    )

    def load() -> None:
        for _ in loader:
            pass

    def take(batches: int) -> Turn:
        planned[:] = [job.batch(next(steps)) for _ in range(batches)]
        return _timed(load, 1, batches * job.plan.images)

    load()  # one image per worker: all workers have started when it returns
    yield take


def _pin(to: Sequence[int], worker: int) -> None:
    os.sched_setaffinity(0, to)


class Views(Dataset[list[Tensor]]):
    """Views of each image.

    Args:
        paths: the files.
        read: decodes a file.
        transforms: one transform per view.
    """

    def __init__(self, paths: Sequence[str], read: Read, transforms: Sequence[Transform]) -> None:
        self._paths, self._read, self._transforms = paths, read, transforms

    def __getitem__(self, index: int) -> list[Tensor]:
        """[(3, S, S), ...]"""
        image = self._read(self._paths[index])
        return [transform(image) for transform in self._transforms]


def released(job: Job) -> Views:
    """The authors' recipe: Pillow images and torchvision's transforms, to float32 tensors in [0, 1]."""
    t = torchvision.transforms
    return _recipes(job, read_pillow, t, functools.partial(blur_pillow, job.plan.augment.blur_sigma), [t.ToTensor()])


def torchvision_v2(job: Job) -> Views:
    """The current recipe of torchvision: uint8 tensors from the decoder to the end."""
    v2 = torchvision.transforms.v2
    sigma = job.plan.augment.blur_sigma
    window = int(blur_window(np.array(sigma[1], np.float32)))
    return _recipes(job, functools.partial(decode_image, mode="RGB"), v2, v2.GaussianBlur(window, sigma), [])


def lightly(job: Job) -> Views:
    """lightly's BYOL views with the same parameters, without normalisation: float32 tensors in [0, 1].

    Raises:
        Missing: lightly is not installed.
    """
    if importlib.util.find_spec("lightly") is None:
        raise Missing("lightly is not installed; pip install -r benchmarks/requirements.txt")
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    a = job.plan.augment
    transforms = [
        make(
            input_size=job.plan.geometry.canvas,
            cj_prob=a.jitter,
            cj_bright=a.brightness,
            cj_contrast=a.contrast,
            cj_sat=a.saturation,
            cj_hue=a.hue,
            min_scale=a.crop_scale[0],
            random_gray_scale=a.gray,
            gaussian_blur=a.blur[view],
            solarization_prob=a.solarize[view],
            sigmas=a.blur_sigma,
            hf_prob=a.flip,
            normalize=None,
        )
        for view, make in enumerate((BYOLView1Transform, BYOLView2Transform))
        for _ in range(job.plan.geometry.levels)
    ]
    return Views(job.paths, read_pillow, transforms)


def blur_pillow(sigma: tuple[float, float], image: Image.Image) -> Image.Image:
    """Pillow's Gaussian blur, with a random sigma between two bounds, in pixels."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def read_pillow(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _recipes(job: Job, read: Read, t: ModuleType, blur: Transform, last: Sequence[Transform]) -> Views:
    """One transform per view and level, made of torchvision's transforms, version 1 or 2."""
    a = job.plan.augment
    transforms = [
        t.Compose(
            [
                t.RandomResizedCrop(job.plan.geometry.canvas, a.crop_scale, a.crop_ratio),
                t.RandomHorizontalFlip(a.flip),
                t.RandomApply([t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], a.jitter),
                t.RandomGrayscale(a.gray),
                t.RandomApply([blur], a.blur[view]),
                t.RandomSolarize(128, a.solarize[view]),
                *last,
            ]
        )
        for view in range(VIEWS)
        for _ in range(job.plan.geometry.levels)
    ]
    return Views(job.paths, read, transforms)


CONTENDERS: dict[str, tuple[str, Callable[[Job, int], AbstractContextManager[Take]]]] = {
    "decode": ("decoding alone\n(DALI)", decode),
    "fused": ("mcl, fused operator", functools.partial(montages, engine="fused")),
    "stock": ("mcl, stock DALI", functools.partial(montages, engine="stock")),
    "fused_gpu": ("mcl, fused operator,\non the GPU", functools.partial(montages, engine="fused", device="gpu")),
    "stock_gpu": ("mcl, stock DALI,\non the GPU", functools.partial(montages, engine="stock", device="gpu")),
    "released": ("released recipe\n(Pillow, DataLoader)", functools.partial(workers, recipe=released)),
    "torchvision": ("torchvision v2\n(DataLoader)", functools.partial(workers, recipe=torchvision_v2)),
    "lightly": ("lightly\n(DataLoader)", functools.partial(workers, recipe=lightly)),
}
"""By key: the label in charts, and a function that creates the contender with a number of threads."""
OURS = ("fused", "stock")
