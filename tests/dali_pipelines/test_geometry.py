"""Geometry, compared with cases computed by hand."""

import pytest
import torch

from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import assemble, cut, tile_boxes
from tests.conftest import random_view

DEFAULT = Geometry()


def test_boxes_of_two_levels_by_hand() -> None:
    geometry = Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 4))
    found = tile_boxes(geometry, 4)
    assert found.dtype == torch.float32
    assert found[:4].tolist() == [[i, 0, 0, 32, 32] for i in range(4)]
    assert found[4:].tolist() == [[4, 0, 0, 16, 16], [4, 16, 0, 32, 16], [4, 0, 16, 16, 32], [4, 16, 16, 32, 32]]


def test_sizes_of_the_released_geometry() -> None:
    assert DEFAULT.canvas == 224
    assert [DEFAULT.tile(i) for i in range(4)] == [224, 112, 56, 28]
    assert DEFAULT.canvases(128) == (128, 32, 8, 4)
    assert DEFAULT.tiles(128) == (128, 128, 128, 256)


@pytest.mark.parametrize(
    ("images", "legal"), [(32, True), (96, True), (160, True), (16, False), (100, False), (0, False)]
)
def test_legal_batches(images: int, legal: bool) -> None:
    assert DEFAULT.legal(images) is legal


def test_a_schedule_says_how_many_cells_an_epoch_has() -> None:
    geometry = Geometry(cells=3, schedule=((2, 5), (4, 1)))
    assert [geometry.at(epoch).cells for epoch in range(6)] == [3, 3, 5, 5, 1, 1]
    assert [geometry.at(epoch).canvas for epoch in (1, 2, 4)] == [96, 160, 32]
    assert geometry.at(0) == Geometry(cells=3)
    assert geometry.at(2) == Geometry(cells=5)
    assert geometry.fewest_cells == 1
    assert Geometry(cells=3, schedule=((2, 5),)).fewest_cells == DEFAULT.fewest_cells - 4 == 3
    assert DEFAULT.at(1000) == DEFAULT


def test_queries_are_one_canvas_in_so_many() -> None:
    geometry = Geometry(queries=(4, 1, 2, 1))
    assert geometry.query_canvases(128) == (32, 32, 4, 4)
    assert DEFAULT.query_canvases(128) == DEFAULT.canvases(128)
    assert Geometry(cells=3, schedule=((2, 5), (4, 6)), queries=(4, 1, 1, 1)).final == Geometry(cells=6)


@pytest.mark.parametrize(
    ("queries", "message"),
    [((4, 1), "queries: 2 entries for 4 ratios"), ((4, 1, 1, 0), r"queries: \[4, 1, 1, 0\] must be at least 1")],
)
def test_illegal_queries(queries: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(queries=queries)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((0, 5),), r"schedule: epochs \[0\] must increase from 1; montage\.cells applies before"),
        (((3, 5), (3, 7)), r"schedule: epochs \[3, 3\] must increase"),
        (((5, 5), (3, 7)), r"schedule: epochs \[5, 3\] must increase"),
        (((3, 0),), r"schedule: from epoch 3 on: cells: 0 must be at least 1"),
        (((3, 3),), r"schedule: from epoch 3 on: images_per_canvas: 64 must divide the canvas side of 96 px"),
        (((3,),), "schedule"),
    ],
)
def test_illegal_schedules(schedule: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Geometry(cells=2, images_per_canvas=(1, 4, 16, 64), schedule=schedule)


def test_regions_are_rows_of_their_own_level() -> None:
    batch = random_view(Geometry(cells=1), 64, 0)
    regions = batch.first((64, 16, 3, 1)).regions()
    assert [len(r) for r in regions] == [64, 64, 48, 64]
    assert torch.equal(regions[1][:, 0], torch.arange(16.0).repeat_interleave(4))
    assert regions[2][17].tolist() == [1, 8, 0, 16, 8]
    assert torch.equal(regions[3][:, 1:], batch.boxes[batch.tiles(3)][:64, 1:])
    assert [len(r) for r in batch.first((64,)).regions()] == [64]


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_cutting_gives_the_tiles_that_were_assembled(ratio: int) -> None:
    tiles = torch.randn(3 * ratio**2, 5, 2, 2)
    maps = assemble(tiles, ratio).contiguous(memory_format=torch.channels_last)
    assert torch.equal(cut(maps, ratio), tiles)
    assert cut(maps, ratio).is_contiguous(memory_format=torch.channels_last)


def test_batch_slices_levels_and_moves() -> None:
    batch = random_view(Geometry(cells=1), 32, 0)
    assert [batch.tiles(i) for i in range(4)] == [slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 160)]
    moved = batch.to(torch.device("cpu"), torch.float64)
    assert moved.pixels.dtype == torch.float64
    assert moved.pixels.is_contiguous(memory_format=torch.channels_last)
    assert moved.boxes is batch.boxes
    assert (moved.canvas_counts, moved.ratios, moved.cells) == (batch.canvas_counts, batch.ratios, batch.cells)
