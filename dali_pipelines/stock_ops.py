"""Graph functions: each takes and returns DALI nodes and runs on the device of its image.

They apply an :class:`~dali_pipelines.plan.Augmentation` with stock DALI operators. Parameters of samples are nodes on
the CPU. An ``if`` over a node is a DALI conditional: it splits the batch, and only the samples for which the condition
holds are processed.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, types

from dali_pipelines.plan import Augmentation, blur_window

Node = Any
"""A node of a DALI graph (``nvidia.dali.data_node.DataNode``)."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601), as in Pillow and torchvision."""

COLOUR_STEPS = 4


class ColourStep(NamedTuple):
    """Parameters of one of the four colour operations; the parameters of the other three have no effect."""

    chroma: Node  # bool: whether the operation is saturation or hue; otherwise it is brightness or contrast
    brightness: Node
    contrast: Node
    saturation: Node
    hue: Node  # degrees


class Recipe(NamedTuple):
    """An Augmentation as nodes."""

    colour: tuple[ColourStep, ...]
    window_start: Node  # y, x, pixels
    window_shape: Node  # height, width, pixels
    roi_start: Node  # y, x, fractions of the window; x runs from 1 to 0 where the image is flipped
    roi_end: Node
    jitter: Node
    gray: Node
    blur: Node
    sigma: Node
    blur_window: Node  # odd side of the blur's kernel, pixels
    solarize: Node


RECIPE_NODES = COLOUR_STEPS * len(ColourStep._fields) + len(Recipe._fields) - 1
"""Number of external inputs of a recipe."""


def recipe_of(nodes: Iterator[Node]) -> Recipe:
    """The recipe made of the next ``RECIPE_NODES`` nodes, whose values :func:`recipe_arrays` returns."""
    steps = tuple(ColourStep(*(next(nodes) for _ in ColourStep._fields)) for _ in range(COLOUR_STEPS))
    return Recipe(steps, *(next(nodes) for _ in Recipe._fields[1:]))


def recipe_arrays(a: Augmentation) -> list[npt.NDArray[Any]]:
    """The arrays, (n, ...) each, that are fed to the nodes of a recipe."""
    x1, y1, x2, y2 = a.window.T
    flip = a.flip.astype(np.float32)
    zero, one = np.zeros_like(flip), np.ones_like(flip)
    neutral = np.array([1, 1, 1, 0], np.float32)
    steps = []
    for position in range(COLOUR_STEPS):
        now = a.order[:, position, None] == np.arange(COLOUR_STEPS)  # (n, 4) which operation comes now
        brightness, contrast, saturation, hue = np.where(now, a.factors, neutral).T.copy()
        steps.append(ColourStep(now[:, 2] | now[:, 3], brightness, contrast, saturation, hue * 360))
    recipe = Recipe(
        colour=tuple(steps),
        window_start=np.stack([y1, x1], 1),
        window_shape=np.stack([y2 - y1, x2 - x1], 1),
        roi_start=np.stack([zero, flip], 1),
        roi_end=np.stack([one, one - flip], 1),
        jitter=a.jitter,
        gray=a.gray,
        blur=a.sigma > 0,
        sigma=np.maximum(a.sigma, 1e-3),  # the operator rejects 0, also of samples that it does not process
        blur_window=blur_window(a.sigma),
        solarize=a.solarize,
    )
    return [*chain(*recipe.colour), *recipe[1:]]


def crop_and_resize(image: Node, r: Recipe, side: Node) -> Node:
    """Crops the window, then rescales it to a square of `side` pixels and flips it; pixels outside are not read."""
    window = fn.slice(image, r.window_start, r.window_shape, axes=[0, 1])
    side = fn.cast(side, dtype=types.FLOAT)
    return fn.resize(
        window,
        resize_x=side,
        resize_y=side,
        roi_start=r.roi_start,
        roi_end=r.roi_end,
        roi_relative=True,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )


def colour_step(image: Node, step: ColourStep) -> Node:
    """Brightness, contrast about the image's mean gray, saturation or hue (a rotation in YIQ, not in HSV)."""
    if step.chroma:
        image = fn.hsv(image, saturation=step.saturation, hue=step.hue)
    else:
        gray = fn.reductions.sum(
            fn.reductions.mean(image, axes=[0, 1]) * types.Constant(list(LUMA), device=image.device)
        )
        image = fn.brightness_contrast(
            image, brightness=step.brightness, contrast=step.contrast, contrast_center=gray.cpu()
        )
    return image


def colour(image: Node, r: Recipe) -> Node:
    """Jitter in the plan's order, each step rounded to 8 bits as in Pillow and torchvision, then grayscale."""
    if r.jitter:
        for step in r.colour:
            image = colour_step(image, step)
    if r.gray:
        image = fn.hsv(image, saturation=0.0)
    return image


def blur_and_solarize(image: Node, r: Recipe) -> Node:
    """Gaussian blur with reflected borders, then inversion of values from 128 on."""
    if r.blur:
        image = fn.gaussian_blur(image, sigma=r.sigma, window_size=r.blur_window)
    if r.solarize:
        image = image ^ (fn.cast(image >= 128, dtype=types.UINT8) * types.Constant(np.uint8(255)))
    return image


def every_rth_pixel(image: Node, side: Node, ratio: int) -> Node:
    """``image[::ratio, ::ratio]``, `side` pixels square; made of reshapes, since DALI has no slices with a stride."""
    blocks = fn.reshape(image, shape=fn.stack(side, ratio, side, ratio, 3), layout="")
    return fn.reshape(blocks[:, 0, :, 0, :], shape=fn.stack(side, side, 3), layout="HWC")
