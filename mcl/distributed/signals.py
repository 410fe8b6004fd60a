"""SIGTERM and Ctrl-C: finish the step, save, leave; all processes after the same step."""

import signal
import time
from collections import deque
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from mcl import distributed

_AGAIN = 2.0
"""Seconds in which a second SIGINT is the first one again: a terminal sends it to all, and torchrun passes it on."""


class Interrupted(SystemExit):
    """A signal ended the run, after everything was saved; the exit code is 128 + the signal's number, as in a shell."""


class Signals:
    """Within the context, SIGINT and SIGTERM are noted instead of obeyed; a later second SIGINT acts as usual.

    Who sends SIGTERM twice, as a scheduler and torchrun together do, has SIGKILL for what does not end in time.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _AGAIN:
            signal.default_int_handler(number, frame)


class Consensus:
    """The signal that any process received, known to all of them after the same step.

    Hosts tell each other after every step, beside the training, and hear `LAG` steps later what was said; by then
    nobody has to wait. So a run stops at most that many steps later than a single process would.
    """

    LAG = 2

    def __init__(self) -> None:
        self._group = distributed.host_group()
        self._under_way: deque[tuple[Tensor, dist.Work]] = deque()

    def __call__(self, received: int) -> int:
        """Says what this process received, 0 for nothing; called after every step by all of them."""
        if self._group is None:
            return received
        said = torch.tensor(received)
        work = dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append((said, work))
        if len(self._under_way) <= self.LAG:
            return 0
        heard, done = self._under_way.popleft()
        done.wait()
        return int(heard)
