"""Who fails, dies or hangs is named by the others, before training, too; and nobody's last words keep it alive."""

import datetime
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mcl import distributed
from mcl.distributed import watchdog
from mcl.distributed.watchdog import PeerError, Watchdog
from tests.mcl.ranks import free_port

Ends = list[tuple[int | None, str]]
"""Exit code of every rank, and its error or what it logged last."""

TIMEOUT = 2.0  # a sign every 0.2 s
UNDER_WAY = "under way"


def rank_main(
    rank: int, world: int, port: int, work: Callable[[int, Watchdog], None], said: "SimpleQueue[str]"
) -> None:
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    distributed.setup("cpu")
    watchdog.log.addHandler(_Telling(said))
    try:
        work(rank, Watchdog(TIMEOUT))
    except Exception as error:
        said.put(f"{type(error).__name__}: {error}")
        sys.exit(PeerError.exit_code if isinstance(error, PeerError) else 1)


class _Telling(logging.Handler):
    """Hands messages to the test."""

    def __init__(self, said: "SimpleQueue[str]") -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.put(record.getMessage())


def ends(world: int, work: Callable[[int, Watchdog], None], pause: float = 0.0) -> Ends:
    """How they end; all are stopped three times if there is a `pause`, seconds, once they are under way."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mcl.commands", "tests.mcl.distributed.test_watchdog"])
    port, said = free_port(), [processes.SimpleQueue() for _ in range(world)]
    ranks: list[BaseProcess] = [
        processes.Process(target=rank_main, args=(rank, world, port, work, said[rank])) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        if pause:
            assert said[0].get() == UNDER_WAY
            for number, seconds in 3 * [(signal.SIGSTOP, pause), (signal.SIGCONT, 0.3)]:
                for process in ranks:
                    os.kill(process.pid or 0, number)
                time.sleep(seconds)
        for process in ranks:
            process.join(60)
        return [(p.exitcode, "" if words.empty() else words.get()) for p, words in zip(ranks, said, strict=True)]
    finally:
        for process in ranks:
            process.kill()


def meet() -> None:
    dist.all_reduce(torch.zeros(1))


def fails_before_training(rank: int, dog: Watchdog) -> None:
    with dog.starting():
        meet()
        if rank == 0:
            raise ValueError("wandb is not installed")
    with dog.training(lambda: None):
        meet()


def test_who_fails_before_training_is_named() -> None:
    first, second = ends(2, fails_before_training)
    assert first == (1, "ValueError: wandb is not installed")
    assert second == (3, "PeerError: rank 0 failed at step 0: ValueError: wandb is not installed")


def dies_while_the_other_waits_for_ever(rank: int, dog: Watchdog) -> None:
    """As in NCCL's collectives, which do not break off."""
    with dog.starting():
        meet()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def test_who_dies_is_noticed_by_those_whose_collectives_do_not_break_off() -> None:
    first, second = ends(2, dies_while_the_other_waits_for_ever)
    assert second == (-signal.SIGKILL, "")
    assert first[0] == 3
    assert first[1].startswith("rank 1 is gone, last heard of at step 0; this process ends, too, at\n")
    assert "dies_while_the_other_waits_for_ever" in first[1]


def one_dies_and_one_is_late(rank: int, dog: Watchdog) -> None:
    """Rank 0, which keeps the store, sees it at once."""
    with dog.starting():
        meet()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5 if rank == 2 else 0)
        meet()


def test_who_comes_late_hears_it_too() -> None:
    first, second, third = ends(3, one_dies_and_one_is_late)
    assert second == (-signal.SIGKILL, "")
    assert first == third == (3, "PeerError: rank 1 is gone, last heard of at step 0")


def slow_start(rank: int, dog: Watchdog) -> None:
    """Rank 0 takes longer than training may stand still; then both train, until one hangs."""
    with dog.starting():
        time.sleep(2 * TIMEOUT if rank == 0 else 0)
        meet()
    with dog.training(lambda: None):
        dog.advance(4)
        meet()
        if rank == 1:
            time.sleep(1000)
        meet()


@pytest.mark.soak
def test_who_is_slow_before_training_is_waited_for() -> None:
    for code, said in ends(2, slow_start):
        assert code == 3
        # Whose collective breaks off first, since the other ended, says it as its error.
        said = said.removeprefix("PeerError: ")
        assert said.startswith(f"rank 1 hangs at step 4: the others wait for it since {TIMEOUT:.0f} s")


def hangs_before_training(rank: int, dog: Watchdog) -> None:
    with dog.starting():
        meet()
        if rank == 1:
            threading.Event().wait()
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1), dist.group.WORLD)
        meet()


def test_who_hangs_before_training_is_named_by_those_who_give_up_waiting() -> None:
    first, second = ends(2, hangs_before_training)
    said = "rank 1 hangs at step 0: rank 0 has given up waiting; the stack of who hangs is in train.log"
    assert first == (3, f"PeerError: {said}")
    assert second[0] == 3
    assert second[1].startswith(said)
    assert "hangs_before_training" in second[1]


def is_suspended(rank: int, dog: Watchdog) -> None:
    """For longer than training may stand still."""
    with dog.training(lambda: None):
        for step in range(12):
            meet()
            dog.advance(step)
            time.sleep(TIMEOUT / 4)
            if (rank, step) == (0, 1):
                watchdog.log.warning(UNDER_WAY)


@pytest.mark.soak
@pytest.mark.fault("SIGSTOP of all, and SIGCONT later than the timeout")
def test_a_suspended_job_goes_on() -> None:
    assert ends(2, is_suspended, pause=2 * TIMEOUT) == [(0, ""), (0, "")]


def cannot_close(rank: int, dog: Watchdog) -> None:
    try:
        with dog.starting():
            meet()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            meet()
    finally:
        with mock.patch.object(watchdog, "_LAST_WORDS", 0.5), dog.leaving():
            threading.Event().wait()


@pytest.mark.fault("a disk that hangs, when the run ends for a rank that died")
def test_what_cannot_be_closed_keeps_nobody_alive() -> None:
    code, said = ends(2, cannot_close)[0]
    assert code == 3
    assert said.startswith("PeerError: rank 1 is gone, last heard of at step 0; then what was open could not be closed")
    assert "cannot_close" in said


def hangs_and_cannot_say_so(rank: int, dog: Watchdog) -> None:
    class Stuck(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            threading.Event().wait()

    watchdog.log.addHandler(Stuck())
    with mock.patch.object(watchdog, "_LAST_WORDS", 0.5):
        slow_start(rank, dog)


@pytest.mark.soak
@pytest.mark.fault("a log that hangs, when the run ends for a rank that does")
def test_a_log_that_hangs_keeps_nobody_alive() -> None:
    assert [code for code, _ in ends(2, hangs_and_cannot_say_so)] == [3, 3]
