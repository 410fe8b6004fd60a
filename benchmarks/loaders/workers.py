"""Contenders that run in worker processes of PyTorch's DataLoader: eight augmented views of canvas size per image.

Each image is decoded once. Views are neither normalised nor tiled: that is left to the device. Workers live from turn
to turn and wait in between. A turn is one epoch, so nothing is loaded before its clock starts or after it stops, and
its batches are a multiple of the workers, so no worker waits for the others. Batches are handed over in shared memory:
0.6 GB for 128 images as float32, up to two batches per worker.
"""

import functools
import importlib.util
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torchvision.transforms
import torchvision.transforms.v2
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import decode_image

from benchmarks.loaders import Job, Loader, Missing, Turn, cores
from dali_pipelines.plan import VIEWS, blur_window

Read = Callable[[str], Any]
Transform = Callable[[Any], Any]


class Workers(Loader):
    """As many workers as threads, each on any of as many cores, with one thread of its own."""

    def __init__(self, job: Job, threads: int, recipe: Callable[[Job], "Views"]) -> None:
        # Forking this process, which has threads, could hang; starting Python afresh for every worker takes long.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._job = job
        self._steps = _Steps(job, threads)
        self._loader: DataLoader[list[Tensor]] = DataLoader(
            recipe(job),
            batch_sampler=self._steps,
            num_workers=threads,
            persistent_workers=True,
            multiprocessing_context=context,
            worker_init_fn=functools.partial(_pin, cores(threads)),
        )
        for _ in self._loader:  # one image per worker: they have started when it is there
            pass

    def turn(self, batches: int) -> Turn:
        self._steps.batches = batches
        start, core_start = time.perf_counter(), time.process_time()
        for _ in self._loader:
            pass
        seconds, core_seconds = time.perf_counter() - start, time.process_time() - core_start
        return Turn(batches * self._job.plan.images, seconds, core_seconds)

    def close(self) -> None:
        del self._loader  # which ends its workers


class Views(Dataset[list[Tensor]]):
    """Views of each image.

    Args:
        paths: the files.
        read: decodes one.
        transforms: one per view.
    """

    def __init__(self, paths: Sequence[str], read: Read, transforms: Sequence[Transform]) -> None:
        self._paths, self._read, self._transforms = paths, read, transforms

    def __getitem__(self, index: int) -> list[Tensor]:
        """[(3, S, S), ...]"""
        image = self._read(self._paths[index])
        return [transform(image) for transform in self._transforms]


def released(job: Job) -> Views:
    """The authors' way: Pillow images and torchvision's transforms, as float32 tensors in [0, 1]."""
    to_tensor = torchvision.transforms.ToTensor()
    return _recipes(job, read_pillow, torchvision.transforms, PillowBlur, [to_tensor])


def torchvision_v2(job: Job) -> Views:
    """A present-day user's way: uint8 tensors from the decoder to the end."""
    v2 = torchvision.transforms.v2
    window = int(blur_window(np.array(job.plan.augment.blur_sigma[1], np.float32)))
    return _recipes(job, read_tensor, v2, functools.partial(v2.GaussianBlur, window), [])


def lightly(job: Job) -> Views:
    """lightly's BYOL views, given the same strengths, without their normalisation: float32 tensors in [0, 1].

    Raises:
        Missing: lightly is not installed.
    """
    if importlib.util.find_spec("lightly") is None:
        raise Missing("lightly is not installed; pip install -r benchmarks/requirements.txt")
    from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform

    a = job.plan.augment
    recipes: tuple[Callable[..., Transform], ...] = (BYOLView1Transform, BYOLView2Transform)
    transforms = []
    for view, make in enumerate(recipes):
        for _ in range(job.plan.geometry.levels):
            transform = make(
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
            transforms.append(transform)
    return Views(job.paths, read_pillow, transforms)


class PillowBlur(nn.Module):
    """Pillow's Gaussian blur.

    Args:
        sigma: bounds of its sigma, pixels.
    """

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def read_pillow(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def read_tensor(path: str) -> Tensor:
    """(3, H, W) uint8."""
    image: Tensor = decode_image(path, mode="RGB")
    return image


def _recipes(
    job: Job,
    read: Read,
    t: ModuleType,
    blur: Callable[[tuple[float, float]], Transform],
    last: Sequence[Transform],
) -> Views:
    """One recipe per view and level, from torchvision's transforms, version 1 or 2."""
    a = job.plan.augment
    transforms = []
    for view in range(VIEWS):
        for _ in range(job.plan.geometry.levels):
            jitter = t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
            steps = [
                t.RandomResizedCrop(job.plan.geometry.canvas, a.crop_scale, a.crop_ratio),
                t.RandomHorizontalFlip(a.flip),
                t.RandomApply([jitter], a.jitter),
                t.RandomGrayscale(a.gray),
                t.RandomApply([blur(a.blur_sigma)], a.blur[view]),
                t.RandomSolarize(128, a.solarize[view]),
            ]
            transforms.append(t.Compose([*steps, *last]))
    return Views(job.paths, read, transforms)


class _Steps(Sampler[list[int]]):
    """Images of the next steps of the plan; the first time round, one image per worker."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._workers, self._step = job, workers, 0
        self.batches = 0

    def __iter__(self) -> Iterator[list[int]]:
        if self.batches == 0:
            yield from ([image] for image in self._job.batch(0)[: self._workers])
        for _ in range(self.batches):
            yield self._job.batch(self._step)
            self._step += 1


def _pin(to: Sequence[int], worker: int) -> None:
    os.sched_setaffinity(0, to)
