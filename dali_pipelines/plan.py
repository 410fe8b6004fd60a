"""Order and augmentation as pure functions of (seed, epoch, position).

The loader has no random state. Every number comes from Philox 4x32-10, a counter-based generator (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011); the counter consists of the sample, the epoch and the purpose
of the number. So a run can resume at any step at no cost, and every engine can execute the same step. The numbers of
purposes must never change; a new purpose takes the next number.
"""

import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from dali_pipelines.geometry import Geometry, IntArray
from dali_pipelines.settings import AugmentConfig

VIEWS = 2
"""Query view and key view."""

_CROP_ATTEMPTS = 10  # as in torchvision's RandomResizedCrop
_SUBSTITUTE_DRAWS = 64
_AT_ONCE = 1 << 16  # samples whose words are drawn at a time, to save memory


class Purpose(IntEnum):
    """What a number is drawn for; part of the third word of the counter, in the bits above view and level."""

    ORDER = 0
    SUBSTITUTE = 1
    SLOTS = 2
    CROP = 3
    COLOUR = 4


def philox(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Philox 4x32-10: (..., 4) counters to (..., 4) random words."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def _words(
    seed: int, epoch: int, items: npt.ArrayLike, purpose: Purpose, blocks: int, view: int = 0, level: int = 0
) -> npt.NDArray[np.uint32]:
    """(n, 4 * blocks) random words, for n items (samples, positions or slots)."""
    items = np.asarray(items)
    counter = np.empty((items.size, blocks, 4), np.uint32)
    counter[..., 0] = items.reshape(-1, 1)
    counter[..., 1] = epoch
    counter[..., 2] = purpose << 16 | view << 8 | level
    counter[..., 3] = np.arange(blocks)
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(items.size, 4 * blocks)


def _uniform(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1)."""
    return words / 2.0**32


def _keys(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """(n,) sort keys for shuffling: the first two words of each row, read as a 64-bit number."""
    return words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, size: int) -> IntArray:
    """The permutation in which an epoch visits `size` samples."""
    samples = np.array_split(np.arange(size), size // _AT_ONCE + 1)
    keys = [_keys(_words(seed, epoch, some, Purpose.ORDER, 1)) for some in samples]
    permutation = np.argsort(np.concatenate(keys), kind="stable")
    permutation.flags.writeable = False
    return permutation


def substitute(seed: int, epoch: int, position: int, size: int, bad: Collection[int]) -> int:
    """The sample that replaces a bad one at `position` of an epoch: the first drawn sample that is not bad."""
    draws = _uniform(_words(seed, epoch, position, Purpose.SUBSTITUTE, _SUBSTITUTE_DRAWS // 4))[0]
    drawn: list[int] = (draws * size).astype(np.int64).tolist()
    behind = ((drawn[-1] + k) % size for k in range(size))
    return next(i for i in itertools.chain(drawn, behind) if i not in bad)


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of n images in one view at one level, in this order."""

    window: npt.NDArray[np.int32]  # (n, 4) x1, y1, x2, y2 of the crop in the source image, pixels
    flip: npt.NDArray[np.bool_]  # (n,)
    jitter: npt.NDArray[np.bool_]  # (n,) whether the four colour operations are applied
    order: npt.NDArray[np.int64]  # (n, 4) order of the colour operations
    factors: npt.NDArray[np.float32]  # (n, 4) brightness, contrast, saturation factors, hue shift in turns
    gray: npt.NDArray[np.bool_]  # (n,)
    sigma: npt.NDArray[np.float32]  # (n,) of the blur, in pixels of the image it is applied to; 0: no blur
    solarize: npt.NDArray[np.bool_]  # (n,)


def blur_window(sigma: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Side of a Gaussian blur's kernel, pixels: three sigma to either side."""
    return np.asarray(2 * np.ceil(3 * sigma) + 1).astype(np.int32)


def crop_windows(
    u: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32], scale: tuple[float, float], ratio: tuple[float, float]
) -> npt.NDArray[np.int32]:
    """Windows by the rule of torchvision's RandomResizedCrop.

    Args:
        u: (n, attempts, 4) numbers in [0, 1): area, aspect ratio, y and x of each attempt.
        sizes: (n, 2) width, height of the images, pixels.
        scale: bounds of the area, as a fraction of the image's.
        ratio: bounds of width / height.

    Returns:
        (n, 4) x1, y1, x2, y2: the first attempt that fits, else the largest centred window within `ratio`.
    """
    width, height = (sizes[:, i, None].astype(np.float64) for i in range(2))
    area = width * height * (scale[0] + u[..., 0] * (scale[1] - scale[0]))
    aspect = np.exp(np.log(ratio[0]) + u[..., 1] * (np.log(ratio[1]) - np.log(ratio[0])))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    y, x = np.floor(u[..., 2] * (height - h + 1)), np.floor(u[..., 3] * (width - w + 1))

    first = np.arange(len(u)), fits.argmax(1)
    x, y, w, h = (a[first] for a in (x, y, w, h))
    width, height = width[:, 0], height[:, 0]
    fallback_w = np.minimum(width, np.rint(height * ratio[1]))
    fallback_h = np.minimum(height, np.rint(width / ratio[0]))
    none = ~fits.any(1)
    w, h = np.where(none, fallback_w, w), np.where(none, fallback_h, h)
    x, y = np.where(none, (width - w) // 2, x), np.where(none, (height - h) // 2, y)
    return np.stack([x, y, x + w, y + h], 1).astype(np.int32)


def augmentation(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: IntArray,
    sizes: npt.NDArray[np.int32],
    view: int,
    level: int,
    blur_scale: float,
) -> Augmentation:
    """Draws the augmentation of n samples.

    Args:
        samples: (n,) dataset indices; these, seed, epoch, view and level determine every number drawn.
        sizes: (n, 2) width, height of these images, pixels.
        blur_scale: factor from canvas pixels to the pixels that are blurred.
    """
    n = len(samples)
    u = _uniform(_words(seed, epoch, samples, Purpose.CROP, _CROP_ATTEMPTS, view, 0 if config.shared_crop else level))
    window = crop_windows(u.reshape(n, _CROP_ATTEMPTS, 4), sizes, config.crop_scale, config.crop_ratio)

    u = _uniform(_words(seed, epoch, samples, Purpose.COLOUR, 4, view, level))
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.where(centre > 0, np.maximum(centre - spread, 0), -spread)
    factors = low + u[:, 4:8] * (centre + spread - low)
    low_sigma, high_sigma = config.blur_sigma
    sigma = (low_sigma + u[:, 12] * (high_sigma - low_sigma)) * blur_scale
    return Augmentation(
        window=window,
        flip=u[:, 0] < config.flip,
        jitter=u[:, 1] < config.jitter,
        order=np.argsort(u[:, 8:12], axis=1, kind="stable"),
        factors=factors.astype(np.float32),
        gray=u[:, 2] < config.gray,
        sigma=np.where(u[:, 13] < config.blur[view], sigma, 0).astype(np.float32),
        solarize=u[:, 3] < config.solarize[view],
    )


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of one step."""

    epoch: int
    step: int  # since the start of the run
    geometry: Geometry  # of this epoch
    released: bool  # tiles are made at canvas size, then every r-th pixel is taken
    index: IntArray  # (N,) dataset indices
    augmentations: tuple[tuple[Augmentation, ...], ...]  # [view][level]
    tile_images: tuple[tuple[IntArray, ...], ...]  # [view][level] (tiles,): which of the N images each tile shows


@dataclass(frozen=True)
class Plan:
    """Determines what a rank sees: a pure function from step to :class:`StepPlan`."""

    seed: int
    size: int  # samples of the dataset
    images: int  # per rank and step
    geometry: Geometry  # with the canvas schedule
    augment: AugmentConfig
    tile_sampling: Literal["direct", "released"] = "direct"
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        return self.images * self.world_size

    @property
    def views(self) -> int:
        return VIEWS

    @property
    def steps(self) -> int | None:
        """Number of steps; None if the plan never ends."""
        return None

    @property
    def steps_per_epoch(self) -> int:
        """Full steps of an epoch; the incomplete last one is dropped."""
        return self.size // self.global_batch

    def samples(self, step: int, bad: Collection[int]) -> IntArray:
        """(N,) dataset indices of a step, with substitutes for bad ones."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.global_batch + self.rank * self.images
        index = order(self.seed, epoch, self.size)[first : first + self.images].copy()
        for i, sample in enumerate(index):
            if int(sample) in bad:
                index[i] = substitute(self.seed, epoch, first + i, self.size, bad)
        return index

    def step(self, step: int, sizes: npt.NDArray[np.int32], bad: Collection[int] = ()) -> StepPlan:
        """Plans one step.

        Args:
            step: steps since the start of the run.
            sizes: (size, 2) width, height of every image of the dataset, pixels.
            bad: dataset indices that cannot be decoded.
        """
        epoch = step // self.steps_per_epoch
        index = self.samples(step, bad)
        released = self.tile_sampling == "released"
        blur_scales = [1.0 if released else 1.0 / ratio for ratio in self.geometry.ratios]
        draw = functools.partial(augmentation, self.augment, self.seed, epoch, index, sizes[index])
        return StepPlan(
            epoch=epoch,
            step=step,
            geometry=self.geometry.at(epoch),
            released=released,
            index=index,
            augmentations=tuple(
                tuple(draw(view, level, scale) for level, scale in enumerate(blur_scales)) for view in range(VIEWS)
            ),
            tile_images=tuple(
                tuple(self._tile_images(step, view, level) for level in range(self.geometry.levels))
                for view in range(VIEWS)
            ),
        )

    def _tile_images(self, step: int, view: int, level: int) -> IntArray:
        """Which image each tile of a level shows: a shuffle of all tiles, modulo N; level 0 is not shuffled."""
        count = self.geometry.tiles(self.images)[level]
        if level == 0:
            return np.arange(count)
        items = np.arange(count) + self.rank * count  # ranks shuffle differently
        words = _words(self.seed, step, items, Purpose.SLOTS, 1, view, level)
        return np.argsort(_keys(words), kind="stable") % self.images
