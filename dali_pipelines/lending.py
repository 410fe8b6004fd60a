"""Memory that the loader lends to a GPU and keeps until the GPU has read it; limits how far the host is ahead."""

from collections import deque

import torch
from torch import Tensor


class Lending:
    """Memory of the steps that a GPU has been given and has not finished.

    Args:
        gpu: the CUDA device.
        ahead: steps that it may not have finished when the next one is lent; the host waits for the one before them.
    """

    def __init__(self, gpu: int, ahead: int) -> None:
        self._gpu, self._ahead = gpu, ahead
        self._steps: deque[tuple[list[Tensor], torch.cuda.Event]] = deque()

    def lend(self, memory: list[Tensor]) -> None:
        """Keeps the memory of a step until the GPU has finished the step, so that freeing a tensor does not block."""
        if self._steps:  # all that reads the last step's has been queued by now
            self._steps[-1][1].record(torch.cuda.current_stream(self._gpu))
        while self._steps and (len(self._steps) > self._ahead or self._steps[0][1].query()):
            self._steps[0][1].synchronize()
            self._steps.popleft()
        self._steps.append((memory, torch.cuda.Event(blocking=True)))  # threads of the loader need the cores

    def settle(self) -> None:
        """Waits for the GPU and gives everything back."""
        if self._steps:
            torch.cuda.current_stream(self._gpu).synchronize()
        self._steps.clear()
