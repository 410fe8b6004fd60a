"""Stops all processes after the same step when any of them receives a signal."""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from mcl import distributed


class Consensus:
    """Shares the signal that any process received, so that all processes know it after the same step.

    Hosts start an all-reduce after every step and read its result `LAG` steps later, when it is usually complete. A run
    stops at most `LAG` steps later than a single process would.
    """

    LAG = 2

    def __init__(self) -> None:
        self._group = distributed.hosts()
        self._under_way: deque[tuple[Tensor, dist.Work]] = deque()

    def __call__(self, received: int) -> int:
        """Exchanges the signal that this process received, or 0; all processes call this after every step."""
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
