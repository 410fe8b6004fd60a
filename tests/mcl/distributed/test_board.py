"""Notes between processes, and what becomes of them when who keeps them is stopped or killed."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Barrier, Thread

import pytest
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from mcl.config import ConfigError
from mcl.distributed import launch
from mcl.distributed.board import Board, BoardError
from tests.mcl.ranks import free_port


def keep(answer: Connection) -> None:
    """A store, until the end of its process."""
    store = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    answer.send(store.port)
    signal.pause()


def state(pid: int) -> str:
    """Letter of the kernel: T stopped, Z and X ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def connection(port: int, seconds: float = 60) -> Store:
    patience = timedelta(seconds=seconds)
    return PrefixStore("here", TCPStore("127.0.0.1", port, wait_for_workers=False, timeout=patience))


@pytest.fixture
def keeper() -> Iterator[tuple[int, int]]:
    """Process and port of a store."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["mcl.commands", "tests.mcl.distributed.test_board"])
    ours, theirs = processes.Pipe()
    process = processes.Process(target=keep, args=(theirs,))
    process.start()
    try:
        yield process.pid or 0, ours.recv()
    finally:
        process.kill()
        process.join()


def test_notes_are_read_by_others(keeper: tuple[int, int]) -> None:
    one, other = (Board(lambda: connection(keeper[1]), 60) for _ in range(2))
    assert one.read("a") == [""]
    one.write("a", "note")
    assert other.read("a") == ["note"]
    assert other.read("b", "a") == ["", "note"]
    assert [one.write_first("b", "mine"), other.write_first("b", "theirs")] == ["mine", "mine"]
    assert one.read("b", "a") == ["mine", "note"]
    one.close()
    other.close()


@pytest.mark.fault("SIGSTOP of who keeps the store")
def test_a_stopped_keeper_keeps_nobody_waiting(keeper: tuple[int, int]) -> None:
    board = Board(lambda: connection(keeper[1]), 0.5)
    board.write("a", "note")
    os.kill(keeper[0], signal.SIGSTOP)
    while state(keeper[0]) != "T":
        time.sleep(0.01)
    begun = time.monotonic()
    for _ in range(2):
        with pytest.raises(BoardError, match=r"does not answer since 0 s \(trainer.timeout\): rank 0 or torchrun on"):
            board.read("a")
    assert time.monotonic() - begun < 5
    os.kill(keeper[0], signal.SIGCONT)
    deadline = time.monotonic() + 60
    note = list[str]()
    while not note and time.monotonic() < deadline:
        with contextlib.suppress(BoardError):
            note = board.read("a")
    assert note == ["note"]


def test_a_keeper_that_does_not_even_take_connections(keeper: tuple[int, int]) -> None:
    """PyTorch would wait for its own timeout, on the thread that asks."""
    os.kill(keeper[0], signal.SIGSTOP)
    while state(keeper[0]) != "T":
        time.sleep(0.01)
    board = Board(lambda: connection(keeper[1]), 0.5)
    with pytest.raises(BoardError, match="does not answer"):
        board.read("a")


@pytest.mark.fault("SIGKILL of who keeps the store")
def test_a_keeper_that_is_gone_is_said_to_be(keeper: tuple[int, int]) -> None:
    board = Board(lambda: connection(keeper[1]), 60)
    board.write("a", "note")
    os.kill(keeper[0], signal.SIGKILL)
    while state(keeper[0]) not in "ZX":
        time.sleep(0.01)
    with pytest.raises(BoardError, match="where processes meet is gone, and rank 0 or torchrun on its machine with it"):
        board.read("a")


def meet(port: int, late: int, size: int = 2) -> list[str]:
    """A start of `size` processes; rank `late` comes last. What each finds where they have met."""
    found, others_came = [""] * size, Barrier(size)

    def join(rank: int) -> None:
        store = connection(port)
        if rank == late:
            others_came.wait()
            time.sleep(0.3)
        else:
            Thread(target=others_came.wait).start()
        here = launch.roll_call(store, rank, size, "cpu")
        here.set(f"from {rank}", f"{here.compare_set('first', '', f'start of {late}').decode()}")
        found[rank] = " ".join(here.get(f"from {other}").decode() for other in range(size))

    threads = [Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_each_start_meets_in_a_place_of_its_own(keeper: tuple[int, int]) -> None:
    """The store stays, as torchrun's does; whoever comes first finds the calls of starts that are over."""
    for late in (1, 0, 1, 0):
        assert meet(keeper[1], late) == [f"start of {late} start of {late}"] * 2


def test_a_start_that_came_to_nothing_is_left_behind(keeper: tuple[int, int]) -> None:
    """Rank 0 was killed before it had seen everyone."""
    store = connection(keeper[1])
    PrefixStore("unfinished", store).set("rank 0", "2 processes on cpu")
    store.set(launch._CALL, "unfinished")
    assert meet(keeper[1], 0) == ["start of 0 start of 0"] * 2


def test_a_start_without_rank_0(keeper: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody called, or only in a start that is over."""
    with pytest.raises(ConfigError, match="WORLD_SIZE: rank 0 did not answer; look into its log"):
        launch.roll_call(connection(keeper[1], 1), 1, 2, "cpu")
    meet(keeper[1], 1)
    monkeypatch.setattr(launch, "_ANSWER", timedelta(seconds=1))
    with pytest.raises(ConfigError, match="WORLD_SIZE: rank 0 did not answer; look into its log"):
        launch.roll_call(connection(keeper[1], 1), 1, 2, "cpu")
