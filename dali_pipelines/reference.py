"""A slow and simple implementation of the loader: Pillow and torchvision execute the same plans as DALI.

Tests compare the other engines with it, and it is used where DALI is not installed.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import lay_out
from dali_pipelines.plan import Augmentation, StepPlan, blur_window
from dali_pipelines.settings import AugmentConfig, DataConfig
from dali_pipelines.source import Source
from dali_pipelines.source import decode as pillow_decode


def decode(source: Source, i: int) -> Tensor:
    """(3, H, W) uint8 of image i of a source.

    Raises:
        OSError: the image cannot be read or decoded, or does not have the size that its header had.
    """
    pixels = pillow_decode(source.read(i))
    source.check_size(i, (pixels.shape[1], pixels.shape[0]))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def crop_and_resize(image: Tensor, window: Sequence[int], flip: bool, size: int) -> Tensor:
    """Pillow's crop, antialiased bilinear resize and mirror of (3, H, W) uint8, to (3, size, size)."""
    x1, y1, x2, y2 = (int(v) for v in window)
    picture = F.to_pil_image(image).crop((x1, y1, x2, y2)).resize((size, size), Image.Resampling.BILINEAR)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
"""Colour operations, in the order of ``Augmentation.factors``."""


def colour(image: Tensor, a: Augmentation, i: int) -> Tensor:
    """Colour jitter in the plan's order, then grayscale, of (3, H, W) uint8."""
    if a.jitter[i]:
        for operation in a.order[i]:
            image = ADJUST[operation](image, float(a.factors[i, operation]))
    if a.gray[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return image


def blur_and_solarize(image: Tensor, a: Augmentation, i: int) -> Tensor:
    """Gaussian blur with reflected borders, then solarising at 128, of (3, H, W) uint8."""
    if a.sigma[i] > 0:
        window = int(blur_window(a.sigma[i]))
        image = F.gaussian_blur(image, [window, window], [float(a.sigma[i])] * 2)
    if a.solarize[i]:
        image = F.solarize(image, 128)
    return image


def make_tile(image: Tensor, a: Augmentation, i: int, geometry: Geometry, level: int, released: bool) -> Tensor:
    """One level's tile of one view of image i: (3, tile, tile) uint8."""
    tile = crop_and_resize(image, a.window[i], bool(a.flip[i]), geometry.canvas if released else geometry.tile(level))
    tile = blur_and_solarize(colour(tile, a, i), a, i)
    return tile[:, :: geometry.ratios[level], :: geometry.ratios[level]] if released else tile


class TorchvisionEngine:
    """Runs plans in a pool of threads, with the interface of :class:`dali_pipelines.loader.DaliEngine`."""

    def __init__(
        self,
        plans: Iterator[StepPlan],
        augment: AugmentConfig,
        data: DataConfig,
        source: Source,
        threads: int,
    ) -> None:
        self._plans, self._source = plans, source
        self._mean = torch.tensor(augment.mean).view(3, 1, 1) * 255
        self._std = torch.tensor(augment.std).view(3, 1, 1) * 255
        self._dtype = torch.float16 if data.dtype == "float16" else torch.float32
        self._pool = ThreadPoolExecutor(threads)
        self._prefetch = data.prefetch
        self._pending: deque[tuple[StepPlan, list[Future[list[list[Tensor]]]]]] = deque()

    def collect(self) -> tuple[list[Tensor], list[Tensor]]:
        """Canvases of every view of the next step, [(K, 3, S, S) channels_last, ...], and an empty list.

        Raises:
            OSError: an image of this step cannot be decoded.
        """
        while len(self._pending) < self._prefetch and (plan := next(self._plans, None)) is not None:
            self._pending.append((plan, [self._pool.submit(self._tiles, plan, i) for i in range(len(plan.index))]))
        plan, futures = self._pending.popleft()
        samples = [future.result() for future in futures]  # [image][view][level]
        views = []
        for view, tile_images in enumerate(plan.tile_images):
            tiles = [torch.stack(level) for level in zip(*(sample[view] for sample in samples), strict=True)]
            canvases = lay_out(tiles, tile_images, plan.geometry.ratios)
            views.append(((canvases.float() - self._mean) / self._std).to(self._dtype))
        return views, []

    def decodes(self, i: int) -> str | None:
        """Why image i of the source cannot be decoded; None if it can."""
        try:
            decode(self._source, i)
        except OSError as error:
            return str(error)
        return None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _tiles(self, plan: StepPlan, i: int) -> list[list[Tensor]]:
        image = decode(self._source, int(plan.index[i]))
        return [
            [make_tile(image, a, i, plan.geometry, level, plan.released) for level, a in enumerate(levels)]
            for levels in plan.augmentations
        ]
