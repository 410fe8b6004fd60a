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
        store: a connection of its own.
        patience: seconds to wait for an answer.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self._store, self._patience = store, patience
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="board", daemon=True).start()

    def write(self, name: str, note: str) -> None:
        """
        Raises:
            BoardError: see there; so do the others.
        """
        self._ask(lambda: self._store.set(name, note))

    def write_first(self, name: str, note: str) -> str:
        """Writes a note unless there is one; returns the one that is there then."""
        return self._ask(lambda: self._store.compare_set(name, "", note)).decode()

    def read(self, name: str) -> str:
        """A note, empty if there is none."""
        return self._ask(lambda: self._store.get(name) if self._store.check([name]) else b"").decode()

    def close(self) -> None:
        """Lets the thread go."""
        self._calls.put(None)

    def _ask(self, call: Callable[[], T]) -> T:
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
        while task := self._calls.get():
            call, answer = task
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)
