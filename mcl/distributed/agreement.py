"""Whether all processes of a run do the same; asked once, before any work.

World size and device are compared where processes meet (:func:`mcl.distributed.setup`), everything else here.
"""

import hashlib
from pathlib import Path

import torch

import dali_pipelines
import mcl
from dali_pipelines.loader import choose_engine
from dali_pipelines.source import Source, open_images
from mcl import distributed, ops
from mcl.config import Config, ConfigError, DataConfig, Trait, all_keys, value
from mcl.train import checkpoint

_BUILT_FROM = Path(mcl.__path__[0]) / "_C.sources.txt"
"""Hash that setup.py leaves beside the binaries: a machine may have new Python files and old binaries."""


def check(config: Config, device: str) -> None:
    """Compares code, libraries, configuration and run folder of all processes; one small collective.

    Args:
        device: cpu or cuda, where this process trains.

    Raises:
        ConfigError: on every process; the message names the ranks that differ from rank 0, in what, and the remedy.
    """
    everyone = distributed.gather_objects(_statement(config, device))
    for what, (ours, remedy) in everyone[0].items():
        others = {rank: said[what][0] for rank, said in enumerate(everyone) if said[what][0] != ours}
        if others:
            ranks, theirs = ", ".join(map(str, others)), next(iter(others.values()))
            raise ConfigError(f"{what}: {theirs} on rank {ranks}, {ours} on rank 0; {remedy}")


def open_shared(data: DataConfig) -> Source:
    """The images of ``data.root`` on every process; the first one of each machine brings the index up to date.

    Raises:
        SourceError: see :func:`dali_pipelines.source.open_source`.
        ConfigError: some processes see other images than the rest.
    """
    source = distributed.in_turn(lambda: open_images(data))
    prints = distributed.gather_objects(source.fingerprint())
    others = [str(rank) for rank, fingerprint in enumerate(prints) if fingerprint != prints[0]]
    if others:
        raise ConfigError(
            f"data.root: rank {', '.join(others)} and rank 0 see other images in {data.root} (names, "
            "classes, sizes or broken ones differ); give all machines the same files"
        )
    return source


def _statement(config: Config, device: str) -> dict[str, tuple[str, str]]:
    """What all processes must agree on, in words, and the remedy where they do not."""
    sources = _BUILT_FROM.read_text().strip() if _BUILT_FROM.exists() else "unknown"
    newest = max((path.name for path in checkpoint.steps(config.run_folder / "checkpoints")), default="none")
    engine = _engine(config, device)
    keys = [key.name for key in all_keys() if Trait.OF_A_MACHINE not in key.traits]
    doctor, rebuild = "mcl doctor says on each machine why", "pip install --no-build-isolation -e ."
    return {
        "the code of mcl": (_code(), "install the same commit on all machines"),
        "PyTorch": (str(torch.__version__), "install the same version on all machines"),
        "the sources of the extension": (sources, f"rebuild it on all machines: {rebuild}"),
        "the operators": (ops.describe(device), f"{doctor}; build the extension on all of them"),
        "the engine of the loader": (engine, f"{doctor}; install the same DALI, and build its plugin, on all of them"),
        **{key: (repr(value(config, key)), "start all processes with the same configuration") for key in keys},
        "the newest checkpoint": (newest, "put output on a file system that all machines share"),
    }


def _engine(config: Config, device: str) -> str:
    try:
        engine, on, _ = choose_engine(config.data, device == "cuda")
    except ConfigError as error:  # the loader's to raise, on all processes
        return f"none ({error})"
    if engine == "torchvision":
        return f"{engine} on {on}"
    from nvidia import dali

    return f"{engine} on {on} (DALI {dali.__version__})"


def _code() -> str:
    """Hash of the sources of our packages, short enough to be read out."""
    whole = hashlib.sha256()
    for package in (mcl, dali_pipelines):
        folder = Path(package.__path__[0])
        for file in sorted(folder.rglob("*.py")):
            content = file.read_bytes()
            whole.update(f"{package.__name__}/{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
            whole.update(content)
    return whole.hexdigest()[:12]
