"""Notes that all processes of a run can write and read while their collectives hang."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

T = TypeVar("T")


class BoardError(RuntimeError):
    """The board is gone, or does not answer; the message says whose fault it may be."""


class Board:
    """A store whose calls come back, even where its keeper is alive and no longer answers.

    PyTorch's calls wait for such a keeper for ever, so a thread makes them, and is left behind.

    Args:
        connect: makes a connection of the board's own.
        patience: seconds to wait for an answer.
    """

    def __init__(self, connect: Callable[[], Store], patience: float) -> None:
        self._connect, self._patience = connect, patience
        self._calls: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="board", daemon=True).start()

    def write(self, name: str, note: str) -> None:
        """
        Raises:
            BoardError: see there; so do the others.
        """
        self._ask(lambda store: store.set(name, note))

    def write_first(self, name: str, note: str) -> str:
        """Writes a note unless there is one; returns the one that is there then."""
        return self._ask(lambda store: store.compare_set(name, "", note)).decode()

    def read(self, *names: str) -> list[str]:
        """Notes, empty where there are none."""

        def get(store: Store) -> list[bytes]:
            if store.check(list(names)):
                return store.multi_get(list(names))
            return [store.get(name) if store.check([name]) else b"" for name in names]

        return [note.decode() for note in self._ask(get)]

    def close(self) -> None:
        """Lets the thread go."""
        self._calls.put(None)

    def _ask(self, call: Callable[[Store], T]) -> T:
        answer: Future[T] = Future()
        self._calls.put((call, answer))
        try:
            return answer.result(self._patience)
        except dist.DistError:
            raise BoardError(
                "the store where processes meet is gone, and rank 0 or torchrun on its machine with it"
            ) from None
        except TimeoutError:
            raise BoardError(
                f"the store where processes meet does not answer since {self._patience:.0f} s (trainer.timeout): rank "
                "0 or torchrun on its machine hangs, or the network does"
            ) from None

    def _serve(self) -> None:
        store: Store | None = None
        while task := self._calls.get():
            call, answer = task
            try:
                store = store or self._connect()
                answer.set_result(call(store))
            except Exception as error:
                answer.set_exception(error)
