"""What a run shows on the terminal: its steps, warnings and what mcl says; all the rest is in MMEngine's log file."""

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from mcl import distributed
from mcl.records.metrics import eta, log

tqdm.monitor_interval = 0  # no thread: loading processes are forked from this one

PAUSE = 10.0
"""Seconds between two lines about progress."""


def route_messages(logger: Any) -> None:
    """MMEngine's messages go into its log file; its steps and warnings are mcl's messages, too."""
    logger.handlers[:] = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    logger.addHandler(_Relay())
    logger.addFilter(lambda record: "copypaste" not in record.getMessage())  # AP once more, absent ones as -1


class _Relay(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        step = record.module == "logger_hook" and record.getMessage().startswith("Iter") and "mAP" not in record.msg
        warning = record.levelno >= logging.WARNING and "will be deprecated" not in record.getMessage()
        if (step or warning) and log.isEnabledFor(record.levelno):
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
