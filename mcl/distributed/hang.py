"""Ends processes that hang, and writes where they hung.

Python's ``faulthandler`` does this without the interpreter, so it works for processes that hang in C code.
"""

import contextlib
import faulthandler
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mcl import distributed

GRACE = 25.0
"""Seconds after which a hung process ends. PyTorch's timeouts, which report more, come before that; torchrun kills
processes after 30 seconds."""


def end_after(seconds: float) -> None:
    """Ends this process after `seconds`, with the stacks of its threads on stderr. Does nothing with one process."""
    if distributed.world_size() > 1:
        faulthandler.dump_traceback_later(seconds, exit=True)


@contextlib.contextmanager
def deadline(folder: Path, timeout: float) -> Iterator[Callable[[], None]]:
    """Ends this process when there is no progress for `timeout` + ``GRACE`` seconds. Does nothing with one process.

    Args:
        folder: folder of ``rank_<rank>.txt``, to which the stacks of all threads are appended.
        timeout: seconds.

    Yields:
        A function to call when there is progress.
    """
    if distributed.world_size() == 1:
        yield lambda: None
        return
    folder.mkdir(exist_ok=True)
    with open(path := folder / f"rank_{distributed.rank()}.txt", "a") as file:

        def extend() -> None:
            faulthandler.dump_traceback_later(timeout + GRACE, exit=True, file=file)

        extend()
        try:
            yield extend
        finally:
            faulthandler.cancel_dump_traceback_later()
            if not os.fstat(file.fileno()).st_size:
                path.unlink()
                with contextlib.suppress(OSError):  # not empty yet
                    folder.rmdir()
