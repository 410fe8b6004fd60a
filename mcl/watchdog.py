"""Processes of a run watch each other: who fails, dies or hangs is named, and nobody waits for it for ever."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

import torch.distributed as dist

from mcl import distributed
from mcl.board import BoardError
from mcl.metrics import log
from mcl.signals import Interrupted

_FAILED = "failed"
_MISSED = 5  # signs of life, one after the other, of a process that is gone


class PeerError(RuntimeError):
    """Another process of the run failed, died or hangs; the message names it. The same command continues the run."""

    exit_code = 3


@dataclass(frozen=True)
class Sign:
    """Of life, by one process: steps done, collectives begun, and which of its signs it is, from 1 on."""

    step: int
    calls: int
    number: int


class Watchdog:
    """Within the context, a thread shows the others how far this process is, and looks what became of them.

    It ends this process, with the exit code of :class:`PeerError`, where the main thread hangs with the others; where
    that comes back with an error, the context says whose fault it was. A single process needs none of it.

    Args:
        timeout: seconds without progress, or without an answer of the board, that are too many.
        before_end: called before the thread ends the process; must not take long.
    """

    def __init__(self, timeout: float, before_end: Callable[[], None]) -> None:
        self._timeout, self._before_end = timeout, before_end
        self._interval = min(1.0, timeout / 10)
        self._step = self._signs_given = 0
        self._said = ""  # why the run ends, as the thread has read it
        self._returned, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.get_ident()

    def advance(self, step: int) -> None:
        """Notes the steps done."""
        self._step = step

    def __enter__(self) -> Self:
        if distributed.world_size() > 1:
            self._board = distributed.board(self._timeout)
            try:
                self._give_sign()  # or nobody could tell if this process were gone at once
            except BoardError as lost:
                raise PeerError(str(lost)) from None
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """
        Raises:
            PeerError: the error in the context is but a consequence of another process' end.
        """
        if distributed.world_size() == 1:
            return
        self._returned.set()
        try:
            if error is not None and not isinstance(error, Interrupted):
                self._explain(error)
        finally:
            self._over.set()
            self._thread.join()
            self._board.close()

    def _explain(self, error: BaseException) -> None:
        own = f"rank {distributed.rank()} failed at step {self._step}: {type(error).__name__}: {error}"
        # A collective that broke off is another's doing, unless nobody can be found who did it.
        broken = type(error) is RuntimeError or isinstance(error, dist.DistError)
        try:
            said = self._said or self._publish((self._culprit() if broken else "") or own)
        except BoardError as lost:
            said = self._said or str(lost)
        if said == own:
            time.sleep(_MISSED * self._interval)  # rank 0 may be the keeper of what the others have yet to read
        elif broken:
            raise PeerError(said) from error

    def _culprit(self) -> str:
        """Who failed, or is gone; empty if nobody is after a while."""
        for _ in range(2):
            if said := self._published() or _gone(self._silent()):
                return said
        return self._published()

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        progress, since = (-1, -1), time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            if (current := (self._step, distributed.calls())) != progress:
                progress, since = current, now
            try:
                self._give_sign()
                self._said = self._published()
                if not self._said and now - since > self._timeout:
                    self._said = self._publish(_gone(self._silent()) or _hangs(self._signs(), self._timeout))
            except BoardError as lost:
                self._said = self._said or str(lost)
            if self._said and not self._returned.wait(_MISSED * self._interval):
                self._end(self._said)

    def _end(self, said: str) -> None:
        # Every process that is stuck says where: the culprit need not be the first to see that it is one.
        log.error("%s; this process ends, too, at\n%sThe same command continues", said, self._stack())
        self._before_end()
        for handler in log.handlers:
            handler.flush()
        sys.stdout.flush()
        os._exit(PeerError.exit_code)

    def _stack(self) -> str:
        return "".join(traceback.format_stack(sys._current_frames()[self._main]))

    # ------------------------------------------------------------------------------------------------ what all can read

    def _publish(self, said: str) -> str:
        """Tells everyone why the run ends; returns what was said first."""
        return self._board.write_first(_FAILED, said)

    def _published(self) -> str:
        return self._board.read(_FAILED)

    def _give_sign(self) -> None:
        self._signs_given += 1
        sign = Sign(self._step, distributed.calls(), self._signs_given)
        self._board.write(_key(distributed.rank()), json.dumps(asdict(sign)))

    def _signs(self) -> dict[int, Sign]:
        """The last one of every process that has given any."""
        notes = {rank: self._board.read(_key(rank)) for rank in range(distributed.world_size())}
        return {rank: Sign(**json.loads(note)) for rank, note in notes.items() if note}

    def _silent(self) -> dict[int, Sign]:
        """Processes that give no sign while this one waits for some; clocks of machines differ and are not compared."""
        before = self._signs()
        for _ in range(_MISSED):
            time.sleep(self._interval)
            self._give_sign()
        return {rank: sign for rank, sign in self._signs().items() if rank in before and before[rank] == sign}


def _key(rank: int) -> str:
    return f"sign of rank {rank}"


def _gone(silent: dict[int, Sign]) -> str:
    """In words: processes that give no sign of life."""
    return "; ".join(f"rank {rank} is gone, last heard of at step {sign.step}" for rank, sign in silent.items())


def _hangs(signs: dict[int, Sign], timeout: float) -> str:
    """In words: who keeps the others waiting."""
    fewest = min(sign.calls for sign in signs.values())
    behind = {rank: sign for rank, sign in signs.items() if sign.calls == fewest}
    if len(behind) == len(signs):
        return f"all processes hang since {timeout:.0f} s (trainer.timeout), none behind the others; see their stacks"
    ranks = "; ".join(f"rank {rank} hangs at step {sign.step}" for rank, sign in behind.items())
    return f"{ranks}: the others wait for it since {timeout:.0f} s (trainer.timeout); its stack is in train.log"
