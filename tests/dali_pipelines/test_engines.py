"""Engines compared with Pillow and torchvision, by operation, and the batches that they make."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from dali_pipelines import pipelines, reference, stock_ops
from dali_pipelines import plan as planning
from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import assemble, tile_boxes
from dali_pipelines.loader import MontageLoader
from dali_pipelines.plan import VIEWS, Plan
from dali_pipelines.source import Source, open_source
from mcl.config import AugmentConfig, DataConfig
from tests.dali_pipelines import parity
from tests.dali_pipelines.images import write_corrupt

GEOMETRY = Geometry(cells=1)  # canvases of 32 px, tiles of 32, 16, 8 and 4 px
IMAGES = 32
ENGINES = ("fused", "stock", "torchvision")
BYTES = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""Normalisation that does not change 8-bit levels."""


@pytest.fixture(scope="module")
def rows(pictures: list[str]) -> dict[str, dict[str, parity.Row]]:
    """Measured rows: [engine][operation]."""
    measured = {name: parity.measure(pictures, engine) for name, engine in parity.ENGINES.items()}
    return {name: {row.operation: row for row in mine} for name, mine in measured.items()}


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source(str(photos / "val"))


def make_plan(source: Source, augment: AugmentConfig, tile_sampling: str = "direct") -> Plan:
    return Plan(
        seed=3,
        size=len(source),
        images=IMAGES,
        geometry=GEOMETRY,
        augment=augment,
        tile_sampling=tile_sampling,  # type: ignore[arg-type]
    )


def first(source: Source, plan: Plan, engine: str, **data: object) -> tuple[MontageBatch, MontageBatch]:
    config = DataConfig(engine=engine, tile_sampling=plan.tile_sampling, prefetch=1, **data)  # type: ignore[arg-type]
    with MontageLoader(source, plan, config, threads=2) as loader:
        return next(loader)


@pytest.fixture(scope="module")
def batches(source: Source) -> dict[str, tuple[MontageBatch, MontageBatch]]:
    """The first step of the default augmentation (without hue, in 8-bit levels), by every engine."""
    plan = make_plan(source, AugmentConfig(hue=0, **BYTES))  # type: ignore[arg-type]
    return {engine: first(source, plan, engine) for engine in ENGINES}


@pytest.mark.parametrize("engine", parity.ENGINES)
def test_every_operation_is_as_near_to_its_oracle_as_the_readme_says(
    rows: dict[str, dict[str, parity.Row]], engine: str
) -> None:
    stated = parity.stated(parity.README.read_text(), engine)
    assert stated.keys() == rows[engine].keys()
    for name, row in rows[engine].items():
        for (mean, most), (stated_mean, stated_most) in zip(row.errors, stated[name], strict=True):
            assert mean <= stated_mean, name
            assert most <= stated_most, name
            assert stated_mean <= 1.25 * mean + 0.05, f"{name}: the README is too pessimistic"
            assert stated_most <= 1.25 * most + 1, f"{name}: the README is too pessimistic"


def test_every_fused_operation_is_within_three_levels_of_its_oracle_and_colours_nearly_exact(
    rows: dict[str, dict[str, parity.Row]],
) -> None:
    for row in rows["fused"].values():
        assert max(mean for mean, _ in row.errors) <= 1, row.operation
        if not row.operation.startswith("everything"):
            assert max(most for _, most in row.errors) <= 3, row.operation
    for name in ("brightness", "contrast", "saturation", "hue", "blur", "solarise"):
        assert max(mean for mean, _ in rows["fused"][name].errors) <= 0.02, name
        assert max(most for _, most in rows["fused"][name].errors) <= 1, name
    assert rows["fused"]["solarise"].errors == ((0.0, 0.0),) * 4


def test_exact_operations_of_stock_are_within_one_level(rows: dict[str, dict[str, parity.Row]]) -> None:
    for name in ("brightness", "contrast", "saturation", "grayscale", "blur", "solarise", "crop, resize, flip: inside"):
        assert max(most for _, most in rows["stock"][name].errors) <= 1, name
    assert rows["stock"]["solarise"].errors == ((0.0, 0.0),) * 4


def test_resizing_by_stock_differs_at_the_border_only_where_images_shrink(
    rows: dict[str, dict[str, parity.Row]],
) -> None:
    errors = rows["stock"]["crop, resize, flip: outermost pixels"].errors
    assert max(mean for mean, _ in errors) < 2
    assert max(most for _, most in errors) < 25


@pytest.mark.parametrize("engine", parity.ENGINES.values(), ids=parity.ENGINES)
def test_contrast_pivots_on_the_mean_gray_of_the_image(engine: parity.Engine) -> None:
    """A dark image stays dark. If contrast were relative to mid-gray, factors above 1 would turn it black."""
    generator = torch.Generator().manual_seed(0)
    dark = torch.randint(10, 50, (3, 48, 48), generator=generator, dtype=torch.uint8)
    dark[0] += 30
    factors = (0.6, 1.0, 1.4)
    a = parity.draw(parity.only(jitter=1, contrast=0.4), np.array([[48, 48]] * 3, np.int32), 0)
    a = dataclasses.replace(a, factors=np.array([[1, f, 1, 0] for f in factors], np.float32))
    for factor, got in zip(factors, engine.operations([dark] * 3, a), strict=True):
        assert (got.int() - F.adjust_contrast(dark, factor).int()).abs().max() <= 1
        gray = F.rgb_to_grayscale(dark).float().mean()
        assert abs(F.rgb_to_grayscale(got).float().mean() - gray) < 1
        expected = gray + factor * (dark.float() - gray)
        assert (got - expected).abs().max() <= 1.5


@pytest.mark.parametrize("engine", parity.ENGINES.values(), ids=parity.ENGINES)
def test_colour_operations_come_in_the_order_of_the_plan(engine: parity.Engine) -> None:
    tile = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    orders = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [2, 1, 3, 0], [3, 2, 1, 0]])
    a = parity.draw(parity.only(jitter=1), np.array([[32, 32]] * 4, np.int32), 0)
    a = dataclasses.replace(a, order=orders, factors=np.array([[1.4, 0.6, 1.2, 0]] * 4, np.float32))
    got = engine.operations([tile] * 4, a)
    operations = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    for order, result in zip(orders, got, strict=True):
        expected = tile
        for operation in order:
            if operation < 3:
                expected = operations[operation](expected, float(a.factors[0, operation]))
        # Torchvision truncates after each of the three operations.
        assert (result.int() - expected.int()).abs().max() <= 4
    assert (got[0].int() - got[1].int()).abs().max() > 8


@pytest.mark.parametrize("engine", parity.ENGINES.values(), ids=parity.ENGINES)
def test_jitter_of_neutral_factors_changes_nothing(engine: parity.Engine) -> None:
    tile = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    a = parity.draw(parity.only(jitter=1), np.array([[32, 32]], np.int32), 0)
    assert torch.equal(engine.operations([tile], a)[0], tile)


def test_the_torchvision_engine_is_within_one_level_of_the_oracles(pictures: list[str]) -> None:
    images = [parity.read(path) for path in pictures]
    sizes = np.array([image.shape[:0:-1] for image in images], np.int32)
    for name, operation in parity.OPERATIONS.items():
        a = parity.draw(operation.config, sizes, 3)
        for i, image in enumerate(images):
            tile = reference.crop_and_resize(image, a.window[i], False, 28)
            got = reference.blur_and_solarize(reference.colour(tile, a, i), a, i)
            assert (got.int() - operation.expected(tile, a, i).int()).abs().max() <= 1, name


@pytest.mark.parametrize(
    ("engine", "bounds"),
    [
        ("fused", (0.1, 0.2, 0.4, 0.6)),  # measured: 0.07, 0.15, 0.31 and 0.44
        # Measured: 1.37, 1.51, 1.83 and 3.07; in tiles of 4 px three quarters of the pixels are at the border.
        ("stock", (1.7, 1.9, 2.3, 3.8)),
    ],
)
def test_all_engines_make_nearly_the_same_canvases(
    batches: dict[str, tuple[MontageBatch, MontageBatch]], engine: str, bounds: tuple[float, ...]
) -> None:
    for fast, slow in zip(batches[engine], batches["torchvision"], strict=True):
        difference = (fast.pixels - slow.pixels).abs()
        firsts = np.cumsum((0, *fast.canvas_counts))
        means = [difference[a:b].mean().item() for a, b in itertools.pairwise(firsts)]  # in 8-bit levels
        assert all(mean <= bound for mean, bound in zip(means, bounds, strict=True)), means
        for f in dataclasses.fields(MontageBatch):
            if f.name != "pixels":
                a, b = getattr(fast, f.name), getattr(slow, f.name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, f.name


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_keep_their_contract(
    batches: dict[str, tuple[MontageBatch, MontageBatch]], source: Source, engine: str
) -> None:
    plan = make_plan(source, AugmentConfig(hue=0, **BYTES))  # type: ignore[arg-type]
    step = plan.step(0, source.sizes)
    tiles = sum(GEOMETRY.tiles(IMAGES))
    for view, batch in enumerate(batches[engine]):
        assert batch.pixels.shape == (32 + 8 + 2 + 1, 3, 32, 32)
        assert batch.pixels.dtype == torch.float32
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        assert batch.pixels.min() >= 0
        assert 200 < batch.pixels.max() <= 255
        assert batch.index.tolist() == step.index.tolist()
        assert batch.labels.tolist() == source.labels[step.index].tolist()
        assert (batch.labels.dtype, batch.index.dtype, batch.tile_images.dtype) == (torch.int64,) * 3
        assert batch.tile_images.tolist() == np.concatenate(step.tile_images[view]).tolist()
        assert torch.equal(batch.boxes, tile_boxes(GEOMETRY, IMAGES))
        assert batch.crops.shape == (tiles, 5)
        assert batch.crops.dtype == batch.boxes.dtype == torch.float32
        assert batch.crops.min() >= 0
        assert batch.crops.max() <= 1
        for level in range(4):
            rows = batch.tiles(level)
            a, shown = step.augmentations[view][level], batch.tile_images[rows].numpy()
            sizes = np.tile(source.sizes[step.index], 2)[shown]
            np.testing.assert_allclose(batch.crops[rows, :4].numpy() * sizes, a.window[shown], atol=1e-3)
            assert batch.crops[rows, 4].tolist() == a.flip[shown].tolist()
        assert batch.canvas_counts == batch.query_counts == (32, 8, 2, 1)
        assert (batch.ratios, batch.cells, batch.epoch, batch.step) == ((1, 2, 4, 8), 1, 0, 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_images_are_normalised_and_may_be_half_precision(
    batches: dict[str, tuple[MontageBatch, MontageBatch]], source: Source, engine: str
) -> None:
    config = AugmentConfig(hue=0)
    views = first(source, make_plan(source, config), engine, dtype="float16")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (config.mean, config.std))
    for batch, levels in zip(views, batches[engine], strict=True):
        assert batch.pixels.dtype == torch.float16
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        expected = (levels.pixels / 255 - mean) / std
        torch.testing.assert_close(batch.pixels.float(), expected, rtol=1e-3, atol=2e-3)


def dali_tiles(source: Source, plan: Plan, view: int, engine: str) -> list[torch.Tensor]:
    """Tiles of the first step, made by an engine without the montage: [level] (N, 3, tile, tile) uint8."""
    step = plan.step(0, source.sizes)
    images = [parity.read(source.names[i]) for i in step.index]
    tiles = parity.ENGINES[engine].tiles(images, step.augmentations[view], GEOMETRY)
    return [torch.stack(level) for level in tiles]


@pytest.mark.parametrize("engine", parity.ENGINES)
def test_dali_tiles_canvases_exactly(
    batches: dict[str, tuple[MontageBatch, MontageBatch]], source: Source, engine: str
) -> None:
    plan = make_plan(source, AugmentConfig(hue=0, **BYTES))  # type: ignore[arg-type]
    step = plan.step(0, source.sizes)
    for view in range(VIEWS):
        tiles = dali_tiles(source, plan, view, engine)
        batch = batches[engine][view]
        firsts = np.cumsum((0, *batch.canvas_counts))
        for level, ratio in enumerate(GEOMETRY.ratios):
            slots = torch.from_numpy(step.tile_images[view][level])
            expected = assemble(tiles[level][slots], ratio)
            assert torch.equal(batch.pixels[firsts[level] : firsts[level + 1]], expected.float()), ratio


def test_assembling_lays_tiles_out_row_major_where_the_boxes_are() -> None:
    for level, ratio in enumerate(GEOMETRY.ratios):
        side, canvases = GEOMETRY.tile(level), GEOMETRY.canvases(IMAGES)[level]
        count = canvases * ratio * ratio
        tiles = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, side, side)
        canvas = assemble(tiles, ratio)
        rows = slice(*np.cumsum((0, *GEOMETRY.tiles(IMAGES)))[level : level + 2])
        boxes = tile_boxes(GEOMETRY, IMAGES)[rows].int()
        boxes[:, 0] -= int(boxes[0, 0])
        for tile, (k, x1, y1, x2, y2) in enumerate(boxes.tolist()):
            assert (canvas[k, :, y1:y2, x1:x2] == tile).all()


@pytest.mark.parametrize("engine", parity.ENGINES.values(), ids=parity.ENGINES)
def test_released_sampling_is_augmenting_at_canvas_size_then_every_rth_pixel(
    source: Source, engine: parity.Engine
) -> None:
    plan = make_plan(source, AugmentConfig(), "released")
    step = plan.step(0, source.sizes)
    images = [parity.read(source.names[i]) for i in step.index]
    levels = step.augmentations[0]
    whole = Geometry(cells=1, ratios=(1,), images_per_canvas=(1,))
    got = engine.tiles(images, levels, GEOMETRY, released=True)
    for level, ratio in enumerate(GEOMETRY.ratios):
        canvases = engine.tiles(images, levels[level : level + 1], whole)[0]
        for tile, canvas in zip(got[level], canvases, strict=True):
            assert torch.equal(tile, canvas[:, ::ratio, ::ratio])


@pytest.mark.parametrize(("engine", "bound"), [("fused", 0.3), ("stock", 3.0)])
def test_released_sampling_by_all_engines(source: Source, engine: str, bound: float) -> None:
    plan = make_plan(source, AugmentConfig(hue=0, **BYTES), "released")  # type: ignore[arg-type]
    for fast, slow in zip(*(first(source, plan, name) for name in (engine, "torchvision")), strict=True):
        assert (fast.pixels - slow.pixels).abs().mean() < bound


@pytest.mark.parametrize("engine", parity.ENGINES.values(), ids=parity.ENGINES)
@pytest.mark.parametrize("sampling", ["direct", "released"])
def test_blur_reaches_the_tiles_with_the_sigma_of_the_plan(
    source: Source, sampling: str, engine: parity.Engine
) -> None:
    """A single bright pixel spreads with the plan's sigma, at every level."""
    plan = make_plan(source, AugmentConfig(blur=(1, 1), blur_sigma=(1.5, 2.0)), sampling)
    for level, a in enumerate(plan.step(0, source.sizes).augmentations[0]):
        ratio = GEOMETRY.ratios[level] if sampling == "direct" else 1
        assert 1.5 / ratio <= a.sigma.min() <= a.sigma.max() <= 2.0 / ratio
        point = torch.zeros(3, 48, 48, dtype=torch.uint8)
        point[:, 20, 20] = 255
        quiet = dataclasses.replace(a, jitter=a.jitter & False, gray=a.gray & False, solarize=a.solarize & False)
        one = planning.Augmentation(**{name: value[:1] for name, value in vars(quiet).items()})
        peak = int(engine.operations([point], one)[0].max())
        x = np.arange(-20, 21)
        kernel = np.exp(-(x**2) / (2 * float(a.sigma[0]) ** 2))
        assert abs(peak - 255 / kernel.sum() ** 2) <= 1 + 0.02 * peak


def test_the_pipeline_takes_as_many_inputs_as_it_is_fed(source: Source) -> None:
    plan = make_plan(source, AugmentConfig())
    step = plan.step(0, source.sizes)
    assert len(pipelines.stock_feed(step)) == 1 + VIEWS * GEOMETRY.levels * stock_ops.RECIPE_NODES
    assert len(pipelines.fused_feed(step)) == 3


def test_both_engines_decode_every_kind_of_file_to_the_same_pixels(
    kinds: dict[str, Path], tmp_path: Path, picture: Image.Image
) -> None:
    write_corrupt(tmp_path / "corrupt.jpg", picture)
    for name, path in (kinds | {"corrupt.jpg": tmp_path / "corrupt.jpg"}).items():
        output, shape = pipelines.decode_pipeline(path.read_bytes()).run()
        got, expected = np.array(output.at(0)), parity.read(path).permute(1, 2, 0).numpy()
        assert shape.at(0).tolist() == list(got.shape), name
        assert got.shape == expected.shape == ((1, 1, 3) if name == "one_pixel.jpg" else (48, 64, 3)), name
        assert np.abs(got.astype(int) - expected).max() <= 1, name
