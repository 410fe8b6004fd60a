"""CUDA graphs: the kernels of a step, recorded once and launched together."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dali_pipelines.batch import MontageBatch

T = TypeVar("T")

_WARMUP = 3
"""Calls before recording, in which libraries choose algorithms and initialise lazily."""


class Recorder(Protocol):
    """Runs work once; returns its result and a function that repeats it with the same memory for inputs and results."""

    def __call__(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]: ...


class CudaRecorder:
    """Records on the current device.

    Args:
        buffers: tensors that work updates, such as running statistics; restored after the warm-up.
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
        # Other threads, such as the loader's, may allocate memory during recording.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
        graph.replay()  # recording does not compute
        return result, graph.replay


class Graphed(Generic[T]):
    """Work on two views, recorded again when their shape changes.

    Args:
        work: takes the query and the key view; must not read values on the host.
        recorder: records on the device.
    """

    def __init__(self, work: Callable[[MontageBatch, MontageBatch], T], recorder: Recorder) -> None:
        self._work, self._record = work, recorder
        self._shape: object = None
        self._views: list[MontageBatch] = []
        self._recorded: tuple[T, Callable[[], None]] | None = None

    def __call__(self, query: MontageBatch, key: MontageBatch) -> T:
        """The result of `work`, in memory that the next call overwrites."""
        shape = (query.pixels.shape, query.canvas_counts, query.query_counts)
        if self._recorded is not None and shape == self._shape:
            for view, new in zip(self._views, (query, key), strict=True):
                for name, tensor in _tensors(view).items():
                    tensor.copy_(getattr(new, name), non_blocking=True)
            result, again = self._recorded
            again()
            return result
        self._recorded = None  # frees the memory of all activations before the next recording allocates
        self._shape, self._views = shape, [_cloned(query), _cloned(key)]
        self._recorded = self._record(lambda: self._work(*self._views))
        return self._recorded[0]


def _tensors(view: MontageBatch) -> dict[str, Tensor]:
    values = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _cloned(view: MontageBatch) -> MontageBatch:
    clones: dict[str, Any] = {name: tensor.clone() for name, tensor in _tensors(view).items()}
    return dataclasses.replace(view, **clones)
