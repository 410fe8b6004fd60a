"""The plan of an evaluation, for the engines of training: every photograph once, in a given order, not augmented."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dali_pipelines.geometry import Geometry, IntArray
from dali_pipelines.plan import Augmentation, Plan, StepPlan, substitute

_CENTRE = 7 / 8
"""Side of the square that is shown, as a fraction of the image's shorter side: 224 of 256 pixels, as usual."""


@dataclass(frozen=True, kw_only=True)
class PhotoPlan(Plan):
    """One view of whole photographs, without augmentation: canvases with one image each, until all have been shown."""

    shown: IntArray
    """(n,) dataset indices, in the order in which they are shown."""
    whole: bool = False
    """Show the whole image, without keeping its aspect ratio, instead of its central square."""

    @property
    def views(self) -> int:
        return 1

    @property
    def steps(self) -> int:
        """Number of steps of `images` photographs each; the last step may have fewer."""
        return -(-len(self.shown) // self.images)

    @property
    def steps_per_epoch(self) -> int:
        return self.steps

    def wanted(self, step: int) -> IntArray:
        """(N,) dataset indices of a step, including bad ones."""
        return self.shown[step * self.images : (step + 1) * self.images]

    def samples(self, step: int, bad: Collection[int]) -> IntArray:
        """As :meth:`wanted`, with substitutes for bad ones."""
        index = self.wanted(step).copy()
        for i, sample in enumerate(index.tolist()):
            if sample in bad:
                index[i] = substitute(self.seed, 0, step * self.images + i, self.size, bad)
        return index

    def step(self, step: int, sizes: npt.NDArray[np.int32], bad: Collection[int] = ()) -> StepPlan:
        """As :meth:`Plan.step`."""
        index = self.samples(step, bad)
        n, windows = len(index), sizes[index]
        if not self.whole:
            side = np.maximum(1, np.rint(_CENTRE * windows.min(1, keepdims=True))).astype(np.int32)
            corner = (windows - side) // 2
            windows = np.concatenate([corner, corner + side], 1)
        else:
            windows = np.concatenate([np.zeros_like(windows), windows], 1)
        no = np.zeros(n, np.bool_)
        as_it_is = Augmentation(
            window=windows,
            flip=no,
            jitter=no,
            order=np.tile(np.arange(4), (n, 1)),
            factors=np.tile(np.array([1, 1, 1, 0], np.float32), (n, 1)),
            gray=no,
            sigma=np.zeros(n, np.float32),
            solarize=no,
        )
        return StepPlan(
            epoch=0,
            step=step,
            geometry=self.geometry,
            released=False,
            index=index,
            augmentations=((as_it_is,),),
            tile_images=((np.arange(n),),),
        )


def canvas_of(cells: int) -> Geometry:
    """The geometry of canvases that show one image each."""
    return Geometry(cells=cells, ratios=(1,), images_per_canvas=(1,))
