"""Files of exports: paths, writing, and formats."""

import contextlib
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from dali_pipelines.source.files import replacing
from mcl.train.checkpoint import CheckpointError

Weights = Mapping[str, Tensor]
Metadata = Mapping[str, Any]
Save = Callable[[Weights, Metadata, BinaryIO], None]
Pack = Callable[[Weights, Metadata], Mapping[str, bytes]]
"""Returns the files of a folder: contents by name."""


def default_path(checkpoint: Path, name: str) -> Path:
    """``<run folder>/exports/<name>`` for a run's checkpoint, ``<stem>.<name>`` next to any other."""
    folder = checkpoint.absolute().parent
    if folder.name == "checkpoints":
        return folder.parent / "exports" / name
    return folder / f"{checkpoint.stem}.{name}"


def write(path: Path, source: Path, save: Callable[[BinaryIO], None]) -> None:
    """Writes one file; see :func:`_write`."""
    _write({path: save}, source)


def write_folder(folder: Path, source: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files into a folder, whose other files do not change; see :func:`_write`."""

    def put(content: bytes, file: BinaryIO) -> None:
        file.write(content)

    _write({folder / name: partial(put, content) for name, content in contents.items()}, source)


def _write(files: Mapping[Path, Callable[[BinaryIO], None]], source: Path) -> None:
    """Writes files. All are written under temporary names before one replaces an existing file, so that no path
    ever has partial content.

    Args:
        files: by path, a function that writes the content into an open file.
        source: file from which the content was read, and which must not be overwritten.

    Raises:
        CheckpointError: a path is the source or cannot be written.
    """
    for path in files:
        if path.resolve() == source.resolve():
            raise CheckpointError(f"{path}: is the input; choose another output")
    try:
        with contextlib.ExitStack() as stack:
            for path, save in files.items():
                file = stack.enter_context(replacing(path))
                save(file)
                file.flush()  # detects a full disk before any file is replaced
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(
            f"{os.path.commonpath(files)}: cannot write ({error}); choose an output folder with space and permission"
        ) from error


def save_plain(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """Saves a state dict; metadata are in its PyTorch metadata: ``state._metadata[""]["mcl"]``."""
    state = OrderedDict(weights)
    state._metadata = {"": {"mcl": dict(metadata)}}  # type: ignore[attr-defined]
    torch.save(state, file)


def save_openmmlab(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """Saves a checkpoint of MMEngine: ``state_dict``, and the metadata under ``meta.mcl``."""
    torch.save({"meta": {"mcl": dict(metadata)}, "state_dict": dict(weights)}, file)


def save_detectron2(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """Pickles arrays whose names detectron2 matches with suffixes of its own names; the metadata are under ``mcl``."""
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    content = {"model": arrays, "__author__": "mcl", "matching_heuristics": True, "mcl": dict(metadata)}
    pickle.dump(content, file, protocol=4)


def save_safetensors(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """Saves tensors in safetensors format; the metadata are JSON under ``mcl`` in the header."""
    file.write(safetensors_bytes(weights, metadata))


def safetensors_bytes(weights: Weights, metadata: Metadata) -> bytes:
    """The bytes that :func:`save_safetensors` writes."""
    return safetensors.torch.save(dict(weights), {"format": "pt", "mcl": json.dumps(metadata)})


def json_bytes(content: Any) -> bytes:
    """Encodes a JSON file."""
    return json.dumps(content, indent=2).encode()
