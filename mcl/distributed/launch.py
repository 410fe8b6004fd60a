"""Rendezvous of the processes of a run, through the variables and the store of torchrun."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from mcl.config import ConfigError

_RESOLVE = 60.0  # seconds in which the name of the first machine must resolve


def launched() -> bool:
    """Whether this process is one of several. Without WORLD_SIZE, other variables of torchrun are ignored."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def world_size() -> int:
    """Number of processes of the run: WORLD_SIZE, or 1 without a launcher.

    Raises:
        ConfigError: a variable is missing or is not what torchrun sets, or srun started several processes itself.
    """
    if "WORLD_SIZE" not in os.environ:
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
            raise ConfigError(
                f"SLURM_STEP_NUM_TASKS: srun started {os.environ['SLURM_STEP_NUM_TASKS']} processes without torchrun; "
                "let srun start one torchrun per node, as scripts/slurm.sbatch does"
            )
        return 1
    size = _number("WORLD_SIZE", 1, 1 << 20)
    if size > 1:
        _number("RANK", 0, size - 1)
        _number("LOCAL_RANK", 0, _number("LOCAL_WORLD_SIZE", 1, size) - 1)
        _number("MASTER_PORT", 1, 65535)
        _resolve(os.environ.get("MASTER_ADDR", ""))
    return size


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Returns a store that only processes started together share, the rank, and the world size.

    torchrun keeps its store when it restarts processes, and gloo then reads addresses of processes that have ended
    (seen in PyTorch 2.14). Agents on several machines may count restarts differently. So rank 0 gives each start a
    unique name. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has the same effect, but only in torchrun's own environment.

    Raises:
        DistStoreError: some processes did not arrive in time.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if rank == 0:
        start = uuid.uuid4().hex
        here = PrefixStore(start, store)
        store.set("start", start)
        here.wait([f"rank {other}" for other in range(1, size)], timeout)
        store.delete_key("exception_dump")  # otherwise NCCL's watchdogs end this start as well
        here.set("all", "")
        return here, rank, size
    end, answered = time.monotonic() + timeout.total_seconds(), ""
    while time.monotonic() < end:
        start = store.get("start").decode()  # may still be the previous one
        here = PrefixStore(start, store)
        complete = here.check(["all"])
        if complete and start == answered:
            return here, rank, size
        if not complete and start != answered:
            here.set(f"rank {rank}", "")
            answered = start
        time.sleep(0.1)
    raise dist.DistStoreError("rank 0 did not arrive")


def _number(name: str, least: int, most: int) -> int:
    said = os.environ.get(name, "")
    if not (said.isdecimal() and least <= int(said) <= most):
        raise ConfigError(
            f"{name}: {said or 'not set'}; it must be from {least} to {most}. torchrun sets RANK, WORLD_SIZE, "
            "LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset them all for a single process"
        )
    return int(said)


def _resolve(host: str) -> None:
    end = time.monotonic() + _RESOLVE
    while True:
        try:
            socket.getaddrinfo(host or ".", None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end or not host:
                raise ConfigError(
                    f"MASTER_ADDR: {host or 'not set'} does not resolve ({error}); it must name the machine of rank 0"
                ) from None
            time.sleep(1)
