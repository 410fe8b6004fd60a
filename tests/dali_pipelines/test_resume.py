"""Resuming at any step, with every source and engine, any number of processes, and across changes of the canvas."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dali_pipelines import plan as planning
from dali_pipelines.geometry import Geometry
from dali_pipelines.loader import DaliEngine
from dali_pipelines.reference import TorchvisionEngine
from dali_pipelines.source import Source
from tests.dali_pipelines.loading import (
    ENGINES,
    GEOMETRY,
    KINDS,
    Pair,
    all_equal,
    equal,
    make_loader,
    make_source,
    take,
)

SIZE = 22  # images: 5 steps of 4 per epoch, and 2 images left over
STEPS = 22
POINTS = 20

Write = Callable[[Path, int], list[Path]]


@dataclass(frozen=True)
class Run:
    """An uninterrupted run."""

    states: list[dict[str, Any]]  # before each step
    steps: list[Pair]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, folder_of: Write) -> dict[str, Source]:
    """The same images as every kind of source."""
    root = tmp_path_factory.mktemp("sources")
    images = [path.read_bytes() for path in folder_of(root / "images", SIZE)]
    return {kind: make_source(kind, root / kind, images) for kind in KINDS}


@pytest.fixture(scope="module")
def whole(sources: dict[str, Source]) -> Callable[[str], Run]:
    """An uninterrupted run of class folders with each engine."""
    runs: dict[str, Run] = {}

    def load(engine: str) -> Run:
        if engine not in runs:
            runs[engine] = run = Run([], [])
            with make_loader(sources["folders"], engine, images=4, prefetch=2) as loader:
                for _ in range(STEPS):
                    run.states.append(loader.state_dict())
                    run.steps.append(next(loader))
        return runs[engine]

    return load


SLOW = pytest.mark.soak  # building the stock graph takes a third of a second, a step of torchvision 30 ms


@pytest.mark.parametrize(
    ("engine", "kind", "points"),
    [
        *(("fused", kind, POINTS) for kind in KINDS),
        *(("torchvision", kind, 5) for kind in KINDS),
        ("stock", "tfrecord", 3),
        *(pytest.param(engine, kind, POINTS, marks=SLOW) for engine in ("torchvision", "stock") for kind in KINDS),
    ],
)
def test_resuming_at_random_steps_is_exact(
    sources: dict[str, Source], whole: Callable[[str], Run], engine: str, kind: str, points: int
) -> None:
    """Compares with one run of class folders: except for classes, the kind of source makes no difference."""
    source, run = sources[kind], whole(engine)
    assert [query.step for query, _ in run.steps] == list(range(STEPS))
    chance = random.Random(f"{kind} {engine}")
    drawn = chance.sample(range(STEPS - 1), points)
    depths = (1, 2, 4)
    for depth, some in zip(depths, (drawn[i :: len(depths)] for i in range(len(depths))), strict=True):
        with make_loader(source, engine, images=4, prefetch=depth) as loader:
            for point in some:
                loader.load_state_dict(run.states[point])  # while other steps are in flight
                assert loader.state_dict() == run.states[point] == {"position": point, "bad": {}}
                for step in range(point, point + chance.choice([1, 2])):
                    resumed = next(loader)
                    assert equal(resumed, run.steps[step], but=["labels"])
                    assert resumed[0].labels.tolist() == source.labels[resumed[0].index].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_the_same_at_every_world_size(sources: dict[str, Source], kind: str) -> None:
    """Compares level 0 only, whose canvases show the images in the order of the epoch."""
    level0 = Geometry(cells=1, ratios=(1,), images_per_canvas=(1,))
    source = sources[kind]

    def load(world_size: int) -> list[list[torch.Tensor]]:
        """Canvases, crops and indices of each step of two epochs."""
        steps: list[list[torch.Tensor]] = []
        loaders = [
            make_loader(source, "fused", images=4 // world_size, geometry=level0, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for _ in range(2 * loaders[0].plan.steps_per_epoch):
            views = list(zip(*map(next, loaders), strict=True))  # [view][rank]
            fields = ("pixels", "crops", "index")
            steps.append([torch.cat([getattr(batch, name) for batch in view]) for view in views for name in fields])
        for loader in loaders:
            loader.close()
        return steps

    alone = load(1)
    for world_size in (2, 4):
        for a, b in zip(alone, load(world_size), strict=True):
            assert all(map(torch.equal, a, b))
    for epoch in range(2):
        seen = torch.cat([step[2] for step in alone[epoch * 5 : epoch * 5 + 5]]).tolist()
        assert len(seen) == len(set(seen)) == SIZE // 4 * 4
        assert seen == planning.order(5, epoch, SIZE)[: len(seen)].tolist()


# ------------------------------------------------------------------------------------------------- canvas schedule

SCHEDULED = replace(GEOMETRY, schedule=((1, 3), (2, 2)))
CELLS = [1, 1, 3, 3, 2, 2]  # cells of the steps of three epochs


@pytest.mark.parametrize("engine", ENGINES)
def test_canvases_change_between_epochs_without_building_anything_anew(
    sources: dict[str, Source], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Canvases grow and then shrink. Steps before and after a change are in flight at the same time."""
    built: list[str] = []
    for kind in (DaliEngine, TorchvisionEngine):

        def build(self: Any, *arguments: Any, make: Callable[..., None] = kind.__init__) -> None:
            built.append(engine)
            make(self, *arguments)

        monkeypatch.setattr(kind, "__init__", build)
    with make_loader(sources["folders"], engine, geometry=SCHEDULED, prefetch=3) as loader:
        run = take(loader, 6)
    assert built == [engine]
    for step, pair in enumerate(run):
        assert all((batch.step, batch.epoch, batch.cells) == (step, step // 2, CELLS[step]) for batch in pair)
        assert all(batch.pixels.shape == (10, 3, 32 * CELLS[step], 32 * CELLS[step]) for batch in pair)

    for epoch, cells in [(1, 3), (2, 2)]:
        plain = replace(GEOMETRY, cells=cells)
        with make_loader(sources["folders"], engine, geometry=plain, prefetch=1) as loader:
            loader.load_state_dict({"position": 2 * epoch, "bad": {}})
            assert all_equal(take(loader, 2), run[2 * epoch : 2 * epoch + 2])

    with make_loader(sources["tfrecord"], engine, geometry=SCHEDULED, prefetch=2) as loader:
        for step in (2, 1):
            loader.load_state_dict({"position": step, "bad": {}})
            assert all(equal(a, b) for a, b in zip(take(loader, 2), run[step:], strict=False))
