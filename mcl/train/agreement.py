"""Checks once, before any work, that all processes of a run have the same code, configuration and images."""

import hashlib
from pathlib import Path

import torch

import dali_pipelines
import mcl
from dali_pipelines.loader import choose_engine, default_threads
from dali_pipelines.source import Source
from mcl import distributed, ops
from mcl.config import Config, ConfigError, Trait, all_keys, value

_BUILT_FROM = Path(mcl.__path__[0]) / "_C.sources.txt"
"""File with a hash of the compiled sources, since a machine may have new Python files and old binaries."""


def check(config: Config, device: str, source: Source, step: int | None) -> None:
    """Compares code, libraries, configuration, images and checkpoints of all processes; one small collective.

    Args:
        config: configuration of the run.
        device: cpu or cuda, where this process trains.
        source: images of the run.
        step: step of the newest checkpoint that this process can read; None: there is none.

    Raises:
        ConfigError: on every process; the message names the ranks that differ from rank 0, in what, and the remedy.
    """
    everyone = distributed.gather_objects(_statement(config, device, source, step))
    for what, (ours, remedy) in everyone[0].items():
        others = {rank: said[what][0] for rank, said in enumerate(everyone) if said[what][0] != ours}
        if others:
            ranks, theirs = ", ".join(map(str, others)), next(iter(others.values()))
            raise ConfigError(f"{what}: {theirs} on rank {ranks}, {ours} on rank 0; {remedy}")


def _statement(config: Config, device: str, source: Source, step: int | None) -> dict[str, tuple[str, str]]:
    """Descriptions of everything that must be equal on all processes, each with a remedy."""
    built = _BUILT_FROM.read_text().strip() if _BUILT_FROM.exists() else "unknown"
    images = f"{len(source)} images with the fingerprint {source.fingerprint()[:12]}"
    keys = [key.name for key in all_keys() if Trait.OF_A_MACHINE not in key.traits]
    doctor, rebuild = "mcl doctor reports why on each machine", dali_pipelines.BUILD
    return {
        "the code of mcl": (_code(), "install the same commit on all machines"),
        "PyTorch": (str(torch.__version__), "install the same version on all machines"),
        "the sources of the extension": (built, f"rebuild it on all machines: {rebuild}"),
        "the operators": (ops.describe(device), f"{doctor}; build the extension on all of them"),
        "the engine of the loader": (
            _engine(config, device),
            f"{doctor}; install the same DALI and plugin on all of them; where cores differ, set data.device",
        ),
        **{key: (repr(value(config, key)), "start all processes with the same configuration") for key in keys},
        "data.root": (images, "give all machines the same files: names, classes, sizes and broken ones"),
        "the newest checkpoint": (
            "none" if step is None else f"of step {step}",
            "put output on a file system that all machines share; warnings name checkpoints that cannot be read",
        ),
    }


def _engine(config: Config, device: str) -> str:
    try:
        threads = config.data.threads or default_threads(distributed.local_world_size())
        engine, on, _ = choose_engine(config.data, device == "cuda", threads)
    except ConfigError as error:  # the loader raises it later, on all processes
        return f"none ({error})"
    if engine == "torchvision":
        return f"{engine} on {on}"
    from nvidia import dali

    return f"{engine} on {on} (DALI {dali.__version__})"


def _code() -> str:
    """A short hash of the Python sources."""
    whole = hashlib.sha256()
    for package in (mcl, dali_pipelines):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            content = file.read_bytes()
            whole.update(f"{package.__name__}/{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
            whole.update(content)
    return whole.hexdigest()[:12]
