"""Processes of a run, as torchrun or SLURM started them; a single process needs none of it."""

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mcl.config import ConfigError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)

_SLURM = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


def adopt_slurm() -> None:
    """Gives the processes that srun started the variables that torchrun would have set.

    Raises:
        ConfigError: srun does not say where the first process listens.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return
    os.environ.update({ours: os.environ[theirs] for ours, theirs in _SLURM.items() if theirs in os.environ})
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"{name}: not set; under srun it must name the first node, or a free port on it")


def setup(device: str) -> None:
    """Joins the process group when there is more than one process: NCCL on GPUs, gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # PyTorch 2.13 has new names for two things that it also has under these, as do the versions before.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is|`torch.distributed.all_gather_into", FutureWarning)
        if device == "cuda":
            torch.cuda.set_device(local_rank())
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


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


def gather_objects(value: Any) -> list[Any]:
    """A picklable value of every rank, in the order of ranks. Waits for all of them."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def in_turn(work: Callable[[], T]) -> T:
    """Calls `work` on the first process of every machine and then, when all of these are done, on the others.

    It is for work whose result a file keeps for whoever comes later. A ValueError on any process is raised on all.
    """
    if world_size() == 1:
        return work()
    # The first ones may need longer than the steps of a run may take.
    group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_PATIENCE))
    results: list[T] = []
    for first in (True, False):
        error: ValueError | None = None
        if (local_rank() == 0) == first:
            try:
                results.append(work())
            except ValueError as raised:
                error = raised
        errors: list[ValueError | None] = [None] * world_size()
        dist.all_gather_object(errors, error, group)
        for other in errors:
            if other is not None:
                raise error or other
    dist.destroy_process_group(group)
    return results[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Waits for all of them."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
