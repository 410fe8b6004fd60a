"""Terminal output of a run: steps, warnings and messages of mcl. MMEngine's log file has everything else."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from mcl import distributed
from mcl.records.metrics import eta, log

tqdm.monitor_interval = 0  # starts no thread: loading processes are forked from this one

PAUSE = 10.0
"""Seconds between two lines about progress."""


def route_messages(logger: Any) -> None:
    """Sends MMEngine's messages to its log file, and its steps and warnings also to mcl's log."""
    logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    logger.addHandler(_Relay())
    logger.addFilter(lambda record: "copypaste" not in record.getMessage())  # the AP again, with -1 for missing values


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        step = record.module == "logger_hook" and record.getMessage().startswith("Iter") and "mAP" not in record.msg
        warning = record.levelno >= logging.WARNING and "will be deprecated" not in record.getMessage()
        if (step or warning) and log.isEnabledFor(record.levelno):
            log.handle(record)


class Printed(io.TextIOBase):
    """Sends the output of libraries to MMEngine's log; pycocotools prints -1 for missing values."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def write(self, text: str) -> int:
        if text.strip():
            self._logger.info(text.rstrip().replace("-1.000", "-"))
        return len(text)


@contextlib.contextmanager
def shown(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Shows progress: a bar on a terminal, a line every few seconds elsewhere.

    Yields:
        A function that takes the number of finished units and the number of all units.
    """
    began = said = time.monotonic()
    hidden = None if distributed.rank() == 0 else True  # None: hidden if stderr is not a terminal
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
