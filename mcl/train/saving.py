"""Saving beside the training: a copy of the state is taken in the step's time, all the rest is a thread's work."""

import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mcl.records.metrics import log
from mcl.train import checkpoint

_PATIENCE = 10.0  # seconds, of the 30 that torchrun gives


class Saver:
    """Writes checkpoints (:func:`mcl.train.checkpoint.save`) in threads of their own, one at a time.

    A disk may never answer, so these threads keep no process alive that has come to its end.

    Args:
        folder: of the checkpoints.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._pending: futures.Future[None] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Starts to save; what is in `state` may change when this returns. Waits for the save before.

        Raises:
            CheckpointError: the save before failed.
        """
        self.wait()
        snapshot = tree_map_only(Tensor, _to_host, state)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._pending = futures.Future()
        arguments = (self._pending, snapshot, copied)
        threading.Thread(target=self._write, args=arguments, name="saving", daemon=True).start()

    def check(self) -> None:
        """Raises the error of a save that failed; does not wait.

        Raises:
            CheckpointError: see :func:`mcl.train.checkpoint.save`.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until what was handed in is on the disk.

        Raises:
            CheckpointError: see :func:`mcl.train.checkpoint.save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Gives a save under way some time to end, and does not ask how; for a process that ends."""
        if self._pending is not None:
            futures.wait([self._pending], _PATIENCE)

    def _write(self, pending: futures.Future[None], state: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            log.info("saved %s", checkpoint.save(self._folder, state, self._keep))
            pending.set_result(None)
        except BaseException as error:
            pending.set_exception(error)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; from a GPU into pinned memory, complete when its stream has come by."""
    return tensor.detach().to("cpu", non_blocking=True, copy=True)
