"""The loader: exact resume, replaced files, and the choice of the engine."""

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.loader import BadDataError, MontageLoader, choose_engine, default_threads
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, open_source
from mcl.config import AugmentConfig, ConfigError, DataConfig
from mcl.montage import Geometry, MontageBatch
from tests.dali_pipelines.images import write_animated, write_truncated

GEOMETRY = Geometry(cells=1, ratios=(1, 2), images_per_canvas=(1, 4))
IMAGES = 8
ENGINES = ("stock", "torchvision")

Write = Callable[[Path, int], list[Path]]
Found = list[tuple[int, str, str]]


def make(source: Source, engine: str = "torchvision", on_bad: Any = None, **data: Any) -> MontageLoader:
    plan = Plan(seed=5, size=len(source), images=IMAGES, geometry=GEOMETRY, augment=AugmentConfig())
    config = DataConfig(engine=engine, **data)  # type: ignore[arg-type]
    return MontageLoader(source, plan, config, threads=2, on_bad=on_bad)


def take(loader: MontageLoader, steps: int) -> list[MontageBatch]:
    """Both views of the next steps, in order."""
    return [view for _ in range(steps) for view in next(loader)]


def equal(a: MontageBatch, b: MontageBatch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(MontageBatch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, folder_of: Write) -> Source:
    """20 images: two steps of 8 per epoch."""
    root = tmp_path_factory.mktemp("good")
    folder_of(root, 20)
    return open_source(str(root))


@pytest.fixture(scope="module")
def poisoned(good: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The same 20 files, but for a text file and an animation, found by their headers, and two truncated files."""
    root = tmp_path_factory.mktemp("poisoned") / "root"
    shutil.copytree(good.root, root)
    with Image.open(good.paths[0]) as image:
        (root / "002.jpg").write_text("hello")
        write_truncated(root / "005.jpg", image)
        write_truncated(root / "011.jpg", image)
        (root / "017.jpg").unlink()
        write_animated(root / "017.gif", image)
    return open_source(str(root))


@pytest.fixture(scope="module")
def poisoned_run(poisoned: Source) -> dict[str, tuple[list[MontageBatch], Found, dict[str, Any]]]:
    """Four steps (two epochs) of the poisoned folder by each engine, the files reported, and the state at the end."""
    runs = {}
    for engine in ENGINES:
        found: Found = []
        with make(poisoned, engine, lambda *args: found.append(args), max_bad_fraction=0.25) as loader:  # noqa: B023
            runs[engine] = take(loader, 4), found, loader.state_dict()
    return runs


@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_at_any_step_is_exact_whatever_was_prefetched(good: Source, engine: str) -> None:
    with make(good, engine, prefetch=2) as loader:
        states, batches = [], []
        for _ in range(5):
            states.append(loader.state_dict())
            batches.append(next(loader))
    assert [batch.step for batch, _ in batches] == [0, 1, 2, 3, 4]
    assert [batch.epoch for batch, _ in batches] == [0, 0, 1, 1, 2]
    for step, prefetch in [(1, 3), (4, 1)]:
        with make(good, engine, prefetch=prefetch) as loader:
            if step == 1:
                next(loader)  # what another position has left behind does not matter
            loader.load_state_dict(states[step])
            assert loader.state_dict() == states[step] == {"position": step, "bad": {}}
            resumed = next(loader)
            assert all(equal(a, b) for a, b in zip(resumed, batches[step], strict=True))


def test_a_loader_goes_on_after_it_was_closed(good: Source) -> None:
    with make(good) as loader:
        whole = take(loader, 2)
    with make(good) as loader:
        first = take(loader, 1)
        loader.close()
        assert all(equal(a, b) for a, b in zip(first + take(loader, 1), whole, strict=True))


def test_iterating_yields_pairs_for_ever(good: Source) -> None:
    with make(good) as loader:
        assert iter(loader) is loader
        assert [query.step for _, (query, _) in zip(range(3), loader, strict=False)] == [0, 1, 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_load_the_images_of_the_same_global_step(good: Source, engine: str) -> None:
    """The canvases of level 0 show the images in the order of the epoch, so they can be compared across world sizes."""
    level0 = Geometry(cells=1, ratios=(1,), images_per_canvas=(1,))

    def load(rank: int, world_size: int) -> list[MontageBatch]:
        plan = Plan(
            seed=5,
            size=20,
            images=8 // world_size,
            geometry=level0,
            augment=AugmentConfig(),
            rank=rank,
            world_size=world_size,
        )
        with MontageLoader(good, plan, DataConfig(engine=engine), threads=1) as loader:  # type: ignore[arg-type]
            next(loader)
            return list(next(loader))

    whole, parts = load(0, 1), [load(rank, 2) for rank in range(2)]
    for view in range(2):
        assert torch.equal(whole[view].images, torch.cat([part[view].images for part in parts]))
        assert torch.equal(whole[view].index, torch.cat([part[view].index for part in parts]))
        assert torch.equal(whole[view].crops, torch.cat([part[view].crops for part in parts]))


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_files_are_each_reported_once_with_path_and_reason(
    poisoned: Source, poisoned_run: dict[str, tuple[list[MontageBatch], Found, dict[str, Any]]], engine: str
) -> None:
    _, found, state = poisoned_run[engine]
    assert sorted(i for i, _, _ in found) == sorted(state["bad"]) == [2, 5, 11, 17]
    assert all(path == poisoned.paths[i] and state["bad"][i] == reason for i, path, reason in found)
    reasons = state["bad"]
    assert reasons[2].startswith("not an image")
    assert reasons[17].startswith("format GIF is not supported")
    for i in (5, 11):
        assert ("Failed to decode" if engine == "stock" else "truncated") in reasons[i]
    assert state["position"] == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_files_are_replaced_and_the_others_are_what_they_were(
    good: Source, poisoned_run: dict[str, tuple[list[MontageBatch], Found, dict[str, Any]]], engine: str
) -> None:
    """Held against a run of the same plan whose files are all fine."""
    batches, _, state = poisoned_run[engine]
    with make(good, engine) as loader:
        whole = take(loader, 4)
    replaced = 0
    for a, b in zip(batches, whole, strict=True):
        assert torch.equal(a.sources, b.sources)
        was_bad = torch.from_numpy(np.isin(b.index.numpy(), list(state["bad"])))
        assert torch.equal(a.index[~was_bad], b.index[~was_bad])
        assert not set(a.index.tolist()) & set(state["bad"])
        for row, (k, x1, y1, x2, y2) in enumerate(a.boxes.int().tolist()):
            tiles = [batch.images[k, :, y1:y2, x1:x2] for batch in (a, b)]
            if was_bad[a.sources[row]]:
                replaced += 1
                assert not torch.equal(*tiles)
            else:
                assert torch.equal(*tiles)
                assert torch.equal(a.crops[row], b.crops[row])
    assert replaced > 0


def test_both_engines_choose_the_same_substitutes(
    poisoned_run: dict[str, tuple[list[MontageBatch], Found, dict[str, Any]]],
) -> None:
    for a, b in zip(*(poisoned_run[engine][0] for engine in ENGINES), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.crops, b.crops)


@pytest.mark.parametrize("engine", ENGINES)
def test_bad_files_found_before_are_part_of_the_state(
    poisoned: Source, poisoned_run: dict[str, tuple[list[MontageBatch], Found, dict[str, Any]]], engine: str
) -> None:
    batches, _, state = poisoned_run[engine]
    found: Found = []
    with make(poisoned, engine, lambda *args: found.append(args), max_bad_fraction=0.25) as loader:
        loader.load_state_dict({"position": 2, "bad": {str(i): reason for i, reason in state["bad"].items()}})
        assert all(equal(a, b) for a, b in zip(take(loader, 1), batches[4:6], strict=True))
    assert sorted(i for i, _, _ in found) == [2, 5, 11, 17]


def test_too_many_bad_files_stop_the_run_and_the_first_is_named(poisoned: Source) -> None:
    with pytest.raises(
        BadDataError, match=r"2 of the 20 images .*data\.max_bad_fraction=0\.05.*002\.jpg: not an image"
    ):
        make(poisoned, max_bad_fraction=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_that_only_decoding_reveals_count_too(poisoned: Source, engine: str) -> None:
    with (
        make(poisoned, engine, max_bad_fraction=0.1) as loader,
        pytest.raises(BadDataError, match=r"[34] of the 20 images .*002\.jpg"),
    ):
        take(loader, 4)


def test_a_folder_without_one_good_file_stops_whatever_fraction_is_allowed(tmp_path: Path) -> None:
    for i in range(IMAGES):
        (tmp_path / f"{i}.jpg").write_text("hello")
    with pytest.raises(BadDataError, match=r"8 of the 8 images .*0\.jpg"):
        make(open_source(str(tmp_path)), max_bad_fraction=1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_vanished_is_replaced(tmp_path: Path, folder_of: Write, engine: str) -> None:
    paths = folder_of(tmp_path, IMAGES)
    source = open_source(str(tmp_path))
    paths[3].unlink()
    with make(source, engine, max_bad_fraction=0.2) as loader:
        (query, _) = next(loader)
    assert 3 not in query.index.tolist()
    assert list(loader.bad) == [3]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_kind_of_readable_file_goes_through(
    tmp_path: Path, folder_of: Write, kinds: dict[str, Path], engine: str
) -> None:
    """Gray, CMYK, alpha, palette, 16 bits, one pixel and every container, in one step."""
    for path in kinds.values():
        shutil.copy(path, tmp_path)
    folder_of(tmp_path, 16 - len(kinds))
    source = open_source(str(tmp_path))
    assert source.bad == {}
    plan = Plan(seed=5, size=16, images=16, geometry=GEOMETRY, augment=AugmentConfig())
    with MontageLoader(source, plan, DataConfig(engine=engine), threads=2) as loader:  # type: ignore[arg-type]
        for batch in next(loader):
            assert sorted(batch.index.tolist()) == list(range(16))
            assert batch.images.isfinite().all()
    assert loader.bad == {}


def test_an_error_that_no_file_explains_is_passed_on(good: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    from dali_pipelines import reference

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reference, "make_tile", fail)
    with make(good) as loader, pytest.raises(RuntimeError, match="out of memory"):
        next(loader)
    assert loader.bad == {}


def test_fewer_images_than_a_batch(good: Source) -> None:
    plan = Plan(seed=0, size=20, images=32, geometry=Geometry(cells=1), augment=AugmentConfig())
    with pytest.raises(ConfigError, match=r"data\.root: .* has 20 images, fewer than trainer\.global_batch=32; add"):
        MontageLoader(good, plan, DataConfig())


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("nvidia") else find(name, *rest)
    )


@pytest.mark.parametrize(
    ("asked", "cuda", "expected"),
    [
        ({}, False, ("stock", "cpu", "DALI is installed, no CUDA device")),
        ({}, True, ("stock", "gpu", "DALI is installed")),
        ({"device": "cpu"}, True, ("stock", "cpu", "asked for")),
        ({"device": "gpu"}, True, ("stock", "gpu", "asked for")),
        ({"engine": "torchvision"}, True, ("torchvision", "cpu", "asked for")),
    ],
)
def test_the_engine_and_the_reason_for_it(asked: dict[str, str], cuda: bool, expected: tuple[str, str, str]) -> None:
    assert choose_engine(DataConfig(**asked), cuda) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_dali")
def test_without_dali_the_torchvision_engine_steps_in_and_says_why(good: Source) -> None:
    for cuda in (False, True):
        engine, device, reason = choose_engine(DataConfig(), cuda)
        assert (engine, device) == ("torchvision", "cpu")
        assert "DALI is not installed; pip install" in reason
    with make(good, "auto") as loader:
        assert loader.engine_name == "torchvision"
        assert next(loader)[0].step == 0
    with pytest.raises(ConfigError, match=r"data\.engine: stock needs NVIDIA DALI; pip install"):
        make(good, "stock")
    with pytest.raises(ConfigError, match=r"data\.device: gpu needs"):
        choose_engine(DataConfig(device="gpu"), True)


@pytest.mark.parametrize("asked", [{"device": "gpu"}, {"device": "gpu", "engine": "torchvision"}])
def test_loading_on_a_gpu_that_is_not_there(good: Source, asked: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.device: gpu needs a CUDA device .*use data\.device=cpu"):
        make(good, **({"engine": "auto"} | asked))


def test_threads_are_shared_among_the_processes_of_a_machine() -> None:
    assert default_threads(10_000) == 1
    assert default_threads() >= default_threads(2) >= 1
