"""Every encoding of an image is either read alike by all engines, or refused with a reason."""

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.batch import MontageBatch
from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, decode
from mcl.config import DataConfig
from tests.dali_pipelines import encodings, parity
from tests.dali_pipelines.loading import ENGINES, GEOMETRY

COARSE = {"PNG, gray, 2 bits", "PNG, palette, 4 bits", "TIFF, palette"}
AMBIGUOUS = {"JPEG, YCCK without Adobe's marker"}


@pytest.fixture(scope="module")
def encoded(picture: Image.Image) -> dict[str, bytes]:
    return encodings.encodings(picture)


@pytest.fixture(scope="module")
def source(encoded: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Source:
    return encodings.write(tmp_path_factory.mktemp("encoded"), encoded)


@pytest.fixture(scope="module")
def rows(source: Source, encoded: dict[str, bytes]) -> dict[str, encodings.Row]:
    return {row.encoding: row for row in encodings.rows(source, encoded)}


def test_the_table_of_encodings_is_that_of_the_readme(rows: dict[str, encodings.Row]) -> None:
    assert encodings.table(rows.values()) == encodings.in_readme()[0]
    assert len(rows) >= 60
    assert max(int(row.difference or 0) for row in rows.values()) <= 1


def test_what_is_used_shows_the_picture(
    source: Source, encoded: dict[str, bytes], rows: dict[str, encodings.Row], picture: Image.Image
) -> None:
    """Pixels are as stored: orientation is ignored, and so is data after the image."""
    forms = [picture.convert(mode).convert("RGB") for mode in ("RGB", "L", "1")]
    halves = np.where(np.asarray(forms[1]) < 128, 0, 255)  # thresholded like the text PBM, not dithered
    expected = [*map(np.asarray, forms), halves]
    for i, name in enumerate(encoded):
        if rows[name].fate.startswith("decoded") and name not in AMBIGUOUS:
            got = decode(source.read(i)).astype(int)
            assert got.shape == (48, 64, 3), name
            error = min(np.abs(got - form).mean() for form in expected)
            assert error <= (35 if name in COARSE else 5), name


def test_all_engines_make_the_same_tiles_of_every_encoding(source: Source, rows: dict[str, encodings.Row]) -> None:
    """All encodings are in one batch, and bad ones have the same substitutes; tiles are only cropped and rescaled."""
    used = [i for i, row in enumerate(rows.values()) if row.fate.startswith("decoded")]
    images = len(rows) // 4 * 4
    augment = parity.only(mean=(0,) * 3, std=(1 / 255,) * 3)
    plan = Plan(seed=0, size=len(rows), images=images, geometry=GEOMETRY, augment=augment)
    made: dict[str, MontageBatch] = {}
    for engine in ENGINES:
        with MontageLoader(source, plan, DataConfig(engine=engine, max_bad_fraction=0.5), threads=1) as loader:  # type: ignore[arg-type]
            made[engine] = next(loader)[0]
            assert loader.bad.keys().isdisjoint(used)
            assert set(made[engine].index.tolist()) <= set(used)
    slow = made["torchvision"]
    for engine, bound in (("fused", 0.5), ("stock", 3)):
        assert torch.equal(made[engine].index, slow.index)
        difference = (made[engine].pixels - slow.pixels)[:images].abs().mean((1, 2, 3))
        assert difference.max() <= bound, engine
