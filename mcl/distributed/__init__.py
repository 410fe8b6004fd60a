"""Process group and collectives of a run. With one process they do nothing.

torchrun starts the processes, and ends all of them when one fails.
"""

import faulthandler
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.distributed.nn.functional import all_gather

from mcl.config import ConfigError
from mcl.distributed import hang, launch, memory

T = TypeVar("T")

_hosts: dist.ProcessGroup | None = None
_timeout: timedelta | None = None
_alone = False
_imagined: tuple[int, list[int]] | None = None


class PeerError(RuntimeError):
    """A collective failed because another process has ended or hangs. The same command continues the run."""

    exit_code = 3


def setup(device: str, timeout: float = 600, folder: Path | None = None) -> None:
    """Joins the process group if there are several processes: NCCL on GPUs, gloo on CPUs.

    Args:
        device: cpu or cuda.
        timeout: timeout of collectives in seconds.
        folder: folder to which NCCL's flight recorder writes its dumps if a collective times out.

    Raises:
        ConfigError: the launcher's variables are wrong, the processes do not meet, or this one has no GPU.
    """
    size = launch.world_size()
    if size == 1:
        return
    # PyTorch 2.13 has new names for two functions; the old ones work in all versions.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is|`torch.distributed.all_gather_into", FutureWarning)
    if device == "cuda":
        if local_rank() >= gpus():
            raise ConfigError(
                f"trainer.device: process {local_rank()} of its machine sees {gpus()} GPUs; start "
                "one process per GPU, and let each see all of them (under SLURM: no --gpus-per-task)"
            )
        torch.cuda.set_device(local_rank())
        if folder is not None:
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl_rank_"))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # if torchrun is killed, its processes save and end
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    global _timeout
    _timeout = timedelta(seconds=timeout)
    try:
        store, rank, size = launch.meet(_timeout)
        options: dict[str, Any] = {"timeout": _timeout, "store": store, "rank": rank, "world_size": size}
        if device == "cuda":  # NCCL starts, or fails, here
            dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank()), **options)
        else:
            dist.init_process_group("gloo", **options)
        barrier()
    except (ValueError, RuntimeError) as error:
        if device == "cuda" and isinstance(error, dist.DistBackendError):  # the processes have met
            raise ConfigError(
                f"NCCL cannot start on rank {rank}, GPU {local_rank()} of its machine ({_in_one_line(error)}); "
                "NCCL_DEBUG=INFO shows more. In a container it needs shared memory (--ipc=host); if machines have "
                "several networks, NCCL_SOCKET_IFNAME chooses one"
            ) from error
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT, WORLD_SIZE: {size} processes did not meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({_in_one_line(error)}); start all of them, on the same kind of "
            "device; if machines have several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one"
        ) from error


def _in_one_line(error: Exception) -> str:
    """All that NCCL says, which is on several lines, without PyTorch's stack trace."""
    return " ".join(str(error).partition("\nException raised from")[0].split())


def teardown() -> None:
    """Leaves the group and cancels deadlines."""
    global _hosts
    if dist.is_initialized():
        hang.end_after(hang.GRACE)
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    _hosts = None


def gpus() -> int:
    """Number of GPUs that this process can use. Before CUDA is initialised, torch.cuda.device_count asks the driver."""
    return torch.accelerator.device_count() if torch.cuda.is_available() else 0


@contextmanager
def naming_peers() -> Iterator[None]:
    """Raises :class:`PeerError` in place of the error of a failed collective, and ends the process if leaving hangs."""
    try:
        yield
    except Exception as error:
        hang.end_after(hang.GRACE)  # leaving the group may wait for processes that have ended
        said = str(error)
        ours = type(error) is RuntimeError and any(word in said for word in ("gloo", "NCCL", "monitoredBarrier"))
        if world_size() == 1 or not (isinstance(error, dist.DistError) or ours):
            raise
        raise PeerError(
            f"another process ended or hangs, so a collective of rank {rank()} failed ({_in_one_line(error)}). Its "
            "own error is in train.log or in the output of torchrun; if pre-training hangs, its stack will be in the "
            "run's folder hangs, and NCCL's flight recorder in nccl_rank_*. If no process failed, NCCL_DEBUG=INFO "
            "shows more about the network. The same command continues the run"
        ) from error


def hosts() -> dist.ProcessGroup | None:
    """A gloo group of all processes, for exchanges between hosts; None if there is only one process."""
    global _hosts
    if _hosts is None and world_size() > 1:
        _hosts = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_timeout))
    return _hosts


@contextmanager
def alone() -> Iterator[None]:
    """Within the context, this process counts as the only one, so collectives do nothing."""
    global _alone, _imagined
    before, (_alone, _imagined) = (_alone, _imagined), (True, None)
    try:
        yield
    finally:
        _alone, _imagined = before


@contextmanager
def imagined(processes: int) -> Iterator[list[int]]:
    """Within the context, every :class:`Gather` repeats its rows, as if `processes` processes had the same rows.

    Yields:
        A list to which each gather appends the bytes of its input.
    """
    global _imagined
    before, _imagined = _imagined, (processes, [])
    try:
        yield _imagined[1]
    finally:
        _imagined = before


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def local_rank() -> int:
    """Rank among the processes of this machine."""
    return int(os.environ["LOCAL_RANK"]) if launch.launched() else 0


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launch.launched() else 1


class Gather:
    """An asynchronous all-gather of (n, ...) tensors, without gradient.

    Args:
        x: tensor of this rank, which must not be changed before :meth:`wait`.
    """

    def __init__(self, x: Tensor) -> None:
        self._own = self._all = x.detach().contiguous()
        self._work: dist.Work | None = None
        if _imagined is not None:
            processes, sizes = _imagined
            sizes.append(x.nbytes)
            self._all = self._own.repeat(processes, *[1] * (x.ndim - 1))
        elif world_size() > 1:
            self._all = x.new_empty(world_size() * len(x), *x.shape[1:])
            self._work = dist.all_gather_into_tensor(self._all, self._own, async_op=True)

    def wait(self) -> Tensor:
        """Tensors of all ranks, concatenated in their order. On a GPU the stream waits and the host does not."""
        if self._work is not None:
            self._work.wait()
        return self._all


def gather_with_gradient(x: Tensor) -> Tensor:
    """Tensors (n, ...) of all ranks, concatenated in their order. Backward adds the gradients of all ranks."""
    if _imagined is not None:
        processes, sizes = _imagined
        sizes.append(x.nbytes)
        return x.repeat(processes, *[1] * (x.ndim - 1))
    return torch.cat(all_gather(x)) if world_size() > 1 else x


def add_up(x: Tensor) -> Tensor:
    """The sum over all processes; in the order of ranks with deterministic algorithms. `x` may be overwritten."""
    if torch.are_deterministic_algorithms_enabled():
        return _in_order(Gather(x[None]).wait())
    dist.all_reduce(x)
    return x


def average_in_order(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel that adds gradients in the order of ranks. An all-reduce over
    three or more ranks adds in an order that depends on the position in the bucket, and a resumed run has other
    buckets at first."""
    own = bucket.buffer()
    parts = own.new_empty(world_size(), len(own))
    work = cast(dist.Work, dist.all_gather_into_tensor(parts, own[None], async_op=True))
    return work.get_future().then(lambda _: torch.div(_in_order(parts), world_size(), out=own))


def _in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in an order that does not depend on the shape, unlike torch.sum."""
    return sum(parts[1:].unbind(), parts[0])


def gather_objects(value: Any) -> list[Any]:
    """Picklable values of all ranks, in their order. Waits for all ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, hosts())
    return values


def barrier(timeout: timedelta | None = None) -> None:
    """Waits for all processes; the error of rank 0 names those that do not arrive."""
    if world_size() > 1:
        dist.monitored_barrier(hosts(), timeout or _timeout, wait_all_ranks=True)


def local_rank_zero_first(work: Callable[[], T]) -> T:
    """Calls `work` on the first process of every machine, and when all of these have finished, on the others.

    `work` should cache its result in a file, so that later calls are fast. It may take at most a day.
    """
    hosts()
    first = local_rank() == 0
    if first:
        result = work()
    barrier(timedelta(days=1))
    return result if first else work()


def once_per_machine(work: Callable[[], T], of: object = None) -> T:
    """The result of `work` on the first process of a machine; the others map its memory instead of calling `work`.

    The result must be picklable; its NumPy arrays are shared. `work` may take at most a day.

    Args:
        work: computes the result.
        of: value that the result depends on; a process whose value differs from the first process's calls `work`
            itself.
    """
    if world_size() == 1:
        return work()
    hosts()
    own, descriptor = memory.offer(work()) if local_rank() == 0 else (None, None)
    barrier(timedelta(days=1))
    offer, offered = gather_objects((own, of))[rank() - local_rank()]
    found = offer if offered == of and offer is not None and offer.here() else None
    if offered == of and not found:
        warnings.warn(
            f"rank {rank()} cannot read the memory of its machine's first process, so it reads all files itself; start "
            "the processes of a machine in one container",
            stacklevel=2,
        )
    result: T = work() if found is None else found.take()
    barrier(timedelta(days=1))
    if descriptor is not None:
        os.close(descriptor)
    return result
