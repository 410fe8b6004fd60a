"""Processes of a run: how they meet, what they tell each other, and how their end is noticed.

Here is the process group and collectives over it, of which a single process needs none.
"""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from mcl.distributed.board import Board
from mcl.distributed.launch import adopt_slurm as adopt_slurm
from mcl.distributed.launch import meeting_point, roll_call
from mcl.distributed.launch import tasks_of_srun as tasks_of_srun

T = TypeVar("T")

_store: Store | None = None  # where the processes have met
_timeout = timedelta(minutes=30)  # of collectives


def setup(device: str, timeout: float = 600) -> None:
    """Joins the process group when there is more than one process: NCCL on GPUs, gloo on CPUs.

    Args:
        timeout: seconds without progress after which :mod:`mcl.distributed.watchdog` ends a run; PyTorch's own waiting
            ends after twice that, and would not say whom it waited for.

    Raises:
        ConfigError: nothing says where they meet, they were not started as one group, or some did not come within ten
            minutes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return
    # PyTorch 2.13 has new names for two things that it also has under these, as do the versions before.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is|`torch.distributed.all_gather_into", FutureWarning)
    own, obstacle = int(os.environ["RANK"]), ""
    if device == "cuda":
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        else:
            obstacle = (
                f"trainer.device: process {local_rank()} of its machine sees {torch.cuda.device_count()} GPUs; start "
                "one process per GPU, and let each see all of them (under SLURM: no --gpus-per-task)"
            )
    store = roll_call(meeting_point(), own, size, device, obstacle)
    global _store, _timeout
    _store, _timeout = store, timedelta(seconds=2 * timeout)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=own, world_size=size, timeout=_timeout)


def board(patience: float) -> Board:
    """By a connection of the caller's own; its calls come back within `patience` seconds."""
    assert _store is not None
    return Board(_store.clone, patience)


def calls() -> int:
    """Collectives of the whole group that this process has begun: who hangs has begun fewer than who waits for it."""
    count: int = cast(Any, dist.group.WORLD)._get_sequence_number_for_group()
    return count


def host_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """All processes by way of their hosts, for what GPUs have no part in; None if there is only one.

    Args:
        timeout: of its collectives; that of all others by default.
    """
    if world_size() == 1:
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout or _timeout))


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Gather:
    """(n, ...) of every rank, on its way to all of them; without gradient.

    Args:
        x: of this rank; not to be written to before :meth:`wait`.
    """

    def __init__(self, x: Tensor) -> None:
        self._own = self._all = x.detach().contiguous()
        self._work: dist.Work | None = None
        if world_size() > 1:
            self._all = x.new_empty(world_size() * len(x), *x.shape[1:])
            self._work = dist.all_gather_into_tensor(self._all, self._own, async_op=True)

    def wait(self) -> Tensor:
        """Concatenated in the order of ranks; on a GPU its stream waits, and the host does not."""
        if self._work is not None:
            self._work.wait()
        return self._all


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """A picklable value of every rank, in the order of ranks. Waits for all of them."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def in_turn(work: Callable[[], T]) -> T:
    """Calls `work` on the first process of every machine and then, when all of these are done, on the others.

    It is for work whose result a file keeps for whoever comes later. A ValueError on any process is raised on all.
    """
    group = host_group(timedelta(days=1))  # the first ones may need longer than the steps of a run may take
    result, error = None, None
    for first in (True, False):
        if (local_rank() == 0) == first:
            try:
                result = work()
            except ValueError as raised:
                error = raised
        for other in gather_objects(error, group):
            if other is not None:
                raise error or other
    if group is not None:
        dist.destroy_process_group(group)
    return cast(T, result)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
