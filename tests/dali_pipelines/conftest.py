"""Images for the loader's tests: photographs of the repository, and small generated files of many kinds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.dali_pipelines import images


@pytest.fixture(scope="session")
def pictures(photos: Path) -> list[str]:
    """Eight real photographs of eight classes, 240 px and larger."""
    return images.choose(photos)


@pytest.fixture(scope="session")
def picture(pictures: list[str]) -> Image.Image:
    """A photograph, 64 x 48."""
    with Image.open(pictures[0]) as image:
        return image.convert("RGB").resize((64, 48))


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, picture: Image.Image) -> dict[str, Path]:
    return images.save_kinds(tmp_path_factory.mktemp("kinds"), picture)


@pytest.fixture(scope="session")
def folder_of(picture: Image.Image) -> Callable[[Path, int], list[Path]]:
    """Writes n different JPEG files of 64 x 48 pixels into a folder."""

    def write(folder: Path, n: int) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{i:03}.jpg" for i in range(n)]
        for i, path in enumerate(paths):
            shifted = np.roll(np.asarray(picture), (3 * i, 5 * i), (0, 1))
            Image.fromarray(shifted).save(path, quality=92)
        return paths

    return write
