"""Files of exports: where they go, how they are written, what is in them."""

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
"""Makes the files of a folder: contents by name."""


def default_path(checkpoint: Path, name: str) -> Path:
    """``<run folder>/exports/<name>`` for a run's checkpoint, ``<stem>.<name>`` next to any other."""
    folder = checkpoint.absolute().parent
    if folder.name == "checkpoints":
        return folder.parent / "exports" / name
    return folder / f"{checkpoint.stem}.{name}"


def write(path: Path, source: Path, save: Callable[[BinaryIO], None]) -> None:
    """:func:`_write` of one file."""
    _write({path: save}, source)


def write_folder(folder: Path, source: Path, contents: Mapping[str, bytes]) -> None:
    """:func:`_write` of files in a folder; others there stay as they are."""

    def put(content: bytes, file: BinaryIO) -> None:
        file.write(content)

    _write({folder / name: partial(put, content) for name, content in contents.items()}, source)


def _write(files: Mapping[Path, Callable[[BinaryIO], None]], source: Path) -> None:
    """Writes files; whatever happens, each path holds an old or a whole new one; all are written before one replaces.

    Args:
        files: paths, and what writes the content into an open file.
        source: file that the content came from, which must not be overwritten.

    Raises:
        CheckpointError: a path is the source or cannot be written.
    """
    for path in files:
        if path.resolve() == source.resolve():
            raise CheckpointError(f"{path}: is the file to read from; name another output")
    try:
        with contextlib.ExitStack() as stack:
            for path, save in files.items():
                file = stack.enter_context(replacing(path))
                save(file)
                file.flush()  # a full disk is known before any file is replaced
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(
            f"{os.path.commonpath(files)}: cannot write ({error}); name an output in a folder with space and permission"
        ) from error


def save_plain(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """A state dict; the metadata are where PyTorch keeps a state dict's own: ``state._metadata[""]["mcl"]``."""
    state = OrderedDict(weights)
    state._metadata = {"": {"mcl": dict(metadata)}}  # type: ignore[attr-defined]
    torch.save(state, file)


def save_openmmlab(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """A checkpoint of MMEngine: ``state_dict``, and the metadata under ``meta.mcl``."""
    torch.save({"meta": {"mcl": dict(metadata)}, "state_dict": dict(weights)}, file)


def save_detectron2(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """A pickle of arrays whose names detectron2 takes for endings of its own; the metadata under ``mcl``."""
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    content = {"model": arrays, "__author__": "mcl", "matching_heuristics": True, "mcl": dict(metadata)}
    pickle.dump(content, file, protocol=4)


def save_safetensors(weights: Weights, metadata: Metadata, file: BinaryIO) -> None:
    """Tensors; the metadata as JSON under ``mcl`` in the header."""
    file.write(safetensors_bytes(weights, metadata))


def safetensors_bytes(weights: Weights, metadata: Metadata) -> bytes:
    """What :func:`save_safetensors` writes."""
    return safetensors.torch.save(dict(weights), {"format": "pt", "mcl": json.dumps(metadata)})


def json_bytes(content: Any) -> bytes:
    """A file beside the weights."""
    return json.dumps(content, indent=2).encode()
