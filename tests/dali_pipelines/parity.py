"""Measures the difference between the DALI engines and Pillow and torchvision, by operation, on photographs.

``python -m tests.dali_pipelines.parity`` prints the tables of ``dali_pipelines/README.md``.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor

from dali_pipelines import pipelines, plan, reference, stock_ops
from dali_pipelines.geometry import Geometry
from dali_pipelines.plan import Augmentation
from dali_pipelines.source import decode
from mcl.config import AugmentConfig
from tests.dali_pipelines.images import choose

GEOMETRY = Geometry()
SIZES = tuple(GEOMETRY.tile(level) for level in range(GEOMETRY.levels))
README = Path(pipelines.__file__).parent / "README.md"

Oracle = Callable[[Tensor, Augmentation, int], Tensor]


@dataclass(frozen=True)
class Row:
    """Absolute difference from the oracle in 8-bit levels at every tile size: (mean, maximum)."""

    operation: str
    oracle: str
    errors: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Operation:
    """A single operation: the configuration that enables only it, and the expected result."""

    oracle: str
    config: AugmentConfig
    expected: Oracle


def draw(config: AugmentConfig, sizes: np.ndarray, level: int) -> Augmentation:
    """One augmentation per image, of the query view."""
    return plan.augmentation(config, 0, 0, np.arange(len(sizes)), sizes, 0, level, 1 / GEOMETRY.ratios[level])


def only(**on: Any) -> AugmentConfig:
    """A configuration that enables only the named augmentations."""
    off: dict[str, Any] = {"flip": 0, "jitter": 0, "gray": 0, "blur": (0, 0), "solarize": (0, 0)}
    factors = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    return AugmentConfig(**(off | factors | on))


def _gray(tile: Tensor, a: Augmentation, i: int) -> Tensor:
    picture = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()).convert("L")
    return torch.from_numpy(np.array(picture)).expand(3, -1, -1)


def _blur(tile: Tensor, a: Augmentation, i: int) -> Tensor:
    sigma = float(a.sigma[i])
    side = 2 * int(np.ceil(3 * sigma)) + 1
    return F.gaussian_blur(tile, [side, side], [sigma, sigma])


OPERATIONS = {
    "brightness": Operation(
        "torchvision",
        only(jitter=1, brightness=0.4),
        lambda tile, a, i: F.adjust_brightness(tile, float(a.factors[i, 0])),
    ),
    "contrast": Operation(
        "torchvision", only(jitter=1, contrast=0.4), lambda tile, a, i: F.adjust_contrast(tile, float(a.factors[i, 1]))
    ),
    "saturation": Operation(
        "torchvision",
        only(jitter=1, saturation=0.2),
        lambda tile, a, i: F.adjust_saturation(tile, float(a.factors[i, 2])),
    ),
    "hue": Operation(
        "torchvision", only(jitter=1, hue=0.1), lambda tile, a, i: F.adjust_hue(tile, float(a.factors[i, 3]))
    ),
    "grayscale": Operation("Pillow", only(gray=1), _gray),
    "blur": Operation("torchvision", only(blur=(1, 1)), _blur),
    "solarise": Operation("torchvision", only(solarize=(1, 1)), lambda tile, a, i: F.solarize(tile, 128)),
}


@dataclass(frozen=True)
class Engine:
    """Results of an engine, on the CPU."""

    operations: Callable[[Sequence[Tensor], Augmentation], list[Tensor]]
    """Applies colour operations, blur and solarising to n square tiles (3, H, H) uint8 of any sizes."""
    tiles: Callable[..., list[list[Tensor]]]
    """Makes whole tiles of every level: images, augmentation per level, geometry, released -> [level][image] uint8."""


def measure(paths: Sequence[str], engine: Engine) -> list[Row]:
    """Rows of the table, measured on the given photographs."""
    images = [read(path) for path in paths]
    sizes = np.array([image.shape[:0:-1] for image in images], np.int32)
    return _single(images, sizes, engine) + _composed(images, sizes, engine)


def read(path: str | Path) -> Tensor:
    """(3, H, W) uint8 of a file."""
    return torch.from_numpy(decode(Path(path).read_bytes())).permute(2, 0, 1)


def stock_operations(tiles: Sequence[Tensor], a: Augmentation) -> list[Tensor]:
    def graph(nodes: Any) -> stock_ops.Node:
        tile = fn.reshape(next(nodes), layout="HWC")
        recipe = stock_ops.recipe_of(nodes)
        return stock_ops.blur_and_solarize(stock_ops.colour(tile, recipe), recipe)

    return _run(graph, [_pixels(tiles), *stock_ops.recipe_arrays(a)], len(tiles))[0]


def stock_tiles(
    images: Sequence[Tensor], levels: Sequence[Augmentation], geometry: Geometry, released: bool = False
) -> list[list[Tensor]]:
    n = len(images)

    def graph(nodes: Any) -> tuple[stock_ops.Node, ...]:
        image, canvas = fn.reshape(next(nodes), layout="HWC"), next(nodes)
        return tuple(
            pipelines.make_tile(image, stock_ops.recipe_of(nodes), canvas, ratio, released)
            for ratio in geometry.ratios[: len(levels)]
        )

    feed = [_pixels(images), np.full(n, geometry.canvas, np.int32)]
    for a in levels:
        feed += stock_ops.recipe_arrays(a)
    return _run(graph, feed, n)


def fused_operations(tiles: Sequence[Tensor], a: Augmentation) -> list[Tensor]:
    made: dict[int, Tensor] = {}
    for size in {tile.shape[-1] for tile in tiles}:
        rows = [i for i, tile in enumerate(tiles) if tile.shape[-1] == size]
        mine = {name: value[rows] for name, value in vars(a).items()}
        mine |= {"window": np.array([[0, 0, size, size]] * len(rows), np.int32), "flip": np.zeros(len(rows), bool)}
        ratio = 1 if size % 32 == 0 else next(r for r in (2, 4, 8) if size * r % 32 == 0)
        whole = Geometry(cells=size * ratio // 32, ratios=(1,), images_per_canvas=(1,))
        result = _fused_level([tiles[i] for i in rows], Augmentation(**mine), whole, ratio, False)
        made |= dict(zip(rows, result, strict=True))
    return [made[i] for i in range(len(tiles))]


def fused_tiles(
    images: Sequence[Tensor], levels: Sequence[Augmentation], geometry: Geometry, released: bool = False
) -> list[list[Tensor]]:
    return [_fused_level(images, a, geometry, geometry.ratios[level], released) for level, a in enumerate(levels)]


def _fused_level(
    images: Sequence[Tensor], a: Augmentation, geometry: Geometry, ratio: int, released: bool
) -> list[Tensor]:
    """The tiles of one level; every image gets its own canvas, filled with the same tile."""
    pipelines.load_plugin()
    n, size = len(images), geometry.canvas // ratio
    slots = np.arange(n * ratio * ratio, dtype=np.int32).reshape(n, -1)
    feed = [_pixels(images), pipelines.recipe_rows(a), slots, np.full(n, geometry.cells, np.int32)]

    def graph(nodes: Any) -> stock_ops.Node:
        image, recipes, slot, cells = nodes
        arguments = {"views": 1, "ratios": [ratio], "images_per_canvas": [1], "released": released}
        unchanged = {"dtype": types.UINT8, "mean": [0, 0, 0], "std": [1, 1, 1]}
        return fn.mcl.montage(image, recipes, slot, cells=cells, **arguments, **unchanged)

    return [canvas[:, :size, :size] for canvas in _run(graph, feed, n)[0]]


ENGINES = {"fused": Engine(fused_operations, fused_tiles), "stock": Engine(stock_operations, stock_tiles)}


def _pixels(images: Sequence[Tensor]) -> Any:
    return [image.permute(1, 2, 0).contiguous().numpy() for image in images]


def _run(graph: Callable[[Any], Any], feed: list[Any], n: int) -> list[list[Tensor]]:
    @pipeline_def(batch_size=n, num_threads=2, device_id=None, prefetch_queue_depth=1, enable_conditionals=True)
    def pipeline() -> Any:
        return graph(iter(fn.external_source(source=lambda: feed, num_outputs=len(feed), batch=True)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The external source node")  # most graphs here do not use all inputs
        outputs = pipeline().run()
    return [[torch.from_numpy(np.array(output.at(i))).permute(2, 0, 1) for i in range(n)] for output in outputs]


def _error(got: Sequence[Tensor], expected: Sequence[Tensor], border: bool | None = None) -> tuple[float, float]:
    """Mean and maximum over images of the same size, of their outermost pixels if `border`, otherwise of all others."""
    difference = (torch.stack(list(got)).int() - torch.stack(list(expected)).int()).abs()
    if border is not None:
        outside = torch.ones(difference.shape[-2:], dtype=torch.bool)
        outside[1:-1, 1:-1] = False
        difference = difference[..., outside if border else ~outside]
    return difference.double().mean().item(), float(difference.max())


def _single(images: list[Tensor], sizes: np.ndarray, engine: Engine) -> list[Row]:
    """Measures every operation alone, in one batch of all operations and sizes."""
    tiles: list[Tensor] = []
    drawn: list[Augmentation] = []
    expected: list[Tensor] = []
    for operation in OPERATIONS.values():
        for level, size in enumerate(SIZES):
            a = draw(operation.config, sizes, level)
            drawn.append(a)
            level_tiles = [reference.crop_and_resize(x, a.window[i], False, size) for i, x in enumerate(images)]
            tiles += level_tiles
            expected += [operation.expected(tile, a, i) for i, tile in enumerate(level_tiles)]
    names = vars(drawn[0])
    together = Augmentation(**{name: np.concatenate([getattr(a, name) for a in drawn]) for name in names})
    got = engine.operations(tiles, together)
    n = len(images)
    parts = iter(range(0, len(got), n))
    rows = []
    for name, operation in OPERATIONS.items():
        errors = []
        for _ in SIZES:
            first = next(parts)
            errors.append(_error(got[first : first + n], expected[first : first + n]))
        rows.append(Row(name, operation.oracle, tuple(errors)))
    return rows


def _composed(images: list[Tensor], sizes: np.ndarray, engine: Engine) -> list[Row]:
    """Measures crop, resize and flip alone, then all operations together."""
    often: dict[str, Any] = {"blur": (0.5, 0.5), "solarize": (0.2, 0.2)}
    pairs = []  # [configuration][level] (got, expected)
    for config in (only(flip=0.5), AugmentConfig(hue=0, **often), AugmentConfig(**often)):
        levels = [draw(config, sizes, level) for level in range(GEOMETRY.levels)]
        expected = [
            [reference.make_tile(image, a, i, GEOMETRY, level, False) for i, image in enumerate(images)]
            for level, a in enumerate(levels)
        ]
        pairs.append(list(zip(engine.tiles(images, levels, GEOMETRY), expected, strict=True)))
    crop, no_hue, everything = pairs
    return [
        Row("crop, resize, flip: inside", "Pillow", tuple(_error(*pair, border=False) for pair in crop)),
        Row("crop, resize, flip: outermost pixels", "Pillow", tuple(_error(*pair, border=True) for pair in crop)),
        Row("everything but hue", "torchvision engine", tuple(_error(*pair) for pair in no_hue)),
        Row("everything", "torchvision engine", tuple(_error(*pair) for pair in everything)),
    ]


def table(engine: str, rows: Sequence[Row]) -> str:
    """The rows of an engine as Markdown, rounded up by 5% and, unless exact, to at least 0.01 and 1 levels.

    Rounding up keeps the test that compares the table with measurements from failing on another processor.
    """
    lines = [
        f"| {engine} | oracle | " + " | ".join(f"{size} px" for size in SIZES) + " |",
        "|" + "---|" * (2 + len(SIZES)),
    ]
    for row in rows:
        exact = max(most for _, most in row.errors) == 0
        bounds = row.errors if exact else [(max(1.05 * mean, 0.01), max(1.05 * most, 1)) for mean, most in row.errors]
        cells = [f"{np.ceil(mean * 100) / 100:.2f} / {np.ceil(most - 0.1) + 0:.0f}" for mean, most in bounds]
        lines.append(f"| {row.operation} | {row.oracle} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stated(text: str, engine: str) -> dict[str, tuple[tuple[float, float], ...]]:
    """(mean, maximum) per size, by operation, from an engine's table in Markdown."""
    found = {}
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1:2] == ["oracle"]:
            inside = cells[0] == engine
        elif inside and len(cells) == 2 + len(SIZES) and re.fullmatch(r"[\d.]+ / \d+", cells[2]):
            found[cells[0]] = tuple((float(mean), float(most)) for mean, most in (c.split(" / ") for c in cells[2:]))
    return found


if __name__ == "__main__":
    pictures = choose(Path(__file__).parents[2] / "data" / "photos")
    for name, engine in ENGINES.items():
        print(table(name, measure(pictures, engine)), end="\n\n")
