"""Processes of a run watch each other: who fails, dies or hangs is named, and nobody waits for it for ever."""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch.distributed as dist

from mcl import distributed
from mcl.distributed.board import BoardError
from mcl.distributed.signals import Interrupted
from mcl.records.metrics import log

_FAILED = "failed"
_MISSED = 5  # signs of life, one after the other, of a process that is gone where a collective broke off
_SILENCE = 60.0  # seconds without a sign of a process that is gone, as long as nothing else tells
_LAST_WORDS = 45.0  # seconds; a save under way may take 30


class PeerError(RuntimeError):
    """Another process of the run failed, died or hangs; the message names it. The same command continues the run."""

    exit_code = 3


@dataclass(frozen=True)
class Sign:
    """Of life, by one process: steps done, collectives begun, and which of its signs it is, from 1 on."""

    step: int
    calls: int
    number: int


_NEVER = Sign(step=0, calls=-1, number=0)


class Watchdog:
    """From :meth:`starting` to the end of :meth:`training`, a thread shows the others how far this process is, and
    looks what became of them.

    It ends this process, with the exit code of :class:`PeerError`, where the main thread waits for one that is gone, or
    hangs with the others; where that comes back with an error, the context says whose fault it was. A single process
    needs none of it.

    Args:
        timeout: seconds without progress in training, or without an answer of the board, that are too many.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._interval = min(1.0, timeout / 10)
        self._silence = min(_SILENCE, timeout)
        self._step = self._signs_given = 0
        self._said = ""  # why the run ends, as the thread has read it
        self._before_end: Callable[[], None] = lambda: None
        self._training, self._returned, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._main = threading.get_ident()

    def advance(self, step: int) -> None:
        """Notes the steps done."""
        self._step = step

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """What may take its time, such as reading the sizes of all images: who is gone is noticed, who is slow is not.

        Raises:
            PeerError: the error in the context is but a consequence of another process' end; or there is no board.
        """
        if distributed.world_size() > 1 and not self._thread.is_alive():
            self._board = distributed.board(self._timeout)
            try:
                self._give_sign()  # or nobody could tell if this process were gone at once
            except BoardError as lost:
                raise PeerError(str(lost)) from None
            self._thread.start()
        try:
            yield
        except BaseException as error:
            self._close(error)
            raise

    @contextlib.contextmanager
    def training(self, before_end: Callable[[], None]) -> Iterator[None]:
        """Steps, each of which is progress.

        Args:
            before_end: called before the thread ends the process.

        Raises:
            PeerError: as in :meth:`starting`.
        """
        self._before_end = before_end
        self._training.set()
        with self.starting():
            yield
        self._close(None)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """What is closed behind the run. If it ends with an error, what hangs here ends the process after a while: the
        others do not wait for it any more, and nobody would notice."""
        error = sys.exception()
        if error is None or distributed.world_size() == 1:
            yield
            return
        said = f"{type(error).__name__}: {error}; then what was open could not be closed, and this process ends"
        code = error.code if isinstance(error, Interrupted) else getattr(error, "exit_code", 1)
        timer = threading.Timer(_LAST_WORDS, self._end, (said, code))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _close(self, error: BaseException | None) -> None:
        if distributed.world_size() == 1:
            return
        self._returned.set()
        try:
            if error is not None and not isinstance(error, Interrupted):
                self._explain(error)
        finally:
            self._over.set()
            self._thread.join(_LAST_WORDS)
            self._board.close()

    def _explain(self, error: BaseException) -> None:
        own = f"rank {distributed.rank()} failed at step {self._step}: {type(error).__name__}: {error}"
        # A collective that broke off is another's doing, unless nobody can be found who did it.
        broken = type(error) is RuntimeError or isinstance(error, dist.DistError)
        try:
            said = self._said or self._publish((self._culprit() if broken else "") or own)
        except BoardError as lost:
            said = self._said or str(lost)
        if said == own or distributed.rank() == 0:
            time.sleep(_MISSED * self._interval)  # rank 0 may be the keeper of what the others have yet to read
        if said != own and broken:
            raise PeerError(said) from error

    def _culprit(self) -> str:
        """Who failed, is gone, or did not come to what broke off; empty if nobody can be found after a while."""
        before = self._signs()
        for _ in range(_MISSED):
            if said := self._published():
                return said
            time.sleep(self._interval)
        signs, own = self._signs(), distributed.rank()
        silent = {rank: sign for rank, sign in signs.items() if sign == before[rank]}
        silent.pop(own, None)  # whose own thread may hang
        behind = {rank: sign for rank, sign in signs.items() if sign.calls < distributed.calls()}
        waiting = f"{_hanging(behind)}: rank {own} has given up waiting; the stack of who hangs is in train.log"
        return self._published() or _gone(silent) or (waiting if behind else "")

    # ------------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        now, looked = 0.0, time.monotonic()
        progress, since = (-1, -1, False), now
        heard: dict[int, tuple[Sign, float]] = {}  # last sign of every process, and when it was first seen
        while not self._over.wait(self._interval):
            # Time in which the whole job was suspended, by a scheduler or Ctrl-Z, is nobody's delay.
            now += min(time.monotonic() - looked, 2 * self._interval)
            looked = time.monotonic()
            if (current := (self._step, distributed.calls(), self._training.is_set())) != progress:
                progress, since, heard = current, now, {}
            try:
                self._give_sign()
                self._said = self._published()
                if not self._said and self._signs_given % _MISSED == 0:
                    # Clocks of machines differ, and are not compared.
                    for rank, sign in self._signs().items():
                        if rank not in heard or heard[rank][0] != sign:
                            heard[rank] = sign, now
                    late = self._training.is_set() and now - since > self._timeout
                    limit = 0.9 * _MISSED * self._interval if late else self._silence
                    silent = {rank: sign for rank, (sign, at) in heard.items() if now - at > limit}
                    if silent:
                        self._said = self._publish(_gone(silent))
                    elif late:
                        self._said = self._publish(_hangs(self._signs(), self._timeout))
            except BoardError as lost:
                self._said = self._said or str(lost)
            if self._said and not self._returned.wait(_MISSED * self._interval):
                self._end(f"{self._said}; this process ends, too,", PeerError.exit_code)

    def _end(self, said: str, code: int) -> None:
        # What hangs may be the disk of the log.
        words = threading.Thread(target=self._last_words, args=(said,), name="last words", daemon=True)
        words.start()
        words.join(_LAST_WORDS)
        os._exit(code)

    def _last_words(self, said: str) -> None:
        # Every process that is stuck says where: the culprit need not be the first to see that it is one.
        stack = traceback.format_stack(sys._current_frames()[self._main])
        log.error("%s at\n%sThe same command continues", said, "".join(stack))
        self._before_end()
        for handler in log.handlers:
            handler.flush()
        sys.stdout.flush()

    # ------------------------------------------------------------------------------------------------ what all can read

    def _publish(self, said: str) -> str:
        """Tells everyone why the run ends; returns what was said first."""
        return self._board.write_first(_FAILED, said)

    def _published(self) -> str:
        return self._board.read(_FAILED)[0]

    def _give_sign(self) -> None:
        self._signs_given += 1
        sign = Sign(self._step, distributed.calls(), self._signs_given)
        self._board.write(_key(distributed.rank()), json.dumps(asdict(sign)))

    def _signs(self) -> dict[int, Sign]:
        """The last one of every process."""
        notes = self._board.read(*map(_key, range(distributed.world_size())))
        return {rank: Sign(**json.loads(note)) if note else _NEVER for rank, note in enumerate(notes)}


def _key(rank: int) -> str:
    return f"sign of rank {rank}"


def _gone(silent: Mapping[int, Sign]) -> str:
    """In words: processes that give no sign of life."""
    return "; ".join(
        f"rank {rank} is gone, {'never heard of' if sign == _NEVER else f'last heard of at step {sign.step}'}"
        for rank, sign in silent.items()
    )


def _hanging(behind: Mapping[int, Sign]) -> str:
    return "; ".join(f"rank {rank} hangs at step {sign.step}" for rank, sign in behind.items())


def _hangs(signs: Mapping[int, Sign], timeout: float) -> str:
    """In words: who keeps the others waiting."""
    fewest = min(sign.calls for sign in signs.values())
    behind = {rank: sign for rank, sign in signs.items() if sign.calls == fewest}
    if behind == signs:
        return f"all processes hang since {timeout:.0f} s (trainer.timeout), none behind the others; see their stacks"
    return (
        f"{_hanging(behind)}: the others wait for it since {timeout:.0f} s (trainer.timeout); its stack is in train.log"
    )
