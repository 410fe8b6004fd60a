"""The benchmark of loaders: contenders, results computed from given times, and a short real run."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loader
from benchmarks import loader_contenders as contenders
from benchmarks.loader import Entry, evaluate, prepare
from benchmarks.loader_contenders import Job, Turn, Views
from dali_pipelines.loader import choose_engine
from dali_pipelines.source import SourceError
from mcl.config import ConfigError, DataConfig

RECIPES: dict[str, tuple[Callable[[Job], Views], torch.dtype, float]] = {
    "released": (contenders.released, torch.float32, 1.0),
    "torchvision": (contenders.torchvision_v2, torch.uint8, 255.0),
    "lightly": (contenders.lightly, torch.float32, 1.0),
}
"""Recipes with the dtype of their views and the value of white."""


def job(data: Path, images: int = 0, batch: int = 32, threads: tuple[int, ...] = (1,)) -> Job:
    return prepare(data, images, batch, threads)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_makes_eight_different_views_of_an_image(photos: Path, name: str) -> None:
    if name == "lightly":
        pytest.importorskip("lightly")
    recipe, dtype, white = RECIPES[name]
    torch.manual_seed(0)
    views = recipe(job(photos / "val"))[5]
    assert [(v.shape, v.dtype) for v in views] == [((3, 224, 224), dtype)] * 8
    assert all(v.min() >= 0 and white / 4 < v.max() <= white for v in views)
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_a_dataloader_is_given_the_images_of_the_plan(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = job(photos / "val", images=40)
    assert (len(work.paths), work.plan.size, work.plan.images) == (40, 40, 32)
    given: list[list[list[int]]] = []

    class Loader:
        def __init__(self, views: Views, batch_sampler: list[list[int]], **_: object) -> None:
            self.planned = batch_sampler

        def __iter__(self) -> Iterator[None]:
            given.append(list(self.planned))
            return iter(())

    monkeypatch.setattr(contenders, "DataLoader", Loader)
    with contenders.workers(work, 2, contenders.released) as take:
        assert take(2).images == 64
        take(1)
    first, second, third = (work.plan.samples(step, ()).tolist() for step in range(3))
    # The first epoch only starts the workers.
    assert given == [[[image] for image in first[:2]], [first, second], [third]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 48}, ConfigError, "--batch: 48 images do not fill a whole number of canvases; use 32 or 64"),
        ({"batch": 96}, ConfigError, r"--batch: 96 is more than the 66 images"),
        ({"threads": (1, 999)}, ConfigError, r"--threads: 999 is not between 1 and the \d+ cores"),
        ({"data": Path("nowhere")}, SourceError, "--data: nowhere does not exist"),
    ],
)
def test_wrong_options_are_named(photos: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        job(**{"data": photos / "val", **arguments})


def test_ratios_scaling_and_shares() -> None:
    def turns(*seconds: float, core: float = 0) -> list[Turn]:
        return [Turn(100, s, core) for s in seconds]

    measured = {
        Entry("decode", 1): turns(1.0, core=1.0),
        Entry("decode", 2): turns(0.625, core=1.0),
        Entry("fused", 1): turns(3.0, 2.5, 2.0, core=2.5),
        Entry("fused", 2): turns(2.0, core=3.0),
        Entry("released", 1): turns(25.0),
        Entry("released", 2): turns(16.0),
    }
    results = {r["name"]: r for r in evaluate(measured)}
    one, two = results["fused, 1 thread"], results["fused, 2 threads"]
    assert (one["images_per_s"], one["n"], one["ratio"]) == (pytest.approx(40), 3, pytest.approx(10))
    assert (two["ratio"], two["scaling"]) == (pytest.approx(8), pytest.approx(1.25))
    assert two["scaling_of_decode"] == pytest.approx(1.25 / 1.6)
    assert two["shares"] == pytest.approx({"decode": 0.25, "augmentation": 0.5, "wait": 0.25})
    assert "scaling" not in one
    assert "shares" not in results["released, 2 threads"]
    assert results["released, 2 threads"]["ratio"] == 1

    alone = evaluate({Entry("fused", 2): measured[Entry("fused", 2)]})  # there is nothing to compare with
    assert not {"ratio", "scaling", "shares"} & alone[0].keys()


def test_a_run_reports_what_it_measured_and_what_is_missing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)  # makes its import fail
    file, plot = tmp_path / "loader.json", tmp_path / "loader.png"
    arguments = ["--data", str(photos / "val"), "--batch", "32", "--threads", "1", "--repeat", "1", "--seconds", "0.1"]
    ours = choose_engine(DataConfig(device="cpu"), cuda=False, threads=1)[0]
    contenders = ["decode", ours, "released", "lightly"]
    loader.main([*arguments, "--contenders", *contenders, "--json", str(file), "--plot", str(plot)])

    results = {r["contender"]: r for r in json.loads(file.read_text())["results"]}
    assert list(results) == ["decode", ours, "released"]
    assert [r["name"] for r in results.values()] == [f"{name}, 1 thread" for name in results]
    for r in results.values():
        assert r["images_per_s"] == pytest.approx(1 / r["seconds"])
        assert r["ratio"] == pytest.approx(r["images_per_s"] / results["released"]["images_per_s"])
    assert results["decode"]["images_per_s"] > results[ours]["images_per_s"] > 0
    assert sum(results[ours]["shares"].values()) == pytest.approx(1)

    printed = capsys.readouterr().out
    assert "Not measured: lightly: lightly is not installed; pip install -r benchmarks/requirements.txt" in printed
    assert f"| {ours}, 1 thread |" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
