"""What only a GPU can show of the fused operator: launches, streams, memory, and equality with the CPU there."""

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

pytest.importorskip("nvidia.dali")
from nvidia.dali import fn, pipeline_def, types

from dali_pipelines import pipelines
from dali_pipelines.plan import VIEWS, Plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GEOMETRY = Geometry()
IMAGES = 32

Canvases = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def files(photos: Path) -> list[Path]:
    return sorted((photos / "val").rglob("*.jpg"))[:IMAGES]


@pytest.fixture(autouse=True)
def _built_for_cuda() -> None:
    assert "gpu" in pipelines.load_plugin(), "build with MCL_BUILD_CUDA=1"


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def batches(
    files: list[Path], device: str, augment: AugmentConfig, dtype: Any = types.UINT8, released: bool = False
) -> Iterator[list[Canvases]]:
    """The canvases (K, S, S, 3) of both views, step by step. Images are decoded on the CPU: decoders differ."""
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

    @pipeline_def(batch_size=IMAGES, num_threads=2, device_id=0 if device == "gpu" else None)
    def pipeline() -> tuple[Any, ...]:
        path, recipes, slots, cells = fn.external_source(
            source=lambda step: [paths, *pipelines.fused_feed(plan.step(step, sizes))], num_outputs=4, batch=True
        )
        images = fn.decoders.image(fn.io.file.read(path), device="cpu", output_type=types.RGB, adjust_orientation=False)
        views = fn.mcl.montage(
            images.gpu() if device == "gpu" else images,
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
        outputs = [view.as_cpu().as_array() if device == "gpu" else view.as_array() for view in made.run()]
        yield [view.astype(np.float32).reshape(-1, side, side, 3) for view in outputs]


def differences(files: list[Path], *arguments: Any) -> list[Canvases]:
    """GPU from CPU, absolute, one array per level, both views in it."""
    gpu, cpu = (next(batches(files, device, *arguments)) for device in ("gpu", "cpu"))
    ends = np.cumsum(GEOMETRY.canvases(IMAGES))[:-1]
    views = [np.split(abs(a - b), ends) for a, b in zip(gpu, cpu, strict=True)]
    return [np.stack(level) for level in zip(*views, strict=True)]


@pytest.mark.parametrize("released", [False, True])
def test_tiles_equal_the_cpus(files: list[Path], released: bool) -> None:
    """Only the Gaussian's weights may round differently, as the GPU's exp need not be the CPU's in its last bit."""
    levels = differences(files, AugmentConfig(), types.UINT8, released)
    assert max(level.max() for level in levels) <= 1
    assert max(np.mean(level > 0) for level in levels) < 1e-3


@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16])
def test_normalised_tiles_are_the_same_tiles(files: list[Path], dtype: Any) -> None:
    (levels, *_), (normalised, *_) = (next(batches(files, "gpu", AugmentConfig(), d)) for d in (types.UINT8, dtype))
    expected = (levels - np.float32([120, 110, 100])) / np.float32([60, 55, 50])
    np.testing.assert_array_equal(normalised, expected.astype(np.float16 if dtype == types.FLOAT16 else np.float32))


def test_repeated_runs_give_equal_bits_and_take_no_more_memory(files: list[Path]) -> None:
    """Batches of a run are in flight at once: none may overwrite the tables of another."""
    first, second = (batches(files, "gpu", AugmentConfig()) for _ in range(2))
    free = []
    for _ in range(60):
        for a, b in zip(next(first), next(second), strict=True):
            np.testing.assert_array_equal(a, b)
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[9] - (16 << 20)
