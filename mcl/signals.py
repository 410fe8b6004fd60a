"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal
from types import FrameType
from typing import Any, Self


class Interrupted(SystemExit):
    """A signal ended the run, after everything was saved; the exit code is 128 + the signal's number, as in a shell."""


class Signals:
    """Within the context, the first SIGINT or SIGTERM is noted instead of obeyed; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
