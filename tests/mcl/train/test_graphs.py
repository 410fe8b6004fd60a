"""CUDA graphs without a GPU: what is kept, and what is done before and after capture."""

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from mcl.train.graphs import CudaRecorder, Graphed
from tests.step import configure, views


def test_a_graph_is_freed_before_the_next_is_captured() -> None:
    """Graphs of two canvas sizes need not fit into a GPU together."""
    before: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        alive.append(any(recorded() is not None for recorded in before))
        result = work()
        before.append(weakref.ref(result))
        return result, lambda: None

    graphed = Graphed(lambda query, key: query.pixels + key.pixels, record)
    for cells in (1, 1, 2, 1):
        graphed(*views(configure(f"montage.cells={cells}")))
    assert alive == [False, False, False]


def test_work_reads_memory_that_stays_as_long_as_views_have_one_size() -> None:
    """A graph reads the addresses that it was captured with, and the caller may have freed its memory since."""
    places: list[set[int]] = []

    def memory(*batch: MontageBatch) -> set[int]:
        values = [getattr(view, field.name) for view in batch for field in dataclasses.fields(view)]
        return {value.data_ptr() for value in values if isinstance(value, Tensor)}

    def record(work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        result = work()
        return result, lambda: result.copy_(work())

    def work(query: MontageBatch, key: MontageBatch) -> Tensor:
        places.append(memory(query, key))
        return query.pixels.sum() + key.pixels.sum() + query.tile_images.sum()

    graphed = Graphed(work, record)  # type: ignore[arg-type]
    for seed, cells in enumerate((1, 1, 1, 2, 2, 1)):
        query, key = views(configure(f"montage.cells={cells}"), seed)
        assert torch.equal(graphed(query, key), query.pixels.sum() + key.pixels.sum() + query.tile_images.sum())
        assert not places[-1] & memory(query, key)
    assert [a == b for a, b in itertools.pairwise(places)] == [True, True, False, True, False]


class FakeGraph:
    """Records where it was captured; `doing` is the work on the device."""

    def __init__(self, doing: list[str]) -> None:
        self._doing = doing

    def replay(self) -> None:
        self._doing.append("replay")


def test_a_recording_begins_with_what_warming_up_left_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """With replacements for CUDA's streams and graphs."""
    doing: list[str] = []

    @contextlib.contextmanager
    def recording(graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        doing.append(f"record, {capture_error_mode}")
        yield

    stream = mock.Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(doing))
    monkeypatch.setattr(torch.cuda, "graph", recording)
    running = torch.zeros(())

    def work() -> float:
        doing.append(f"work at {running.item():.0f}")
        running.add_(1)
        return running.item()

    result, again = CudaRecorder([running], lambda: doing.append("reset"))(work)
    again()
    warming = [word for i in range(3) for word in ("reset", f"work at {i}")]
    assert doing == [*warming, "reset", "record, thread_local", "work at 0", "replay", "replay"]
    assert result == 1
