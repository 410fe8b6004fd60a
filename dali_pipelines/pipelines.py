"""The DALI pipeline: file names in, normalised slabs out.

One graph for both devices: with ``device_id=None`` everything runs on the CPU, otherwise the decoder is ``mixed`` and
what follows runs on that GPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from dali_pipelines import ops
from dali_pipelines.plan import VIEWS, StepPlan
from mcl.config import AugmentConfig, DataConfig
from mcl.montage import Geometry, Paste, slabs

_DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16}


@pipeline_def(enable_conditionals=True)
def montage_pipeline(
    feed: Callable[[int], list[np.ndarray[Any, Any]]],
    geometry: Geometry,
    augment: AugmentConfig,
    data: DataConfig,
    gpu: bool,
    outputs: int,
) -> tuple[ops.Node, ...]:
    """Slabs of every view and level: VIEWS * levels outputs of (S / images_per_canvas, S, 3)."""
    nodes = iter(fn.external_source(source=feed, num_outputs=outputs, batch=True))
    images = decode(next(nodes), gpu)
    result = []
    for _ in range(VIEWS):
        for level in range(geometry.levels):
            recipe = _take(ops.Recipe, nodes)
            tile = make_tile(images, recipe, geometry, level, data.tile_sampling == "released")
            slab = fn.multi_paste(
                tile,
                in_ids=next(nodes),
                in_anchors=next(nodes),
                shapes=next(nodes),
                out_anchors=next(nodes),
                output_size=list(slabs(geometry, level, geometry.images_per_canvas[level]).size),
            )
            result.append(
                fn.crop_mirror_normalize(
                    slab,
                    dtype=_DTYPES[data.dtype],
                    output_layout="HWC",
                    mean=[255 * m for m in augment.mean],
                    std=[255 * s for s in augment.std],
                )
            )
    return tuple(result)


def decode(path: ops.Node, gpu: bool) -> ops.Node:
    """RGB pixels as stored: EXIF rotation is ignored, since the plan's sizes are the header's."""
    return fn.decoders.image(
        fn.io.file.read(path), device="mixed" if gpu else "cpu", output_type=types.RGB, adjust_orientation=False
    )


def make_tile(image: ops.Node, recipe: ops.Recipe, geometry: Geometry, level: int, released: bool) -> ops.Node:
    """One level's tile of one view, 8 bits per channel."""
    size = geometry.canvas if released else geometry.tile(level)
    tile = ops.crop_and_resize(image, recipe, size)
    tile = ops.colour(tile, recipe)
    tile = ops.blur_and_solarize(tile, recipe)
    if released and level > 0:
        tile = ops.every_rth_pixel(tile, size, geometry.ratios[level])
    return tile


def decode_pipeline(path: str) -> Pipeline:
    """Decodes one file on the CPU: tells whether it is the one that broke a batch."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> ops.Node:
        return decode(fn.external_source(source=lambda: [encode_path(path)], batch=True), gpu=False)

    return pipeline()


def feed_arrays(plan: StepPlan, paths: list[str], pastes: list[Paste]) -> list[Any]:
    """One array (or list of N arrays) per external input, in the order in which the pipeline takes them."""
    feed: list[Any] = [[encode_path(path) for path in paths]]
    for augmentations, sources in zip(plan.augmentations, plan.sources, strict=True):
        for a, slots, paste in zip(augmentations, sources, pastes, strict=True):
            feed += _leaves(ops.recipe_arrays(a))
            feed += [slots[paste.slots].astype(np.int32), paste.source, paste.shape, paste.target]
    return feed


def inputs(geometry: Geometry) -> int:
    """Number of external inputs."""
    recipe = len(dataclasses.fields(ops.Recipe)) - 1 + ops.COLOUR_STEPS * len(dataclasses.fields(ops.ColourStep))
    return 1 + VIEWS * geometry.levels * (recipe + 4)


def encode_path(path: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(path.encode(), np.uint8)


def _leaves(value: Any) -> list[Any]:
    """The arrays of a Recipe in order of declaration."""
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    if dataclasses.is_dataclass(value):
        return [leaf for f in dataclasses.fields(value) for leaf in _leaves(getattr(value, f.name))]
    return [value]


def _take(cls: type[ops.Recipe], nodes: Any) -> ops.Recipe:
    """A Recipe of the next nodes: the inverse of :func:`_leaves`."""

    def colour() -> tuple[ops.ColourStep, ...]:
        return tuple(
            ops.ColourStep(*(next(nodes) for _ in dataclasses.fields(ops.ColourStep))) for _ in range(ops.COLOUR_STEPS)
        )

    return cls(*(colour() if f.name == "colour" else next(nodes) for f in dataclasses.fields(cls)))
