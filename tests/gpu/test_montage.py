"""The fused operator: launches, streams, memory, and equality with the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from dali_pipelines.geometry import Geometry
from mcl.config import AugmentConfig
from tests.gpu.conftest import memory

pytest.importorskip("nvidia.dali")
from nvidia.dali import fn, pipeline_def, types

from dali_pipelines import pipelines
from dali_pipelines.plan import VIEWS, Plan

GEOMETRY = Geometry()
IMAGES = 32

Canvases = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def files(photos: Path) -> list[Path]:
    return sorted((photos / "val").rglob("*.jpg"))[:IMAGES]


@pytest.fixture(autouse=True)
def _built(device: torch.device) -> None:
    if ("gpu" if device.type == "cuda" else "cpu") not in pipelines.load_plugin():
        pytest.skip(f"the plugin is not compiled for {device}")


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def batches(
    files: list[Path], device: torch.device, augment: AugmentConfig, dtype: Any = types.UINT8, released: bool = False
) -> Iterator[list[Canvases]]:
    """The canvases (K, S, S, 3) of both views, step by step. Images are decoded on the CPU, since decoders differ."""
    gpu = device.type == "cuda"
    sizes = np.array([size_of(path) for path in files])
    plan = Plan(
        seed=0,
        size=IMAGES,
        images=IMAGES,
        geometry=GEOMETRY,
        augment=augment,
        tile_sampling="released" if released else "direct",
    )
    paths = [np.frombuffer(str(path).encode(), np.uint8) for path in files]

    @pipeline_def(batch_size=IMAGES, num_threads=2, device_id=0 if gpu else None)
    def pipeline() -> tuple[Any, ...]:
        path, recipes, slots, cells = fn.external_source(
            source=lambda step: [paths, *pipelines.fused_feed(plan.step(step, sizes))], num_outputs=4, batch=True
        )
        images = fn.decoders.image(fn.io.file.read(path), device="cpu", output_type=types.RGB, adjust_orientation=False)
        views = fn.mcl.montage(
            images.gpu() if gpu else images,
            recipes,
            slots,
            cells=cells,
            views=VIEWS,
            ratios=list(GEOMETRY.ratios),
            images_per_canvas=list(GEOMETRY.images_per_canvas),
            released=released,
            dtype=dtype,
            mean=[120, 110, 100],
            std=[60, 55, 50],
        )
        return tuple(views)

    made = pipeline()
    made.build()
    side = GEOMETRY.canvas
    while True:
        outputs = [view.as_cpu().as_array() if gpu else view.as_array() for view in made.run()]
        yield [view.astype(np.float32).reshape(-1, side, side, 3) for view in outputs]


@pytest.mark.parametrize("released", [False, True])
def test_tiles_equal_the_cpus(files: list[Path], device: torch.device, released: bool) -> None:
    """Tiles are identical: both devices get weights from the host, round to 8 bits after every operation, and do not
    fuse multiplications and additions."""
    arguments = (AugmentConfig(), types.UINT8, released)
    cpu, ours = (next(batches(files, place, *arguments)) for place in (torch.device("cpu"), device))
    for theirs, found in zip(cpu, ours, strict=True):
        np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16])
def test_normalised_tiles_are_the_same_tiles(files: list[Path], device: torch.device, dtype: Any) -> None:
    (levels, *_), (normalised, *_) = (next(batches(files, device, AugmentConfig(), d)) for d in (types.UINT8, dtype))
    expected = (levels - np.float32([120, 110, 100])) / np.float32([60, 55, 50])
    np.testing.assert_array_equal(normalised, expected.astype(np.float16 if dtype == types.FLOAT16 else np.float32))


def test_repeated_runs_give_equal_bits_and_take_no_more_memory(files: list[Path], device: torch.device) -> None:
    """Several batches are in flight at once, and none may overwrite another's tables."""
    first, second = (batches(files, device, AugmentConfig()) for _ in range(2))
    taken = []
    for _ in range(60 if device.type == "cuda" else 2):
        for a, b in zip(next(first), next(second), strict=True):
            np.testing.assert_array_equal(a, b)
        taken.append(memory(device))
    assert taken[-1] <= taken[9 % len(taken)] + (16 << 20)
