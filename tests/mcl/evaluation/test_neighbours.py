"""Pictures of neighbours: the right images are nearest, and the map shows the principal components."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.source import open_source
from mcl.config import ConfigError
from mcl.evaluation import neighbours
from mcl.evaluation.embedding import Embedding
from mcl.evaluation.neighbours import check, draw, nearest
from mcl.records.preview import pca


def test_nearest_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """By cosine, regardless of length; without the query itself and without missing rows."""
    monkeypatch.setattr(neighbours, "_CHUNK", 2)
    rows = np.array([[1, 0], [0, 1], [10, 1], [np.nan, np.nan], [3, 2]], np.float32)
    cosines, index = nearest(rows, [0, 4], 3)
    assert index.tolist() == [[2, 4, 1], [2, 0, 1]]
    torch.testing.assert_close(cosines[0], torch.tensor([10 / 101**0.5, 3 / 13**0.5, 0.0]))


def test_components_are_those_of_the_singular_values() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1, 5, 1, 3, 1])
    _, _, axes = np.linalg.svd((x - x.mean(0)).numpy())
    expected = (x - x.mean(0)).numpy() @ axes[:2].T
    signs = np.sign(axes[:2][[0, 1], np.abs(axes[:2]).argmax(1)])
    np.testing.assert_allclose(pca(x, 2).numpy(), expected * signs, atol=1e-9)


@pytest.fixture
def colours(tmp_path: Path) -> Embedding:
    """Thirty images of two colours, whose features are their colours; one image has none."""
    rows = np.zeros((30, 3), np.float32)
    for i in range(30):
        rows[i] = (200, i, 0) if i % 2 else (0, i, 200)
        Image.new("RGB", (40, 30), tuple(rows[i].astype(int).tolist())).save(tmp_path / f"{i:02}.png")
    rows[7] = np.nan
    np.save(tmp_path / "x.npy", rows)
    names = [f"{i:02}.png" for i in range(30)]
    return Embedding(
        tmp_path / "x.npy", "c5", 32, str(tmp_path), names, [-1] * 30, [], {"07.png": "it is broken"}, key=""
    )


def test_pictures_without_classes(colours: Embedding) -> None:
    """Every row of the page has a single colour; the map shows two separate groups."""
    picture, page = draw(colours, open_source(colours.root), "pca")
    text = page.read_text()
    assert "07.png" not in text
    for row in text.split('<div class="row">')[1:]:
        parities = {int(name) % 2 for name in re.findall(r'title="(\d\d)\.png"', row)}
        assert len(parities) == 1
    assert "of random pairs" not in text
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    right = pixels[:, pixels.shape[1] // 2 :]
    red, blue = ((right[..., c] > 150) & (right[..., 2 - c] < 60) for c in (0, 2))
    assert red.sum() > 500
    assert blue.sum() > 500
    assert abs(np.nonzero(red)[1].mean() - np.nonzero(blue)[1].mean()) > right.shape[1] / 2


def test_what_cannot_be_drawn(colours: Embedding, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.full((30, 3), np.nan, np.float32)
    np.save(colours.path, rows)
    with pytest.raises(ConfigError, match="has 0 images that can be decoded; a plot needs two"):
        draw(colours, open_source(colours.root), "pca")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"--plot umap: .*pip install umap-learn, or use --plot pca"):
        check("umap")
    with pytest.raises(ConfigError, match="--plot: 'tsne' is neither pca nor umap"):
        check("tsne")


def test_umap(colours: Embedding) -> None:
    pytest.importorskip("umap")
    picture, _ = draw(colours, open_source(colours.root), "umap")
    assert picture.stat().st_size > 10_000
