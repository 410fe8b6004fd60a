"""Starts one process per device of this machine with PyTorch's elastic launcher, if no other launcher did."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mcl.config import ConfigError
from mcl.distributed import launch
from mcl.signals import Interrupted

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_LAUNCHED = "MCL_LAUNCHED"
"""Environment variable of the processes that this module starts; mcl.cli then lets the launcher print errors."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class ProcessError(RuntimeError):
    """A process of the run failed; the message is that of its error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def devices(key: str, wanted: Any, gpus: int, fits: Callable[[int], bool]) -> list[int]:
    """Numbers of the devices to start processes on; ``[0]`` if another launcher started this process.

    Args:
        key: key of the configuration, for errors.
        wanted: its value: a number of processes, a list of GPUs, or auto for as many GPUs as fit.
        gpus: number of GPUs that PyTorch sees; 0 if they are not used.
        fits: whether the batch can be divided among a number of processes.

    Raises:
        ConfigError: there are no such GPUs.
    """
    launch.world_size()  # raises if the variables are not those of torchrun
    if {"WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return [0]
    if wanted == "auto":
        most = max((n for n in range(1, gpus + 1) if fits(n)), default=1)
        if most < gpus:
            print(f"{gpus - most} of {gpus} GPUs stay idle: the batch can be divided among {most} at most", flush=True)
        return list(range(most))
    numbers = list(range(wanted)) if isinstance(wanted, int) else list(wanted)
    if not (gpus or isinstance(wanted, int)):
        raise ConfigError(f"{key}: a list selects GPUs, but there are none; set a number to start processes on the CPU")
    if gpus and max(numbers) >= gpus:
        wrong = (
            f"{wanted} processes need {wanted} GPUs" if isinstance(wanted, int) else f"there is no GPU {max(numbers)}"
        )
        raise ConfigError(f"{key}: {wrong}; PyTorch sees {gpus}")
    return numbers


def run(words: Sequence[str], numbers: Sequence[int], key: str, gpus: int, timeout: float) -> None:
    """Runs ``mcl`` in one process per device, and waits for all of them.

    As under torchrun, a process that fails ends the others, and all processes receive SIGTERM and Ctrl-C.

    Args:
        words: the verb and its arguments.
        numbers: numbers of the devices.
        key: key of the configuration that names the devices.
        gpus: as in :func:`devices`.
        timeout: seconds in which the processes must save and end after a signal.

    Raises:
        ProcessError: a process failed.
        Interrupted: a signal ended the processes after a checkpoint was saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = "one per GPU" if gpus else "on the CPU"
    many = f"es, {where}; {key}=1 starts one" if len(numbers) > 1 else f" on GPU {numbers[0]}"
    print(f"starting {len(numbers)} process{many}", flush=True)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # mcl prints one line
    with _environment(numbers, gpus, timeout), tempfile.TemporaryDirectory(prefix="mcl-") as logs:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=len(numbers),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",  # the name of the machine may not resolve
            max_restarts=0,
            monitor_interval=0.5,
            logs_specs=DefaultLogsSpecs(log_dir=logs),  # PyTorch would not remove its default folder
        )
        try:
            elastic_launch(settings, sys.executable)("-m", "mcl", *words)
        except SignalException as error:
            raise Interrupted(128 + error.sigval) from None
        except ChildFailedError as error:
            raise _first(error) from None


def _first(error: "ChildFailedError") -> ProcessError:
    """The failure that caused the others."""
    said = []
    for rank, failure in error.failures.items():
        recorded: Any = failure.message
        text = recorded["message"] if isinstance(recorded, dict) else f"rank {rank}: {recorded}"
        kind, _, message = text.partition(": ")
        said.append((kind == "PeerError", failure.timestamp, message if kind.endswith("Error") else text, failure))
    *_, message, failure = min(said, key=lambda one: one[:2])
    return ProcessError(message, failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


@contextlib.contextmanager
def _environment(numbers: Sequence[int], gpus: int, timeout: float) -> Iterator[None]:
    """Sets the environment of the processes: their GPUs, share of the cores, and time to save after a signal."""
    environment, handlers = dict(os.environ), {number: signal.getsignal(number) for number in _HANDLED}
    os.environ[_LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(numbers))))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(timeout)))
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(n) for n in range(gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[n] for n in numbers)
    try:
        yield
    finally:  # the launcher has set handlers and variables of its own
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
