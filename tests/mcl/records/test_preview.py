"""Pictures: tiles are where the boxes say, and feature maps keep the structure of features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

from dali_pipelines.batch import MontageBatch, in_order
from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import tile_boxes
from mcl.config import AugmentConfig, ConfigError, ModelConfig
from mcl.evaluation.features import Maps
from mcl.models import Encoder
from mcl.records import preview

AUGMENT = AugmentConfig()
GEOMETRY = Geometry(cells=1)
IMAGES = 32
FOCUS = 21
PALETTE = [ImageColor.getrgb(colour) for colour in preview.PALETTE]

Picture = npt.NDArray[np.uint8]


def gray_of(source: int) -> int:
    """Each image has its own gray."""
    return 60 + 3 * source


def view(seed: int) -> MontageBatch:
    """A view whose tiles are gray, in shuffled slots at all levels except the first."""
    generator = torch.Generator().manual_seed(seed)
    counts = GEOMETRY.tiles(IMAGES)
    shuffled = [torch.randperm(n, generator=generator) % IMAGES for n in counts[1:]]
    sources = torch.cat([torch.arange(counts[0]), *shuffled])
    boxes = tile_boxes(GEOMETRY, IMAGES)
    pixels = torch.zeros(sum(GEOMETRY.canvases(IMAGES)), 3, GEOMETRY.canvas, GEOMETRY.canvas)
    for source, (row, x1, y1, x2, y2) in zip(sources.tolist(), boxes.int().tolist(), strict=True):
        pixels[row, :, y1:y2, x1:x2] = gray_of(source) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (AUGMENT.mean, AUGMENT.std))
    batch = in_order(GEOMETRY, IMAGES, (pixels - mean) / std)
    return replace(batch, index=batch.index + 100, tile_images=sources, step=3)


@pytest.fixture(scope="module")
def views() -> tuple[MontageBatch, MontageBatch]:
    return view(0), view(1)


@pytest.fixture(scope="module")
def picture(views: tuple[MontageBatch, MontageBatch], tmp_path_factory: pytest.TempPathFactory) -> Picture:
    path = tmp_path_factory.mktemp("preview") / "new" / "montage.png"
    preview.montages(*views, AUGMENT, path, FOCUS)
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelConfig(backbone="resnet18", width=16, hidden=32), (1, 2, 4, 8))


def covered(layout: preview.Layout) -> Picture:
    """Nonzero where links may cover pixels."""
    mask = Image.new("L", (layout.width, layout.height))
    for link in layout.links:
        points = preview.curve(link)
        ImageDraw.Draw(mask).line(points, 255, 24, joint="curve")
        for x, y in (points[0], points[-1]):
            ImageDraw.Draw(mask).circle((x, y), 16, 255)
    return np.asarray(mask)


def test_every_tile_is_outlined_in_its_colour_and_shows_its_image(
    picture: Picture, views: tuple[MontageBatch, MontageBatch]
) -> None:
    layout = preview.arrange(*views, FOCUS)
    assert picture.shape == (layout.height, layout.width, 3)
    assert layout.width <= 2400
    hidden = covered(layout)
    checked = [0] * GEOMETRY.levels
    for batch, canvases in zip(views, layout.views, strict=True):
        for canvas in canvases:
            for i in torch.nonzero(batch.boxes[:, 0] == canvas.row).flatten().tolist():
                x1, y1, x2, y2 = canvas.box(batch.boxes[i, 1:].tolist())
                centre = (x1 + x2) // 2, (y1 + y2) // 2
                corners = [(x1, y1), (x2, y1), (x1, y2), (x2, y2)]
                if any(hidden[y, x] for x, y in (centre, *corners)):
                    continue
                assert picture[centre[1], centre[0]].tolist() == [gray_of(int(batch.tile_images[i]))] * 3
                for x, y in corners:
                    assert tuple(picture[y, x]) == PALETTE[canvas.level]
                checked[canvas.level] += 1
    assert all(n >= 6 for n in checked), checked


def test_the_focus_image_is_visible_and_joined_with_its_targets(
    picture: Picture, views: tuple[MontageBatch, MontageBatch]
) -> None:
    layout = preview.arrange(*views, FOCUS)
    per_view = [1, 1, 1, 2]  # level 3 shows every image twice
    assert sorted(link.level for link in layout.links) == sorted(
        level for level, n in enumerate(per_view) for _ in range(2 * n)
    )
    for link in layout.links:
        for x, y in (link.tile, link.target):
            assert tuple(picture[round(y), round(x)]) == PALETTE[link.level]
        towards = -1 if link.tile[0] < link.target[0] else 1  # back into the tile, and on into the target
        inside_tile = picture[round(link.tile[1]) + 12, round(link.tile[0]) + towards * 16]
        inside_target = picture[round(link.target[1]), round(link.target[0]) - towards * 40]
        assert inside_tile.tolist() == inside_target.tolist() == [gray_of(FOCUS)] * 3


def test_each_link_is_an_unbroken_line(picture: Picture, views: tuple[MontageBatch, MontageBatch]) -> None:
    layout = preview.arrange(*views, FOCUS)
    own = 0
    for link in layout.links:
        colours = [tuple(picture[round(y), round(x)]) for x, y in preview.curve(link, 200)]
        drawn = sum(c == PALETTE[link.level] for c in colours) / len(colours)
        assert drawn > 0.6  # other links and their borders cover the rest
        own += drawn > 0.9
    assert own >= 2


@pytest.mark.parametrize("cells", [1, 2, 3, 7, 11, 20])
def test_pictures_stay_readable_at_any_canvas_size(cells: int) -> None:
    images = 32
    batch = replace(
        view(2),
        cells=cells,
        boxes=tile_boxes(Geometry(cells=cells), images),
    )
    layout = preview.arrange(batch, batch, 5)
    assert 1800 < layout.width <= 2400
    for canvases in layout.views:
        assert {c.level for c in canvases} == {0, 1, 2, 3}
        for c in canvases:
            assert 0 <= c.x <= layout.width - c.side
            assert c.scale < 1 or c.side % (32 * cells) == 0
        for a in canvases:
            assert all(a is b or a.y != b.y or abs(a.x - b.x) > a.side for b in canvases)


def test_a_focus_outside_the_batch_is_refused(views: tuple[MontageBatch, MontageBatch], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="focus: 32 is not one of the 32 images"):
        preview.montages(*views, AUGMENT, tmp_path / "x.png", focus=32)


def test_an_unwritable_file_is_named(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x.png"
    with pytest.raises(ConfigError, match=f"{path}: cannot write the picture"):
        preview.feature_maps({"": Maps(encoder).eval()}, Maps(encoder).names, torch.zeros(1, 3, 32, 32), path, AUGMENT)


@pytest.mark.parametrize("seed", range(6))
def test_pca_recovers_a_gradient(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(16, 3, generator=generator))
    x = torch.arange(8.0).view(1, 1, 8).expand(2, 8, 8)
    y = torch.arange(8.0).view(1, 8, 1).expand(2, 8, 8)
    features = 1000 + torch.stack([3 * x, y], -1) @ directions[:, :2].t()  # (2, 8, 8, 16)
    rgb = preview.pca_rgb(features.permute(0, 3, 1, 2)).astype(int)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    assert abs(np.corrcoef(red.ravel(), x.flatten())[0, 1]) > 0.995
    assert abs(np.corrcoef(green.ravel(), y.flatten())[0, 1]) > 0.995
    assert red.min() == green.min() == 0
    assert red.max() == green.max() == 255
    assert np.ptp(red, axis=1).max() == 0  # red is constant within columns
    assert set(blue.ravel()) == {128}  # there is no third component
    loading = directions[:, 0]
    rising = loading[loading.abs().argmax()] > 0  # the sign of the largest loading decides the direction
    assert (red[0, 0, -1] > red[0, 0, 0]) == rising
    assert (preview.pca_rgb(-features.permute(0, 3, 1, 2))[..., 0] == 255 - red).all()


def test_pca_survives_what_training_may_produce() -> None:
    assert (preview.pca_rgb(torch.full((1, 8, 2, 2), float("nan"))) == 128).all()
    assert (preview.pca_rgb(torch.ones(2, 2, 1, 1)) == 128).all()
    assert preview.pca_rgb(torch.randn(1, 2, 4, 4)).shape == (1, 4, 4, 3)


def test_feature_maps_show_all_levels_of_networks_side_by_side(encoder: Encoder, tmp_path: Path) -> None:
    """Features that depend only on the position, and are the same for all images, are not shown."""
    encoder.eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "new" / "features.png"
    with torch.no_grad():
        maps = Maps(encoder)(images)
    position = [100 * torch.randn(m[0].shape, generator=torch.Generator().manual_seed(2)) for m in maps]

    class Elsewhere(Maps):
        def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
            return [m + p for m, p in zip(super().forward(pixels), position, strict=True)]

    preview.feature_maps({"A": Maps(encoder), "B": Elsewhere(encoder)}, Maps(encoder).names, images, path, AUGMENT)
    shown = np.asarray(Image.open(path)).astype(int)
    side = 256
    expected = [preview.to_rgb(images, AUGMENT), *(preview.pca_rgb(m - m.mean(0)) for m in maps)]
    assert [m.shape[1] for m in expected] == [32, 1, 2, 4, 8]
    top = shown.shape[0] - preview.MARGIN - 2 * side - preview.GAP
    for column, pixels in enumerate([*expected, *expected[1:]]):
        x = preview.MARGIN + column * (side + 2 * preview.GAP)
        for row, image in enumerate(pixels):
            y = top + row * (side + preview.GAP)
            scale = side // len(image)
            cell = shown[y : y + side, x : x + side]
            different = np.abs(cell - image.repeat(scale, 0).repeat(scale, 1))
            assert different.max() <= (1 if column > 4 else 0)  # addition and subtraction round
