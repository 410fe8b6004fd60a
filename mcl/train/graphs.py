"""CUDA graphs: what a step queues kernel by kernel, recorded once and then started as one."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch

T = TypeVar("T")

_WARMUP = 3
"""Calls before recording, in which libraries choose their algorithms and lazy state comes to be."""


class Recorder(Protocol):
    """Calls some work once, and returns what does it again, with the same memory for inputs and results."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]: ...


class CudaRecorder:
    """Records on the current device.

    Args:
        buffers: what work changes on the side, such as running statistics; they do not notice the warm-up.
        reset: called before every warm-up call and before recording.
    """

    def __init__(self, buffers: Iterable[Tensor], reset: Callable[[], None]) -> None:
        self._buffers, self._reset = list(buffers), reset

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        kept = [b.clone() for b in self._buffers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self._reset()
                work()
        torch.cuda.current_stream().wait_stream(side)
        for buffer, before in zip(self._buffers, kept, strict=True):
            buffer.copy_(before)
        self._reset()
        graph = torch.cuda.CUDAGraph()
        # The loader's threads go on allocating, which is no affair of the recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        graph.replay()  # recording alone computes nothing
        return result, graph.replay


class Graphed(Generic[T]):
    """Work on two views, recorded anew when their shape changes.

    Args:
        work: takes the query and the key view; must not look at values on the host.
        recorder: of the device.
    """

    def __init__(self, work: Callable[[MontageBatch, MontageBatch], T], recorder: Recorder) -> None:
        self._work, self._record = work, recorder
        self._shape: object = None
        self._views: list[MontageBatch] = []
        self._recorded: tuple[T, Callable[[], None]] | None = None

    def __call__(self, query: MontageBatch, key: MontageBatch) -> T:
        """What work returns, in memory that the next call writes to."""
        shape = (query.pixels.shape, query.canvas_counts, query.query_counts)
        if self._recorded is not None and shape == self._shape:
            for view, new in zip(self._views, (query, key), strict=True):
                for name, tensor in _tensors(view).items():
                    tensor.copy_(getattr(new, name), non_blocking=True)
            result, again = self._recorded
            again()
            return result
        self._recorded = None  # its memory, all activations among it, goes back before the new one takes its own
        self._shape, self._views = shape, [_cloned(query), _cloned(key)]
        self._recorded = self._record(lambda: self._work(*self._views))
        return self._recorded[0]


def _tensors(view: MontageBatch) -> dict[str, Tensor]:
    values = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _cloned(view: MontageBatch) -> MontageBatch:
    clones: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(view).items()}
    return dataclasses.replace(view, **clones)
