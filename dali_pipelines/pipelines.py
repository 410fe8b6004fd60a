"""The DALI pipelines, which turn encoded images into normalised canvases or tiles.

``fused_pipeline`` makes canvases with one operator of mcl (``kernels/dali``); ``stock_pipeline`` makes their tiles with
DALI's operators. Both decode every image once. The graph is the same for CPU and GPU: on a GPU the decoder is ``mixed``
and all later operators run on the GPU. The ``*_feed`` functions compute the inputs of a graph from a plan.
"""

import dataclasses
import functools
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nvidia import dali
from nvidia.dali import Pipeline, fn, pipeline_def, plugin_manager, types
from nvidia.dali import ops as dali_ops

from dali_pipelines import BUILD, DALI, stock_ops
from dali_pipelines.geometry import Geometry
from dali_pipelines.plan import VIEWS, Augmentation, StepPlan
from dali_pipelines.settings import AugmentConfig, DataConfig
from dali_pipelines.stock_ops import Node, Recipe

PLUGIN = Path(__file__).parent / "libmcl_dali.so"
"""The library of the fused operator, built by setup.py."""

INSTALLED = f"nvidia-dali-cuda{str(dali.__cuda_version__)[:2]}0=={dali.__version__}"
"""pip requirement of the installed DALI."""

_DTYPES = {"auto": types.FLOAT, "float32": types.FLOAT, "float16": types.FLOAT16}

Feed = Callable[[int], list[Any]]
"""Called by ``external_source`` with the number of each batch; returns the arrays of a plan."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """The settings that determine the operators of a pipeline."""

    geometry: Geometry
    augment: AugmentConfig
    data: DataConfig
    device: Literal["cpu", "gpu"] = "cpu"
    """Device that decodes and augments."""
    upload: bool = False
    """Copy canvases that were made on the CPU to the pipeline's GPU."""
    usual: tuple[int, int] = (0, 0)
    """Width, height that few images exceed, pixels; a GPU allocates memory for decoding such images in advance."""
    views: int = VIEWS

    @property
    def released(self) -> bool:
        return self.data.tile_sampling == "released"

    def normalisation(self) -> dict[str, Any]:
        """Arguments of the operators that normalise."""
        mean, std = ([255 * value for value in values] for values in (self.augment.mean, self.augment.std))
        return {"dtype": _DTYPES[self.data.dtype], "mean": mean, "std": std}


@functools.cache
def load_plugin() -> frozenset[str]:
    """Registers ``fn.mcl.montage`` with DALI; returns the devices that it was built for: cpu, and gpu if with CUDA.

    Raises:
        RuntimeError: the library was built for another DALI, or does not load; the message names the remedy.
    """
    if not INSTALLED.startswith(DALI):
        raise RuntimeError(f"it was built for {DALI}, but {INSTALLED} is installed; pip install {DALI}")
    try:
        plugin_manager.load_library(str(PLUGIN))
    except RuntimeError as error:
        raise RuntimeError(f"{str(error).strip().splitlines()[-1]}; {BUILD} replaces it") from error
    registered = {"cpu": dali_ops.cpu_ops(), "gpu": dali_ops.gpu_ops()}  # type: ignore[attr-defined]
    return frozenset(device for device, names in registered.items() if "mcl__Montage" in names)


@pipeline_def(enable_conditionals=True)
def fused_pipeline(feed: Feed, graph: Graph) -> tuple[Node, ...]:
    """Returns the canvases of every view, (N, K * S / N, S, 3), which is (K, S, S, 3) in memory, and images' shapes."""
    contents, is_path, recipes, slots, cells = fn.external_source(source=feed, num_outputs=5, batch=True)
    image, shape = decode(read(contents, is_path), graph)
    views = fn.mcl.montage(  # type: ignore[attr-defined]  # the plugin's
        image,
        recipes,
        slots,
        cells=cells,
        views=graph.views,
        ratios=list(graph.geometry.ratios),
        images_per_canvas=list(graph.geometry.images_per_canvas),
        released=graph.released,
        **graph.normalisation(),
    )
    views = [views] if graph.views == 1 else views  # DALI returns a single output without a list
    return *(view.gpu() if graph.upload else view for view in views), shape


def fused_feed(plan: StepPlan) -> list[Any]:
    """Recipes (N, views * levels, 17), slots (N, tiles of one image) and cells (N,), for the fused pipeline."""
    n = len(plan.index)
    recipes = [recipe_rows(a) for a in chain(*plan.augmentations)]
    # Every image is shown equally often, so that sorting slots by image gives one row per image.
    slots = [np.argsort(shown, kind="stable").reshape(n, -1) for shown in chain(*plan.tile_images)]
    return [
        np.stack(recipes, 1),
        np.concatenate(slots, 1).astype(np.int32),
        np.full(n, plan.geometry.cells, np.int32),
    ]


def recipe_rows(a: Augmentation) -> npt.NDArray[np.float32]:
    """The recipes of n tiles, (n, 17), with the fields of kernels/dali/recipe.h."""
    columns = [a.window, a.flip, a.jitter, a.order, a.factors, a.gray, a.sigma, a.solarize]
    return np.column_stack(columns).astype(np.float32)


@pipeline_def(enable_conditionals=True)
def stock_pipeline(feed: Feed, graph: Graph) -> tuple[Node, ...]:
    """Returns the tiles of every view and level, (N, tile, tile, 3), which PyTorch lays out, and images' shapes."""
    inputs = 3 + graph.views * graph.geometry.levels * stock_ops.RECIPE_NODES
    contents, is_path, canvas, *rest = fn.external_source(source=feed, num_outputs=inputs, batch=True)
    image, shape = decode(read(contents, is_path), graph)
    nodes = iter(rest)
    result = []
    for _ in range(graph.views):
        for ratio in graph.geometry.ratios:
            tile = make_tile(image, stock_ops.recipe_of(nodes), canvas, ratio, graph.released)
            normalised = fn.crop_mirror_normalize(tile, output_layout="HWC", **graph.normalisation())
            result.append(normalised.gpu() if graph.upload else normalised)
    return *result, shape


def stock_feed(plan: StepPlan) -> list[Any]:
    """Canvas sides (N,) and the arrays of all recipes, for the stock pipeline."""
    canvas = np.full(len(plan.index), plan.geometry.canvas, np.int32)
    return [canvas, *chain(*map(stock_ops.recipe_arrays, chain(*plan.augmentations)))]


def read(contents: Node, is_path: Node) -> Node:
    """Encoded images: `contents`, or the files read by DALI's threads where `contents` are paths."""
    if is_path:
        contents = fn.io.file.read(contents)
    return contents


def decode(encoded: Node, graph: Graph) -> tuple[Node, Node]:
    """RGB pixels as stored: EXIF rotation is ignored, since plans use the sizes in headers.

    Returns:
        The image, and its shape (height, width, 3) on the CPU, from which the loader sees whether the file has changed.
    """
    # In batches of 32 images or more DALI's decoder crashes if it cannot read a header, whereas peek_image_shape raises
    # an error. The reshape changes nothing: it only makes the decoder depend on peek_image_shape.
    header = fn.peek_image_shape(encoded, dtype=types.INT32)
    encoded = fn.reshape(encoded, shape=encoded.shape(dtype=types.INT32) + 0 * header[:1])
    image = fn.decoders.image(
        encoded,
        device="mixed" if graph.device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        # For GPUs only: upsample chroma as on the CPU; the hardware decoder's share; allocate memory once, in advance.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=graph.data.hardware_decoder,
        preallocate_width_hint=graph.usual[0],
        preallocate_height_hint=graph.usual[1],
    )
    return image, image.shape()


def make_tile(image: Node, recipe: Recipe, canvas: Node, ratio: int, released: bool) -> Node:
    """One level's tile of one view, 8 bits per channel; `canvas` is the side of a canvas, pixels."""
    side = canvas // ratio
    tile = stock_ops.crop_and_resize(image, recipe, canvas if released else side)
    tile = stock_ops.colour(tile, recipe)
    tile = stock_ops.blur_and_solarize(tile, recipe)
    return stock_ops.every_rth_pixel(tile, side, ratio) if released and ratio > 1 else tile


def decode_pipeline(encoded: bytes) -> Pipeline:
    """A pipeline that decodes one image on the CPU to pixels and shape, to find out which image broke a batch."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> tuple[Node, ...]:
        image = fn.external_source(source=lambda: [np.frombuffer(encoded, np.uint8)], batch=True)
        return decode(image, Graph(Geometry(), AugmentConfig(), DataConfig()))

    return pipeline()
