"""The loader on a GPU: decoder, ownership of memory, and files that have changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dali_pipelines.geometry import Geometry
from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, open_source
from mcl.config import AugmentConfig, ConfigError, DataConfig
from tests.gpu.conftest import memory

pytest.importorskip("nvidia.dali")

GEOMETRY = Geometry(cells=1)
IMAGES = 32
STD = 255 * sum(AugmentConfig().std) / 3
"""Scale of a normalised pixel: 8-bit levels per unit."""


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source(str(photos / "val"))


def make_loader(source: Source, device: torch.device, engine: str, upload: bool = False, **data: Any) -> MontageLoader:
    """A loader on the device or, with `upload`, on the CPU with canvases on the device."""
    plan = Plan(seed=0, size=len(source), images=IMAGES, geometry=GEOMETRY, augment=AugmentConfig())
    where = "cpu" if upload or device.type == "cpu" else "gpu"
    config = DataConfig(engine=engine, device=where, **data)  # type: ignore[arg-type]
    try:
        return MontageLoader(source, plan, config, gpu=device.index, threads=2)
    except ConfigError as error:
        pytest.skip(str(error))


engines = pytest.mark.parametrize("engine", ["fused", pytest.param("stock", marks=pytest.mark.gpu)])


@engines
def test_its_decoder_gives_the_cpus_pixels_but_for_rounding(source: Source, device: torch.device, engine: str) -> None:
    """For the same files and augmentation, the mean difference is less than one level."""
    with make_loader(source, device, engine) as one, make_loader(source, torch.device("cpu"), engine) as other:
        for ours, theirs in zip(next(one), next(other), strict=True):
            assert ours.pixels.device == device
            assert ours.tile_images.equal(theirs.tile_images)
            assert STD * (ours.pixels.cpu().float() - theirs.pixels.float()).abs().mean() < 1


@engines
@pytest.mark.parametrize("upload", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_pixels_stay_until_a_busy_device_has_read_them(
    source: Source, device: torch.device, engine: str, upload: bool
) -> None:
    """The host is several steps ahead of the device, and keeps no reference to the pixels."""

    def checksums(busy: bool) -> list[Tensor]:
        sums = []
        with make_loader(source, device, engine, upload, prefetch=3) as loader:
            for _ in range(12 if device.type == "cuda" else 2):
                query, key = next(loader)
                if device.type == "cuda":
                    torch.cuda._sleep(100_000_000) if busy else torch.cuda.synchronize()  # cycles, about 50 ms
                sums += [view.pixels.double().sum() for view in (query, key)]
        return sums

    assert torch.equal(torch.stack(checksums(busy=True)), torch.stack(checksums(busy=False)))


@engines
def test_memory_is_bounded(source: Source, device: torch.device, engine: str) -> None:
    """Memory is bounded also while the device is ten steps behind."""
    taken = []
    with make_loader(source, device, engine) as loader:
        for _ in range(6 if device.type == "cuda" else 1):
            for _ in range(10 if device.type == "cuda" else 1):
                query, key = next(loader)
                if device.type == "cuda":
                    torch.cuda._sleep(20_000_000)
                sum(view.pixels.sum() for view in (query, key))
            taken.append(memory(device))
            if device.type == "cuda":
                torch.cuda.synchronize()
    assert taken[-1] <= taken[len(taken) // 3] + (64 << 20)


@engines
@pytest.mark.parametrize("change", ["smaller", "larger", "turned", "text"])
def test_an_image_that_has_changed_is_replaced(
    photos: Path, tmp_path: Path, device: torch.device, engine: str, change: str
) -> None:
    files = [tmp_path / f"{i:02}.jpg" for i in range(IMAGES)]
    for file, photo in zip(files, sorted((photos / "val").rglob("*.jpg")), strict=False):
        file.write_bytes(photo.read_bytes())
    source = open_source(str(tmp_path))
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "smaller": lambda image: image.resize((image.width - 1, image.height)),
        "larger": lambda image: image.resize((2 * image.width, 2 * image.height)),
        "turned": lambda image: image.resize((image.height, image.width + 1)),
    }
    if change == "text":
        files[7].write_text("hello")
    else:
        with Image.open(files[7]) as image:
            changed = changes[change](image)
        changed.save(files[7])
    with make_loader(source, device, engine, max_bad_fraction=0.1) as loader:
        (query, _) = next(loader)
    assert list(loader.bad) == [7]
    assert 7 not in query.index.tolist()
