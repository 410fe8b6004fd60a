"""Processes that hang end by themselves, and leave behind where they hung."""

import contextlib
import faulthandler
from pathlib import Path
from typing import Self

from mcl import distributed

GRACE = 20.0  # seconds for the timeouts of PyTorch's collectives, which say more, to come first


class Deadline:
    """Ends this process when :meth:`extend` is not called for `timeout` seconds and a grace; a single one is let be.

    Python's ``faulthandler`` does it, without the interpreter: a process that hangs in C code ends, too.

    Args:
        folder: of ``rank_<rank>.txt``, to which the stacks of all threads are written then.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self._timeout = timeout + GRACE
        self._path = folder / f"rank_{distributed.rank()}.txt"

    def __enter__(self) -> Self:
        if distributed.world_size() > 1:
            self._path.parent.mkdir(exist_ok=True)
            self._file = open(self._path, "w")  # as long as the context
        self.extend()
        return self

    def __exit__(self, *exception: object) -> None:
        if distributed.world_size() > 1:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._path.unlink()
            with contextlib.suppress(OSError):  # until the last one
                self._path.parent.rmdir()

    def extend(self) -> None:
        """Notes progress."""
        if distributed.world_size() > 1:
            faulthandler.dump_traceback_later(self._timeout, exit=True, file=self._file)
