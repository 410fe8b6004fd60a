"""Whether a step fits into the memory of the GPUs, what helps where it does not, and how much was taken."""

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
"""How CUDA and its libraries, and PyTorch on a CPU, say that there is no more; the last one is cuDNN's, which found no
memory for the workspace of any algorithm."""


class OutOfMemoryError(RuntimeError):
    """A step did not fit into memory; the message says how much it took and what needs less."""


def free(device: torch.device) -> int | None:
    """Bytes that this process may have on its GPU, those that it has already among them; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak(device: torch.device) -> Record:
    """What this process has taken at most since its start, GB of 10^9 bytes, for a record.

    Returns:
        ``peak_memory_gb``, of tensors on the GPU, or resident on a CPU; on a GPU also ``reserved_memory_gb``, of all
        that PyTorch has set aside there. What CUDA, NCCL and DALI take is in neither.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_memory_gb": allocated / _GB, "reserved_memory_gb": reserved / _GB}
    # Not getrusage's ru_maxrss: Linux hands a parent's peak down to the process that it starts.
    kilobytes = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"peak_memory_gb": 1024 * int(kilobytes[0]) / _GB}


def as_before(config: Config, state: dict[str, Any]) -> Config:
    """With the ``trainer.accumulate`` of a checkpoint, where it is auto."""
    if config.trainer.accumulate:
        return config
    return override(config, [f"trainer.accumulate={from_dict(state['config']).trainer.accumulate}"])


def fit(config: Config, device: torch.device, loader: MontageLoader) -> Config:
    """Resolves ``trainer.accumulate=auto``, and refuses a step for which the GPU of any process has too little memory.

    All processes call it and come to the same. On CPUs auto is 1, and nothing is refused.

    Raises:
        ConfigError: the message names what fits.
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
    """Turns an error for want of memory into an :class:`OutOfMemoryError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        needs, took = _Needs(loader), ", PyTorch's cache ".join(f"{size:.1f} GB" for size in peak(device).values())
        raise OutOfMemoryError(
            f"not enough memory: a step of {loader.plan.images} images did not fit into that of rank "
            f"{distributed.rank()} (peak {took}; mcl budget counts {_gb(needs.bytes(config))}); "
            f"{needs.remedies(config, free(device) or math.inf, config.trainer.accumulate + 1)}"
        ) from error


class _Needs:
    """What steps of other settings need, with the images of a loader."""

    def __init__(self, loader: MontageLoader) -> None:
        self._images, self._processes = loader.plan.images, loader.plan.world_size
        self._decoded = 3 * float(loader.source.sizes.prod(1).mean()) if loader.device == "gpu" else 0.0

    def bytes(self, config: Config) -> int:
        from mcl.budget.memory import memory  # takes a second to import

        with distributed.alone():
            return memory(config, self._processes, self._decoded)["total"]

    def smallest(self, config: Config, limit: float, least: int) -> Config | None:
        """With the smallest ``trainer.accumulate``, `least` or more, that is legal and fits."""
        for parts in config.parts(self._images):
            if parts >= least:
                with contextlib.suppress(ConfigError):  # would leave BatchNorm a single value
                    found = override(config, [f"trainer.accumulate={parts}"])
                    if self.bytes(found) <= limit:
                        return found
        return None

    def remedies(self, config: Config, limit: float, least: int = 1) -> str:
        """What fits, in words; without recomputing, with `least` micro-batches or more."""
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
