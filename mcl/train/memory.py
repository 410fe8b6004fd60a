"""GPU memory of a step: whether it fits, settings that need less, and the measured peak."""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dali_pipelines.loader import MontageLoader
from mcl import distributed
from mcl.config import Config, ConfigError, from_dict, override
from mcl.records.metrics import Record

_GB = 1e9
_RECOMPUTE = "trainer.recompute=true"
_NO_MEMORY = re.compile("out of memory|STATUS_ALLOC_FAILED|can't allocate memory|unable to find an engine")
"""Out-of-memory messages of CUDA libraries, and of PyTorch on a CPU. cuDNN reports the last one if there is no memory
for the workspace of any algorithm."""


class OutOfMemoryError(RuntimeError):
    """A step did not fit into memory; the message names the peak and settings that need less."""


def free(device: torch.device) -> int | None:
    """Bytes of GPU memory that this process can use, including those it already uses; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak(device: torch.device) -> Record:
    """Peak memory of this process since its start, in GB of 10^9 bytes, for a record.

    Returns:
        ``peak_memory_gb``: of tensors on a GPU, or resident memory on a CPU. On a GPU also ``reserved_memory_gb``: all
        memory that PyTorch has reserved. Memory of CUDA, NCCL and DALI is not included.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_memory_gb": allocated / _GB, "reserved_memory_gb": reserved / _GB}
    # Not getrusage's ru_maxrss: a process inherits that of its parent.
    kilobytes = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"peak_memory_gb": 1024 * int(kilobytes[0]) / _GB}


def as_before(config: Config, state: dict[str, Any]) -> Config:
    """The configuration with the ``trainer.accumulate`` of a checkpoint, if it is auto."""
    if config.trainer.accumulate:
        return config
    return override(config, [f"trainer.accumulate={from_dict(state['config']).trainer.accumulate}"])


def fit(config: Config, device: torch.device, loader: MontageLoader) -> Config:
    """Resolves ``trainer.accumulate=auto`` and checks that a step fits into the GPU memory of every process.

    All processes must call it; they get the same result. On CPUs, auto is 1 and nothing is checked.

    Raises:
        ConfigError: a step does not fit; the message names settings that do.
    """
    wanted = config.trainer.accumulate
    stated = config if wanted else override(config, ["trainer.accumulate=1"])
    everyone, needs = distributed.gather_objects(free(device)), _Needs(loader)
    if None in everyone:
        return stated
    least = min(everyone)
    found = needs.smallest(config, least, wanted or 1)
    if found and wanted in (0, found.trainer.accumulate):
        return found
    raise ConfigError(
        f"not enough GPU memory: a step of {loader.plan.images} images per GPU needs {_gb(needs.bytes(stated))}, but "
        f"the GPU of rank {everyone.index(least)} has {_gb(least)} free; {needs.remedies(stated, least)}"
    )


@contextlib.contextmanager
def explained(config: Config, device: torch.device, loader: MontageLoader) -> Iterator[None]:
    """Raises :class:`OutOfMemoryError`, which names remedies, in place of other out-of-memory errors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        needs, took = _Needs(loader), ", PyTorch's cache ".join(f"{size:.1f} GB" for size in peak(device).values())
        raise OutOfMemoryError(
            f"not enough memory: a step of {loader.plan.images} images did not fit into the memory of rank "
            f"{distributed.rank()} (peak {took}; mcl budget counts {_gb(needs.bytes(config))}); "
            f"{needs.remedies(config, free(device) or math.inf, config.trainer.accumulate + 1)}"
        ) from error


class _Needs:
    """Memory that steps need with other settings, for the images of a loader."""

    def __init__(self, loader: MontageLoader) -> None:
        self._images, self._processes = loader.plan.images, loader.plan.world_size
        self._decoded = 3 * float(loader.source.sizes.prod(1).mean()) if loader.device == "gpu" else 0.0

    def bytes(self, config: Config) -> int:
        from mcl.budget.memory import memory  # takes a second to import

        with distributed.alone():
            return memory(config, self._processes, self._decoded)["total"]

    def smallest(self, config: Config, limit: float, least: int) -> Config | None:
        """The configuration with the smallest legal ``trainer.accumulate`` >= `least` that fits, or None."""
        for parts in config.parts(self._images):
            if parts >= least:
                with contextlib.suppress(ConfigError):  # BatchNorm would have a single value
                    found = override(config, [f"trainer.accumulate={parts}"])
                    if self.bytes(found) <= limit:
                        return found
        return None

    def remedies(self, config: Config, limit: float, least: int = 1) -> str:
        """Settings that fit, in words; `least` is the lowest number of micro-batches without recomputing."""
        found = [self.smallest(config, limit, least)]
        if not config.trainer.recompute and not config.trainer.compile:
            recomputed = self.smallest(override(config, [_RECOMPUTE]), limit, config.trainer.accumulate)
            if recomputed and (not found[0] or recomputed.trainer.accumulate < found[0].trainer.accumulate):
                found.insert(0, recomputed)
        said = [self._describe(config, other) for other in found if other]
        return f"set {' or '.join(said)}" if said else "use more GPUs, or a smaller trainer.global_batch"

    def _describe(self, config: Config, other: Config) -> str:
        words, said = [], f"needs {_gb(self.bytes(other))}"
        if other.trainer.recompute != config.trainer.recompute:
            words = [_RECOMPUTE]
        if other.trainer.accumulate != config.trainer.accumulate:
            words.append(f"trainer.accumulate={other.trainer.accumulate}")
            return f"{' '.join(words)} ({said}; new runs only: it changes the batches that BatchNorm normalises)"
        return f"{' '.join(words)} ({said}, same results)"


def _gb(size: float) -> str:
    return f"{size / _GB:.1f} GB"
