"""Saves checkpoints in the background: training only waits for a copy of the state."""

import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mcl.records.metrics import log
from mcl.train import checkpoint

_PATIENCE = 10.0  # seconds; torchrun kills processes after 30


class Saver:
    """Writes checkpoints (:func:`mcl.train.checkpoint.save`) in background threads, one at a time.

    The threads are daemons, so that a hung disk does not block exit.

    Args:
        folder: folder of the checkpoints.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._pending: futures.Future[None] | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Waits for the previous save, and starts to save a copy of `state`.

        Raises:
            CheckpointError: the previous save failed.
        """
        self.wait()
        snapshot = tree_map_only(Tensor, _to_host, state)
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._pending = futures.Future()
        arguments = (self._pending, snapshot, copied)
        threading.Thread(target=self._write, args=arguments, name="saving", daemon=True).start()

    def check(self) -> None:
        """Raises the error of a failed save; does not wait.

        Raises:
            CheckpointError: see :func:`mcl.train.checkpoint.save`.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint is on the disk.

        Raises:
            CheckpointError: see :func:`mcl.train.checkpoint.save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Waits some seconds for a pending save and ignores its error; for a process that is about to end."""
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
    """An asynchronous copy in host memory, pinned for a GPU; complete when the current stream has reached it."""
    return tensor.detach().to("cpu", non_blocking=True, copy=True)
