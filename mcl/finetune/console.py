"""What a run shows on the terminal: its steps, warnings and what mcl says; all the rest is in MMEngine's log file."""

import contextlib
import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib import DummyTqdmFile

from mcl import distributed
from mcl.records.metrics import eta, log

tqdm.monitor_interval = 0  # no thread: loading processes are forked from this one

PAUSE = 10.0
"""Seconds between two lines about progress."""


def start() -> None:
    """mcl's messages go to the terminal; those of other processes than the first only if something is wrong."""
    rank = distributed.rank()
    terminal = logging.StreamHandler(DummyTqdmFile(sys.stdout))  # keeps messages and bars apart
    terminal.addFilter(lambda record: getattr(record, "console", True))
    terminal.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    log.handlers[:] = [terminal]
    log.propagate = False
    log.setLevel(logging.WARNING if rank else logging.INFO)


def divide(logger: Any) -> None:
    """MMEngine's messages go into its log file, as mcl's do now; its steps and warnings are mcl's messages, too."""
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    logger.handlers[:] = [*files, _Relay()]
    logger.addFilter(lambda record: "copypaste" not in record.getMessage())  # AP once more, absent ones as -1
    for file in files:
        file.addFilter(lambda record: not getattr(record, "relayed", False))
        log.addHandler(file)


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        step = record.module == "logger_hook" and record.getMessage().startswith("Iter") and "mAP" not in record.msg
        warning = record.levelno >= logging.WARNING and "will be deprecated" not in record.getMessage()
        if (step or warning) and log.isEnabledFor(record.levelno):
            record.relayed = True
            log.handle(record)


class Printed(io.TextIOBase):
    """What libraries print, as messages of MMEngine's log; pycocotools writes -1 for what is absent."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def write(self, text: str) -> int:
        if text.strip():
            self._logger.info(text.rstrip().replace("-1.000", "-"))
        return len(text)


@contextlib.contextmanager
def shown(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far something is that takes long: a bar on a terminal, a line every few seconds elsewhere.

    Yields:
        What to tell the number of units done and of all.
    """
    began = said = time.monotonic()
    hidden = None if distributed.rank() == 0 else True  # None: unless it can be drawn
    with tqdm(disable=hidden, delay=1, leave=False, unit=f" {unit}", desc=what) as bar:

        def show(done: int, of: int) -> None:
            nonlocal said
            bar.total = of
            bar.update(done - bar.n)
            now = time.monotonic()
            if bar.disable and now > said + PAUSE:
                said = now
                log.info("%s: %d of %d %s, eta %s", what, done, of, unit, eta((now - began) * (of - done) / done))

        yield show
