"""How the processes of a run find each other, as torchrun or SLURM started them."""

import os
import re
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mcl.config import ConfigError

_ROLL_CALL = timedelta(minutes=10)
_ANSWER = 2 * _ROLL_CALL  # the others wait for what rank 0 says in the end
_LINGER, _GLANCE = 1.0, 0.1  # seconds
_CALL, _VERDICT, _STRANGER, _UNABLE = "roll call", "verdict", "stranger", "unable: "

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def tasks_of_srun() -> int:
    """Processes that srun started together with this one; 1 without srun, whatever the job around has."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_PROCID" in os.environ else 1


def adopt_slurm() -> None:
    """Gives the processes that srun started the variables that torchrun would have set."""
    if "RANK" not in os.environ and tasks_of_srun() > 1:
        os.environ.update({ours: os.environ[theirs] for ours, theirs in _SLURM.items()})
        # SLURM's list of a number per node: "8(x2),4" is 8, 8, 4.
        parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
        counts = [count for count, nodes in parts for _ in range(int(nodes or 1))]
        os.environ["LOCAL_WORLD_SIZE"] = counts[int(os.environ["SLURM_NODEID"])]


def meeting_point() -> Store:
    """Where processes find each other: torchrun's own store, or one that rank 0 opens."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"{name}: not set; it must name the first machine, or a free port on it")
    address, port, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    opens = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    patience = _ROLL_CALL if first else _ANSWER
    try:
        store = TCPStore(address, port, is_master=opens, timeout=patience, wait_for_workers=False)
    except dist.DistError as error:
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: {'cannot listen' if opens else 'nobody listens'} at {address}:{port} "
            f"({str(error).splitlines()[0]}); name the first machine and a free port on it"
        ) from None
    return PrefixStore("mcl", store)


def roll_call(store: Store, own: int, size: int, device: str, obstacle: str = "") -> Store:
    """Rank 0 looks whether everyone came, and for the same thing; the process group would only wait.

    torchrun keeps its store when it restarts the processes, and its agents on several machines may count restarts
    differently. So rank 0 gives every start a name of its own, under which processes meet.

    Args:
        obstacle: why this process cannot take part, which all are to know.

    Returns:
        The part of the store that belongs to this start.

    Raises:
        ConfigError: on every process that came.
    """
    said = f"{_UNABLE}{obstacle}" if obstacle else f"{size} processes on {device}"
    if own == 0:
        name = uuid.uuid4().hex
        here: Store = PrefixStore(name, store)
        here.set("rank 0", said)
        store.set(_CALL, name)
        here.set(_VERDICT, _verdict(here, size))
    else:
        try:
            here = _answer(store, own, said)
        except dist.DistError:
            raise ConfigError(
                "WORLD_SIZE: rank 0 did not answer; look into its log, then start all processes"
            ) from None
    if verdict := here.get(_VERDICT).decode():
        if own == 0:
            time.sleep(_LINGER)  # it may keep what the others have yet to read
        raise ConfigError(verdict)
    return here


def _answer(store: Store, own: int, said: str) -> Store:
    """Answers rank 0, and returns its store when it has seen everyone.

    The last call may be that of a start that is over: it has its verdict before this process came, or gets none.
    """
    end = time.monotonic() + _ANSWER.total_seconds()
    answered, expected = "", said
    while time.monotonic() < end:
        name = store.get(_CALL).decode()
        here = PrefixStore(name, store)
        over = here.check([_VERDICT])
        if over and name == answered:
            return here
        expected = here.get("rank 0").decode()
        if not over and name != answered:
            here.set(f"rank {own}", said)
            if said != expected:
                here.set(_STRANGER, str(own))  # rank 0 does not ask for ranks beyond its own number
            answered = name
        time.sleep(_GLANCE)
    # The last call was that of others, if they were started as something else.
    raise ConfigError(_unlike(own, said, expected)) if said != expected else dist.DistStoreError("no verdict")


def _verdict(store: Store, size: int) -> str:
    """What is wrong with the processes that come, in words; empty if nothing is."""
    end = time.monotonic() + _ROLL_CALL.total_seconds()
    expected = store.get("rank 0").decode()
    for other in range(size):
        try:
            store.wait([f"rank {other}"], timedelta(seconds=max(0.1, end - time.monotonic())))
            said = store.get(f"rank {other}").decode()
        except dist.DistStoreError:
            missing = [str(r) for r in range(size) if not store.check([f"rank {r}"])]
            return (
                f"WORLD_SIZE: of {size} processes, rank {', '.join(missing)} did not come within "
                f"{_ROLL_CALL.total_seconds():.0f} s; start as many as WORLD_SIZE says (under SLURM: with srun)"
            )
        if said != expected or said.startswith(_UNABLE):
            return _unlike(other, said, expected)
    if store.check([_STRANGER]):
        stranger = int(store.get(_STRANGER))
        return _unlike(stranger, store.get(f"rank {stranger}").decode(), expected)
    return ""


def _unlike(other: int, said: str, expected: str) -> str:
    """In words: a process that rank 0 cannot train with."""
    for rank, words in ((0, expected), (other, said)):
        if words.startswith(_UNABLE):
            return f"{words.removeprefix(_UNABLE)} (rank {rank})"
    return (
        f"WORLD_SIZE: rank {other} was started as one of {said}, rank 0 as one of {expected}; start all processes with "
        "the same number and the same trainer.device"
    )
