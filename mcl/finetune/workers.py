"""Processes that load data: a check of their shared memory, and one-line errors."""

import contextlib
import multiprocessing
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmengine.config import Config

from dali_pipelines.loader import BadDataError
from dali_pipelines.source import SourceError
from mcl import distributed
from mcl.config import ConfigError
from mcl.finetune.decoding import BadImageError
from mcl.finetune.settings import innermost

_SHARED_MEMORY = "/dev/shm"
_WITHOUT = "train_dataloader.num_workers=0 val_dataloader.num_workers=0"
_ENLARGE = "enlarge /dev/shm (docker run --shm-size=8g)"
_PREFETCH = 2  # batches per process, PyTorch's default


class LoaderError(RuntimeError):
    """A process that loads data has ended or hangs; the same command continues the run."""

    exit_code = 3


def check_shared_memory(config: Config) -> None:
    """Compares the free shared memory of the machine with the most that loaders can need.

    Raises:
        ConfigError: the shared memory is too small.
    """
    train, val = (_largest(loader) for loader in (config.train_dataloader, config.val_dataloader))
    # While BatchNorm is re-estimated, there are two loaders of training data.
    needed = distributed.local_world_size() * (2 * train + val) / 2**20
    if not needed:
        return
    with contextlib.suppress(FileNotFoundError):
        free = shutil.disk_usage(_SHARED_MEMORY).free / 2**20
        if free < needed:
            raise ConfigError(
                f"train_dataloader.num_workers: the loaders put up to {needed:.0f} MB into {_SHARED_MEMORY}, "
                f"which has {free:.0f} MB free; {_ENLARGE}, or load in the main process: {_WITHOUT}"
            )


def _largest(loader: Any) -> int:
    """Maximum bytes of the images that a loader's processes hold ready; 0 without processes."""
    steps = innermost(loader)["pipeline"]
    scales = [step.get("scales", step.get("scale", (0, 0))) for step in steps]  # one pair or several
    pixels = max(np.atleast_2d(scale).prod(-1).max() for scale in scales)
    batches = loader.num_workers * loader.get("prefetch_factor", _PREFETCH)
    return int(3 * pixels * loader.batch_size * batches)


@contextlib.contextmanager
def reporting_loader_errors(timeout: float) -> Iterator[None]:
    """Replaces errors of a loader's processes, whose messages are tracebacks, by one-line errors.

    Args:
        timeout: seconds to wait for a batch, for the message.

    Raises:
        LoaderError: a process hangs, or was killed.
        BadDataError: too many images are broken.
        SourceError: an image to evaluate on is broken.
    """
    others = multiprocessing.active_children()
    try:
        yield
    except BadDataError as error:
        raise BadDataError(_last(error)) from None
    except BadImageError as error:
        raise SourceError(f"{_last(error)}; it was readable when the run started; restore it") from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader "):
            raise
        for process in set(multiprocessing.active_children()).difference(others):
            process.kill()  # a hung process would not end by itself, and Python would wait for it at exit
        if "timed out" in str(error):
            raise LoaderError(
                f"no batch came from the loaders' processes for {timeout:.0f} s (timeout): see above for their "
                f"errors, and check that the disk of data.root responds; if memory is short, {_ENLARGE}, or load in "
                f"the main process: {_WITHOUT}. The same command continues the run"
            ) from None
        raise LoaderError(
            f"{str(error).splitlines()[0]}: usually, memory is short; {_ENLARGE}, or set fewer "
            "train_dataloader.num_workers. The same command continues the run"
        ) from error


def _last(error: Exception) -> str:
    """The message at the end of the traceback of a loader's process."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
