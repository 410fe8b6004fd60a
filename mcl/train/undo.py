"""Steps that never were: what they change is put back on the device, and the host does not ask whether."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer


class Undo:
    """Copies of what a step changes.

    Args:
        buffers: what forward changes, such as running statistics.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._kept = _copies(buffers)
        self._optimizer: Optimizer | None = None
        self._state: dict[tuple[int, str], Tensor] = {}

    def keep(self, weights: Iterable[Tensor], optimizer: Optimizer) -> None:
        """Copies, after backward has given its memory back, what the update changes."""
        self._kept += _copies(weights)
        self._optimizer = optimizer
        self._state = {name: tensor.clone() for name, tensor in _state(optimizer)}

    @torch.no_grad()
    def unless(self, good: Tensor) -> None:
        """Puts everything back, bit for bit, where `good`, () bool on the device, is false."""
        for now, before in self._kept:
            torch.where(good, now, before, out=now)
        assert self._optimizer is not None
        for name, now in _state(self._optimizer):
            kept = self._state.get(name)  # the first step makes the state, out of zeros
            torch.where(good, now, torch.zeros_like(now) if kept is None else kept, out=now)


def _copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor.detach(), tensor.detach().clone()) for tensor in tensors]


def _state(optimizer: Optimizer) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Every tensor of an optimiser's state, under its parameter and name."""
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                yield (id(parameter), name), value
