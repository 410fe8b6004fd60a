"""SIGTERM and Ctrl-C: training saves after the current step and ends; a second signal ends any verb in ten seconds."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

_AGAIN = 2.0
"""Seconds in which a second signal counts as a repetition of the first: a terminal or scheduler sends a signal to all
processes, and torchrun then sends it again."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run after a checkpoint was saved.

    Args:
        code: exit code of the process: 128 + the signal's number, as in a shell.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Signals:
    """Within the context, SIGINT and SIGTERM are only recorded in `received`. A later SIGINT has its default effect.

    A second SIGTERM is ignored, since schedulers and torchrun both send one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only the main thread may install handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _AGAIN:
            signal.default_int_handler(number, frame)


# The watcher is a separate process, since this one runs no Python code while C code holds the interpreter. The C part
# of Python's signal handlers writes the number of each signal to the watcher's input, which is closed on exit.
_WATCHER = """
import os, select, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
parent, first = int(sys.argv[1]), 0.0
while said := os.read(0, 1):
    now = time.monotonic()
    if said[0] not in (signal.SIGINT, signal.SIGTERM):
        continue
    if not first:
        first = now
        os.write(2, sys.argv[2].encode())
    elif now - first > float(sys.argv[4]):
        os.write(2, sys.argv[3].encode())
        while time.monotonic() < now + 5 and select.select([0], [], [], now + 5 - time.monotonic())[0]:
            if not os.read(0, 1):
                break
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
        break
"""

_LOST = "a second signal: this process ends within ten seconds; work since the last checkpoint is lost\n"


@contextlib.contextmanager
def a_second_one_ends(first: str) -> Iterator[None]:
    """Within the context, a second signal ends the process. The caller installs handlers.

    Args:
        first: message that is written to stderr at the first signal.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    command = [sys.executable, "-I", "-S", "-c", _WATCHER, str(os.getpid()), first, _LOST, str(_AGAIN)]
    watcher = subprocess.Popen(command, stdin=read, start_new_session=True)  # Ctrl-C does not reach a new session
    os.close(read)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    global _open
    _open = write
    try:
        yield
    finally:
        _open = -1
        signal.set_wakeup_fd(before)
        os.close(write)
        watcher.wait()


_open = -1  # the watcher's input


def _let_go() -> None:
    """Detaches a forked process from the watcher."""
    global _open
    if _open >= 0:
        signal.set_wakeup_fd(-1)
        os.close(_open)
    _open = -1


os.register_at_fork(after_in_child=_let_go)
