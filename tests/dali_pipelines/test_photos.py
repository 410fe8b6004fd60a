"""Photographs without augmentation: every engine shows each once, in order, like torchvision's resize and centre
crop."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from dali_pipelines.loader import MontageLoader
from dali_pipelines.photos import PhotoPlan, canvas_of
from dali_pipelines.settings import AugmentConfig, DataConfig
from dali_pipelines.source import open_source
from tests.dali_pipelines.loading import ENGINES

SIDE = 64


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """Colours that hardly differ between neighbours, so that resampling filters agree."""
    few = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (width, height) in enumerate([(96, 128), (128, 96), (100, 100), (300, 80), (64, 65)]):
        smooth(width, height, i).save(tmp_path / f"{i}.png")
    return tmp_path


def shown(folder: Path, engine: str, **plan: object) -> tuple[list[list[int]], torch.Tensor]:
    """Numbers of the images of every step, and all pixels as RGB from 0 to 1."""
    source = open_source(str(folder))
    augment = AugmentConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    planned = {"shown": np.arange(5), "images": 2, **plan}
    plan_ = PhotoPlan(seed=0, size=5, geometry=canvas_of(SIDE // 32), augment=augment, **planned)  # type: ignore[arg-type]
    with MontageLoader(source, plan_, DataConfig(engine=engine, max_bad_fraction=1), threads=1) as loader:  # type: ignore[arg-type]
        views = [view for (view,) in loader]
    return [view.index.tolist() for view in views], torch.cat([view.pixels for view in views])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_image_once_as_torchvision_crops_it(folder: Path, engine: str) -> None:
    numbers, pixels = shown(folder, engine)
    assert numbers == [[0, 1], [2, 3], [4]]
    for i, own in enumerate(pixels):
        image = F.pil_to_tensor(Image.open(folder / f"{i}.png")).float() / 255
        square = F.center_crop(F.resize(image, [round(SIDE * 8 / 7)], antialias=True), [SIDE, SIDE])
        assert (own - square).abs().mean() < 0.02, (
            i
        )  # our windows are whole pixels of the image, torchvision's are whole pixels of the resized image


@pytest.mark.parametrize("engine", ENGINES)
def test_whole_images_in_a_given_order(folder: Path, engine: str) -> None:
    numbers, pixels = shown(folder, engine, shown=np.array([3, 0, 3]), whole=True)
    assert numbers == [[3, 0], [3]]
    assert torch.equal(pixels[0], pixels[2])
    image = F.resize(F.pil_to_tensor(Image.open(folder / "3.png")).float() / 255, [SIDE, SIDE], antialias=True)
    assert (pixels[0] - image).abs().mean() < 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_a_good_image_stands_in_for_a_broken_one(folder: Path, engine: str) -> None:
    buffer = io.BytesIO()
    smooth(96, 128, 9).save(buffer, "PNG")
    (folder / "2.png").write_bytes(buffer.getvalue()[:600])
    numbers, pixels = shown(folder, engine)
    assert numbers[0] == [0, 1]
    assert numbers[1][0] != 2
    assert len(pixels) == 5
