"""Processes that hang end by themselves, and leave behind where they hung.

Python's ``faulthandler`` ends them without the interpreter, also where they hang in C code.
"""

import contextlib
import faulthandler
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mcl import distributed

GRACE = 25.0
"""Seconds in which the timeouts of PyTorch's collectives, which say more, come first; torchrun kills at 30."""


def end_after(seconds: float) -> None:
    """Ends this process after a while, with the stacks of all threads on stderr. With one process it does nothing."""
    if distributed.world_size() > 1:
        faulthandler.dump_traceback_later(seconds, exit=True)


@contextlib.contextmanager
def deadline(folder: Path, timeout: float) -> Iterator[Callable[[], None]]:
    """Ends this process when there is no progress for `timeout` seconds and a grace. With one process it does nothing.

    Args:
        folder: of ``rank_<rank>.txt``, to which the stacks of all threads are appended then.

    Yields:
        What to call at every progress.
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
                with contextlib.suppress(OSError):  # until the last one
                    folder.rmdir()
