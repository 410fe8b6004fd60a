"""The memory of canvases on a GPU, which DALI lends, is given back when the GPU has read it, and not before."""

import weakref
from collections import deque

import pytest
import torch
from torch import Tensor

from dali_pipelines.loader import DaliEngine


class Gpu:
    """Comes by events later than the host records them: when `passed` counts them."""

    def __init__(self) -> None:
        self.recorded: list[str] = []  # streams, in the order in which events were recorded on them
        self.passed = 0

    def event(self) -> "Event":
        return Event(self)


class Event:
    """Stands in for torch.cuda.Event, which would call itself passed as long as it is not recorded."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._number = gpu, 0

    def record(self, stream: str) -> None:
        assert not self._number
        self._gpu.recorded.append(stream)
        self._number = len(self._gpu.recorded)

    def query(self) -> bool:
        assert self._number, "asked before the step that reads the memory was queued"
        return self._gpu.passed >= self._number


def test_memory_is_kept_until_the_training_stream_is_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"training on {device}")
    engine = DaliEngine.__new__(DaliEngine)
    engine._gpu, engine._lent = 3, deque()
    steps: list[weakref.ref[Tensor]] = []

    def lend() -> list[bool]:
        """The next step; which of the steps' memory is kept then, though nobody else holds it."""
        output = torch.empty(1)
        steps.append(weakref.ref(output))
        engine._lend([output])
        del output
        return [step() is not None for step in steps]

    assert lend() == [True]
    assert gpu.recorded == []  # what reads the first step is not queued yet
    assert lend() == [True, True]
    assert gpu.recorded == ["training on 3"]
    assert lend() == [True, True, True]  # a GPU that is two steps behind
    gpu.passed = 1
    assert lend() == [False, True, True, True]
    gpu.passed = 3
    assert lend() == [False, False, False, True, True]
