"""Keeps the memory of steps until the GPU has read it, and limits how many steps the host may be ahead of the GPU."""

from collections import deque

import torch
from torch import Tensor


class Lending:
    """Memory of steps that have been passed to a GPU and that it has not finished.

    Args:
        gpu: the CUDA device.
        ahead: number of unfinished steps that are allowed when the next one is lent; the host waits for older ones.
    """

    def __init__(self, gpu: int, ahead: int) -> None:
        self._gpu, self._ahead = gpu, ahead
        self._steps: deque[tuple[list[Tensor], torch.cuda.Event]] = deque()

    def lend(self, memory: list[Tensor]) -> None:
        """Keeps the memory of a step until the GPU has finished the step, so that freeing a tensor does not block."""
        if self._steps:  # all work that reads the memory of the last step has been queued
            self._steps[-1][1].record(torch.cuda.current_stream(self._gpu))
        while self._steps and (len(self._steps) > self._ahead or self._steps[0][1].query()):
            self._steps[0][1].synchronize()
            self._steps.popleft()
        self._steps.append((memory, torch.cuda.Event(blocking=True)))  # a spinning host would take a core

    def settle(self) -> None:
        """Waits for the GPU, then releases all memory."""
        if self._steps:
            torch.cuda.current_stream(self._gpu).synchronize()
        self._steps.clear()
