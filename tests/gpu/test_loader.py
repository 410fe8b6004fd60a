"""What only a GPU can show of the loader: it notices there, too, what has changed, and nobody waits in vain."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dali_pipelines.geometry import Geometry
from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import Plan
from dali_pipelines.source import open_source
from mcl.config import AugmentConfig, DataConfig

pytest.importorskip("nvidia.dali")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GEOMETRY = Geometry(cells=1)
IMAGES = 32


@pytest.mark.parametrize("engine", ["fused", "stock"])
@pytest.mark.parametrize("change", ["smaller", "larger", "turned", "text"])
def test_an_image_that_has_changed_is_replaced(photos: Path, tmp_path: Path, engine: str, change: str) -> None:
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
    plan = Plan(seed=0, size=IMAGES, images=IMAGES, geometry=GEOMETRY, augment=AugmentConfig())
    config = DataConfig(engine=engine, device="gpu", max_bad_fraction=0.1)  # type: ignore[arg-type]
    with MontageLoader(source, plan, config, gpu=0, threads=2) as loader:
        (query, _) = next(loader)
    assert list(loader.bad) == [7]
    assert 7 not in query.index.tolist()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("engine", ["fused", "stock"])
def test_a_gpu_that_is_behind_reads_the_canvases_of_each_step(photos: Path, engine: str, device: str) -> None:
    """The host neither waits for DALI nor overwrites what is still to be read."""
    source = open_source(str(photos / "val"))
    plan = Plan(seed=0, size=len(source), images=IMAGES, geometry=GEOMETRY, augment=AugmentConfig())
    config = DataConfig(engine=engine, device=device, prefetch=3)  # type: ignore[arg-type]

    def sums(behind: bool) -> list[float]:
        made = []
        with MontageLoader(source, plan, config, gpu=0, threads=2) as loader:
            for _ in range(12):
                query, key = next(loader)
                if behind:
                    torch.cuda._sleep(100_000_000)  # about 50 ms
                else:
                    torch.cuda.synchronize()
                made.append((query.pixels.double() * key.pixels).sum())
                del query, key
        return torch.stack(made).tolist()

    assert sums(behind=True) == sums(behind=False)
