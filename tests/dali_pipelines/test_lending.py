"""The memory of canvases on a GPU, which DALI owns, is released when the GPU has read it, and not before."""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dali_pipelines import pipelines
from dali_pipelines.lending import Lending
from dali_pipelines.loader import MontageLoader
from dali_pipelines.source import open_source
from mcl.config import DataConfig
from tests.dali_pipelines.loading import make_loader


class Gpu:
    """A GPU that reaches events later than the host records them: when `passed` counts them."""

    def __init__(self) -> None:
        self.recorded: list[str] = []  # streams on which events were recorded, in order
        self.passed = 0
        self.waits: list[int] = []  # events for which the host has waited

    def event(self, blocking: bool) -> "Event":
        assert blocking, "the host would spin"
        return Event(self)


class Event:
    """Replaces torch.cuda.Event, whose query() is true as long as the event is not recorded."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._number = gpu, 0

    def record(self, stream: str) -> None:
        assert not self._number
        self._gpu.recorded.append(stream)
        self._number = len(self._gpu.recorded)

    def query(self) -> bool:
        assert self._number, "asked before the step that reads the memory was queued"
        return self._gpu.passed >= self._number

    def synchronize(self) -> None:
        if not self.query():
            self._gpu.waits.append(self._number)
            self._gpu.passed = self._number


class Stream(str):
    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    fake = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"training on {device}"))
    return fake


def test_memory_is_kept_until_the_training_stream_is_past_it(gpu: Gpu) -> None:
    lending = Lending(gpu=3, ahead=4)
    steps: list[weakref.ref[Tensor]] = []

    def lend() -> list[bool]:
        """Lends the next step; returns, for every step, whether its memory is still kept."""
        output = torch.empty(1)
        steps.append(weakref.ref(output))
        lending.lend([output])
        del output
        return [step() is not None for step in steps]

    assert lend() == [True]
    assert gpu.recorded == []  # the work that reads the first step is not queued yet
    assert lend() == [True, True]
    assert gpu.recorded == ["training on 3"]
    assert lend() == [True, True, True]  # the GPU is two steps behind
    gpu.passed = 1
    assert lend() == [False, True, True, True]
    gpu.passed = 3
    assert lend() == [False, False, False, True, True]
    lending.settle()
    assert lend() == [False] * 5 + [True]
    assert gpu.waits == []


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_host_is_only_so_many_steps_ahead_of_the_gpu(gpu: Gpu, ahead: int) -> None:
    """This holds however slow the GPU is, and however much work a CUDA graph queues at once."""
    lending = Lending(gpu=0, ahead=ahead)
    for step in range(1, 20):  # step 1 is the first
        lending.lend([])
        assert step - 1 - gpu.passed <= ahead
    assert gpu.waits == list(range(1, 19 - ahead))  # the host waits for each step as late as it may


@pytest.mark.parametrize("engine", ["fused", "stock", "torchvision"])
def test_steps_of_every_engine_are_lent_and_bound_to_the_training_stream(
    gpu: Gpu,
    engine: str,
    tmp_path: Path,
    folder_of: Callable[[Path, int], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pipeline on the CPU replaces one that uploads canvases."""
    bound: list[str] = []

    def define(real: Callable[..., Any]) -> Callable[..., Any]:
        def pipeline(feed: Any, graph: pipelines.Graph, device_id: int, **rest: Any) -> Any:
            assert graph.upload
            made = real(feed, dataclasses.replace(graph, upload=False), device_id=None, **rest)
            run = made.run
            made.run = lambda stream: [bound.append(stream), run()][1]
            return made

        return pipeline

    for name in ("fused_pipeline", "stock_pipeline"):
        monkeypatch.setattr(pipelines, name, define(getattr(pipelines, name)))
    folder_of(tmp_path, 8)
    plan = make_loader(open_source(str(tmp_path)), "torchvision").plan
    data = DataConfig(engine=engine, device="cpu", prefetch=2)  # type: ignore[arg-type]
    with MontageLoader(open_source(str(tmp_path)), plan, data, gpu=3, threads=1) as loader:
        for _ in range(6):
            next(loader)
    assert gpu.recorded == ["training on 3"] * 5
    assert gpu.waits == [1, 2, 3]
    assert bound == ([] if engine == "torchvision" else ["training on 3"] * 6)
