"""Order, crops, augmentations and slots are pure functions, compared with their published definitions."""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from dali_pipelines import plan as planning
from dali_pipelines.geometry import Geometry
from dali_pipelines.plan import VIEWS, Augmentation, Plan, philox
from mcl.config import AugmentConfig

SMALL = Geometry(cells=1)
SIZES = np.tile(np.array([[64, 48]], np.int32), (100, 1))


def make(**changes: object) -> Plan:
    values = {"seed": 7, "size": 100, "images": 32, "geometry": SMALL, "augment": AugmentConfig()}
    return Plan(**(values | changes))


def augment(n: int, config: AugmentConfig | None = None, **changes: int) -> Augmentation:
    key = {"seed": 0, "epoch": 0, "view": 0, "level": 0, "blur_scale": 1.0} | changes
    sizes = np.tile(np.array([[500, 375]], np.int32), (n, 1))
    return planning.augmentation(config or AugmentConfig(), samples=np.arange(n), sizes=sizes, **key)


def same(a: Augmentation, b: Augmentation, rows: object = slice(None)) -> bool:
    return all(
        np.array_equal(getattr(a, f.name)[rows], getattr(b, f.name)[rows]) for f in dataclasses.fields(Augmentation)
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic of two samples of equal length n, in units of its 0.1% bound 1.95 sqrt(2 / n)."""
    points = np.sort(np.concatenate([a, b]))
    cdf = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cdf[0] - cdf[1]).max() / (1.95 * np.sqrt(2 / len(a))))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = [np.array([int(w, 16) for w in text.split()], np.uint32) for text in (counter, expected)]
    k0, k1 = (int(w, 16) for w in key.split())
    assert philox(words[0], (k0, k1)).tolist() == words[1].tolist()
    assert philox(np.stack([words[0]] * 3), (k0, k1))[2].tolist() == words[1].tolist()


def test_order_is_a_permutation_of_its_own_for_every_epoch_and_seed() -> None:
    orders = [planning.order(seed, epoch, 1000) for seed, epoch in [(0, 0), (0, 1), (1, 0), (2**62, 0)]]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    agreements = [(a == b).mean() for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 0.02  # chance: 0.001
    assert np.array_equal(orders[0], planning.order(0, 0, 1000))


def test_an_epoch_mixes_the_whole_set() -> None:
    """Neighbours in an epoch are not neighbours among the files, and every part of an epoch has images of every part of
    the set."""
    size, parts = 10_000, 10
    for epoch in range(2):
        order = planning.order(7, epoch, size)
        steps = np.abs(np.diff(order))
        assert (steps == 1).sum() < 15  # chance: 2
        # Two random numbers are a third of the size apart on average; the deviation is 0.7%.
        assert abs(steps.mean() / (size / 3) - 1) < 0.03
        counts = np.histogram2d(np.arange(size) * parts // size, order * parts // size, parts)[0]
        assert abs(counts - size / parts**2).max() < 50  # 5 standard deviations


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("size", [192, 199])
def test_an_epoch_shows_every_sample_once_over_the_ranks_but_for_the_incomplete_last_step(
    world_size: int, size: int
) -> None:
    """Steps of 64 images. The images that are left out differ from epoch to epoch."""
    ranks = [make(images=64 // world_size, rank=rank, world_size=world_size, size=size) for rank in range(world_size)]
    assert {plan.steps_per_epoch for plan in ranks} == {3}
    dropped = []
    for epoch in range(2):
        steps = range(epoch * 3, epoch * 3 + 3)
        seen = [int(i) for step in steps for plan in ranks for i in plan.samples(step, ())]
        assert len(set(seen)) == len(seen) == 192
        assert seen == planning.order(7, epoch, size)[:192].tolist()
        dropped.append(set(range(size)) - set(seen))
    assert dropped[0] != dropped[1] or size == 192


@pytest.mark.parametrize("bad", [(), (3, 50, 99)])
def test_the_samples_of_a_step_and_their_augmentations_do_not_depend_on_the_world_size(bad: tuple[int, ...]) -> None:
    whole = make(images=64).step(2, SIZES[:100], bad)
    parts = [make(images=32, rank=rank, world_size=2).step(2, SIZES, bad) for rank in range(2)]
    assert np.array_equal(whole.index, np.concatenate([part.index for part in parts]))
    assert (whole.epoch, whole.step) == (parts[1].epoch, parts[1].step) == (2, 2)
    for view in range(VIEWS):
        for level in range(4):
            for rank, part in enumerate(parts):
                a, b = whole.augmentations[view][level], part.augmentations[view][level]
                rows = slice(rank * 32, rank * 32 + 32)
                for f in dataclasses.fields(Augmentation):
                    assert np.array_equal(getattr(a, f.name)[rows], getattr(b, f.name))


def test_a_shared_crop_is_that_of_level_0_and_all_else_stays() -> None:
    plan = make()
    own, shared = (
        dataclasses.replace(plan, augment=AugmentConfig(shared_crop=s)).step(1, SIZES) for s in (False, True)
    )
    assert own.augmentations[0][0].window.tolist() == plan.step(1, SIZES).augmentations[0][0].window.tolist()
    for ours, theirs in zip(shared.augmentations, own.augmentations, strict=True):
        for level, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert np.array_equal(a.window, theirs[0].window)
            assert (level == 0) == np.array_equal(a.window, b.window)
            assert same(dataclasses.replace(a, window=b.window), b)
    assert not np.array_equal(shared.augmentations[0][0].window, shared.augmentations[1][0].window)


def test_crop_windows_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    n, width, height = 4000, 500, 375
    config = AugmentConfig()
    image = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(config.crop_scale), list(config.crop_ratio)) for _ in range(n)]
    y, x, h, w = np.array(theirs, np.float64).T
    x1, y1, x2, y2 = augment(n).window.T.astype(np.float64)
    assert x1.min() >= 0
    assert y1.min() >= 0
    assert x2.max() <= width
    assert y2.max() <= height
    ours_w, ours_h = x2 - x1, y2 - y1
    assert ours_w.min() > 0
    assert ours_h.min() > 0
    rng = np.random.default_rng(0)  # spreads the ties of full-width windows, whose offset is always 0
    for a, b in [
        (ours_w * ours_h, w * h),
        (ours_w / ours_h, w / h),
        ((x1 + rng.random(n)) / (width - ours_w + 1), (x + rng.random(n)) / (width - w + 1)),
        ((y1 + rng.random(n)) / (height - ours_h + 1), (y + rng.random(n)) / (height - h + 1)),
    ]:
        assert distance(a, b) < 1


def test_a_crop_window_is_the_first_attempt_that_fits() -> None:
    size = np.array([[100, 50]], np.int32)
    too_wide = [0.999, 0.999, 0.0, 0.0]  # area 5000, aspect 4/3: 82 x 61 does not fit
    fits = [0.25, 0.5, 0.5, 0.999]  # area 2000, aspect 1: 45 x 45, y in 0..5, x in 0..55
    window = planning.crop_windows(np.array([[too_wide, fits, too_wide]]), size, (0.2, 1.0), (3 / 4, 4 / 3))
    assert window.tolist() == [[55, 3, 100, 48]]


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (3000, 2), (1, 1), (1, 7)])
def test_images_too_narrow_for_any_window_get_torchvisions_centred_one(size: tuple[int, int]) -> None:
    width, height = size
    u = np.full((1, 10, 4), 0.999)
    x1, y1, x2, y2 = planning.crop_windows(u, np.array([size], np.int32), (0.9, 1.0), (3 / 4, 4 / 3))[0]
    y, x, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
    assert (x1, y1, x2 - x1, y2 - y1) == (x, y, w, h)


def test_windows_of_tiny_images_lie_inside_and_are_never_empty() -> None:
    sizes = np.array([(w, h) for w in range(1, 9) for h in range(1, 9)], np.int32).repeat(20, axis=0)
    a = planning.augmentation(AugmentConfig(), 0, 0, np.arange(len(sizes)), sizes, 0, 0, 1.0)
    x1, y1, x2, y2 = a.window.T
    assert (x1 >= 0).all()
    assert (y1 >= 0).all()
    assert (x1 < x2).all()
    assert (y1 < y2).all()
    assert (x2 <= sizes[:, 0]).all()
    assert (y2 <= sizes[:, 1]).all()


def test_augmentations_happen_as_often_as_configured() -> None:
    n, config = 20_000, AugmentConfig()
    for view in range(VIEWS):
        a = augment(n, config, view=view)
        for drawn, p in [
            (a.flip, config.flip),
            (a.jitter, config.jitter),
            (a.gray, config.gray),
            (a.sigma > 0, config.blur[view]),
            (a.solarize, config.solarize[view]),
        ]:
            assert abs(drawn.mean() - p) <= 4 * np.sqrt(p * (1 - p) / n)


def test_augmentation_parameters_fill_their_ranges_evenly() -> None:
    n, config = 20_000, AugmentConfig()
    a = augment(n, config)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    uniform = (np.arange(n) + 0.5) / n
    for factor, (low, high) in zip(a.factors.T, ranges, strict=True):
        assert low <= factor.min() < factor.max() <= high
        assert distance((factor - low) / (high - low), uniform) < 1
    assert distance((a.sigma - 0.1) / 1.9, uniform) < 1
    permutations, counts = np.unique(a.order, axis=0, return_counts=True)
    assert len(permutations) == 24
    assert abs(counts / n - 1 / 24).max() < 4 * np.sqrt(1 / 24 / n)


def test_a_factor_is_never_negative() -> None:
    factors = augment(2000, AugmentConfig(brightness=3.0)).factors[:, 0]
    assert 0 <= factors.min() < 0.05
    assert 3.9 < factors.max() <= 4


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 2**40}, {"epoch": 1}, {"view": 1}, {"level": 1}])
def test_seed_epoch_view_and_level_each_change_everything_independently(change: dict[str, int]) -> None:
    n = 4000
    config = AugmentConfig(blur=(1.0, 1.0))
    a, b = augment(n, config), augment(n, config, **change)
    for x, y in [(a.factors[:, i], b.factors[:, i]) for i in range(4)] + [
        (a.sigma, b.sigma),
        (a.flip, b.flip),
        (a.window[:, 0], b.window[:, 0]),
    ]:
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n)
    assert same(a, augment(n, config))


def test_blur_is_scaled_with_the_tile_unless_the_sampling_is_the_released_one() -> None:
    config = AugmentConfig(blur=(1.0, 1.0), blur_sigma=(1.0, 2.0))
    direct = make(augment=config).step(0, SIZES).augmentations[0]
    released = make(augment=config, tile_sampling="released").step(0, SIZES).augmentations[0]
    for ratio, a, b in zip(SMALL.ratios, direct, released, strict=True):
        np.testing.assert_allclose(a.sigma * ratio, b.sigma, rtol=1e-6)
        assert b.sigma.min() >= 1
        assert b.sigma.max() <= 2


def test_slots_show_every_image_equally_often_and_are_shuffled_but_for_level_0() -> None:
    first, second = make(size=200).step(0, SIZES.repeat(2, 0)), make(size=200).step(1, SIZES.repeat(2, 0))
    other = make(size=200, images=32, rank=1, world_size=2).step(0, SIZES.repeat(2, 0))
    for view in range(VIEWS):
        assert first.tile_images[view][0].tolist() == list(range(32))
        for level, times in [(1, 1), (2, 1), (3, 2)]:
            slots = first.tile_images[view][level]
            assert np.bincount(slots, minlength=32).tolist() == [times] * 32
            for another in (second.tile_images[view][level], other.tile_images[view][level]):
                assert (slots == another).mean() < 0.3
    for level in (1, 2, 3):
        assert (first.tile_images[0][level] == first.tile_images[1][level]).mean() < 0.3


def test_a_scheduled_epoch_is_that_of_a_plan_that_has_its_cells_all_along() -> None:
    """Only the size of canvases changes, and neither samples nor crops, slots or colours."""
    scheduled = make(geometry=dataclasses.replace(SMALL, schedule=((1, 3), (2, 2))))
    per_epoch = scheduled.steps_per_epoch
    for epoch, cells in enumerate((1, 3, 2, 2)):
        plain = make(geometry=dataclasses.replace(SMALL, cells=cells))
        for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1):
            a, b = scheduled.step(step, SIZES), plain.step(step, SIZES)
            assert a.geometry == b.geometry == plain.geometry
            assert (a.epoch, a.step) == (b.epoch, b.step) == (epoch, step)
            assert np.array_equal(a.index, b.index)
            for view in range(VIEWS):
                assert all(map(np.array_equal, a.tile_images[view], b.tile_images[view]))
                assert all(map(same, a.augmentations[view], b.augmentations[view]))


def test_substitutes_are_deterministic_and_never_bad() -> None:
    bad = set(range(0, 100, 2))
    drawn = [planning.substitute(0, epoch, position, 100, bad) for epoch in range(3) for position in range(50)]
    assert drawn == [planning.substitute(0, epoch, position, 100, bad) for epoch in range(3) for position in range(50)]
    assert not bad & set(drawn)
    assert len(set(drawn)) > 35
    assert planning.substitute(0, 0, 0, 1000, set(range(1000)) - {17}) == 17


def test_a_bad_sample_leaves_the_others_alone() -> None:
    plan = make()
    whole = plan.step(1, SIZES)
    bad = {int(whole.index[5]), int(whole.index[20])}
    patched = plan.step(1, SIZES, bad)
    others = np.setdiff1d(np.arange(32), [5, 20])
    assert np.array_equal(whole.index[others], patched.index[others])
    assert not bad & set(patched.index.tolist())
    for view in range(VIEWS):
        for level in range(4):
            assert same(whole.augmentations[view][level], patched.augmentations[view][level], others)
            assert np.array_equal(whole.tile_images[view][level], patched.tile_images[view][level])


def test_one_more_bad_sample_does_not_change_the_substitutes_of_the_others() -> None:
    plan = make()
    index = plan.samples(0, ())
    one = plan.samples(0, {int(index[3])})
    two = plan.samples(0, {int(index[3]), int(index[9])} - {int(one[3])})
    assert one[3] == two[3]


def test_the_size_of_a_sample_changes_its_own_window_only() -> None:
    plan = make()
    whole = plan.step(1, SIZES)
    sizes = SIZES.copy()
    sizes[whole.index[5]] = 640, 200
    changed = plan.step(1, sizes)
    others = np.setdiff1d(np.arange(32), [5])
    for view in range(VIEWS):
        for level in range(4):
            a, b = whole.augmentations[view][level], changed.augmentations[view][level]
            assert same(a, b, others)
            assert same(a, dataclasses.replace(b, window=a.window))
            assert not np.array_equal(a.window[5], b.window[5])
