"""Micro-batches: parts of a view keep canvases and their tiles together."""

import dataclasses

import pytest
import torch

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import Geometry
from tests.conftest import view


def numbered(geometry: Geometry, images: int) -> MontageBatch:
    """A view in which every canvas is filled with its number and the crop of every tile is its number."""
    canvases, tiles = sum(geometry.canvases(images)), sum(geometry.tiles(images))
    pixels = torch.arange(float(canvases))[:, None, None, None].expand(-1, 3, geometry.canvas, geometry.canvas)
    whole = view(geometry, images, pixels.contiguous(memory_format=torch.channels_last), torch.arange(tiles) % images)
    return dataclasses.replace(
        whole, crops=torch.arange(float(tiles))[:, None].expand(-1, 5), query_counts=geometry.query_canvases(images)
    )


def test_a_part_is_canvases_of_every_level_with_their_tiles() -> None:
    """8 canvases of level 0, of which the first 4 are queries, and 4 (2) of level 1, whose tiles are 8 to 23."""
    whole = numbered(Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 2), queries=(2, 2)), 8)
    expected = [
        # Canvases: queries and others of level 0, then those of level 1.
        ([0, 1, 4, 5, 8, 10], [0, 1, 4, 5, 8, 9, 10, 11, 16, 17, 18, 19]),
        ([2, 3, 6, 7, 9, 11], [2, 3, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]),
    ]
    quarters = [[0, 0, 16, 16], [16, 0, 32, 16], [0, 16, 16, 32], [16, 16, 32, 32]]
    for i, (canvases, tiles) in enumerate(expected):
        part = whole.part(i, 2)
        assert part.pixels[:, 0, 0, 0].tolist() == canvases
        assert part.pixels.is_contiguous(memory_format=torch.channels_last)
        assert part.crops[:, 0].tolist() == tiles
        assert part.tile_images.tolist() == [tile % 8 for tile in tiles]
        assert part.boxes[:, 0].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 5, 5, 5]
        assert part.boxes[:, 1:].tolist() == 4 * [[0, 0, 32, 32]] + 2 * quarters
        assert (part.canvas_counts, part.query_counts) == ((4, 2), (2, 1))
        assert part.labels is whole.labels
        assert part.index is whole.index
    assert whole.part(0, 1) is whole


@pytest.mark.parametrize(
    ("geometry", "images", "parts"),
    [
        (Geometry(cells=1), 64, 2),
        (Geometry(cells=1, images_per_canvas=(1, 2, 2, 2), queries=(4, 2, 1, 2)), 16, 2),
        (Geometry(cells=2, ratios=(1, 4), images_per_canvas=(1, 8)), 32, 4),
        (Geometry(cells=1, ratios=(1,), images_per_canvas=(1,)), 3, 3),
    ],
)
def test_all_parts_together_are_the_whole(geometry: Geometry, images: int, parts: int) -> None:
    """Parts contain every canvas and every tile once; tiles stay in place, and queries stay queries."""
    whole = numbered(geometry, images)
    canvases, tiles = [], []
    for part in (whole.part(i, parts) for i in range(parts)):
        numbers = part.pixels[:, 0, 0, 0]
        rows = part.crops[:, 0].long()
        assert torch.equal(numbers[part.boxes[:, 0].long()], whole.boxes[rows, 0])
        assert torch.equal(part.boxes[:, 1:], whole.boxes[rows, 1:])
        assert torch.equal(part.tile_images, whole.tile_images[rows])
        assert part.pixels.is_contiguous(memory_format=torch.channels_last)
        first, first_of_whole = 0, 0
        for level in range(geometry.levels):
            queries = numbers[first : first + part.query_counts[level]]
            assert (queries < first_of_whole + whole.query_counts[level]).all()
            first, first_of_whole = first + part.canvas_counts[level], first_of_whole + whole.canvas_counts[level]
        canvases += numbers.tolist()
        tiles += rows.tolist()
    assert sorted(canvases) == list(range(len(whole.pixels)))
    assert sorted(tiles) == list(range(len(whole.tile_images)))
