"""What all exports share: where a file goes, how it is written, what is reported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mcl.checkpoint import CheckpointError


@dataclass(frozen=True)
class Report:
    """What an export did; ``str()`` of it is meant for the console."""

    path: Path
    """The file written."""
    mapped: int
    """Tensors written."""
    unmapped: Mapping[str, int]
    """Tensors that the target has no place for, by part of the model."""
    missing: tuple[str, ...]
    """Tensors of the target that the file leaves at their initial values."""
    difference: float
    """Largest absolute difference between the features of the two models on a random image."""

    def __str__(self) -> str:
        left = ", ".join(f"{part} {count}" for part, count in self.unmapped.items())
        return (
            f"wrote     {self.path}\n"
            f"tensors   {self.mapped} written; left behind: {left}\n"
            f"missing   {', '.join(self.missing) or 'none'}\n"
            f"verified  largest difference of the features on a random image: {self.difference:g}"
        )


def default_path(checkpoint: Path, name: str) -> Path:
    """``<run folder>/exports/<name>`` for a run's checkpoint, ``<stem>.<name>`` next to any other."""
    folder = checkpoint.absolute().parent
    if folder.name == "checkpoints":
        return folder.parent / "exports" / name
    return folder / f"{checkpoint.stem}.{name}"


def write(content: Any, path: Path, source: Path) -> None:
    """Saves with ``torch.save``; whatever happens, `path` holds the old file or the whole new one.

    Args:
        source: file that the content came from, which must not be overwritten.

    Raises:
        CheckpointError: `path` is the source or cannot be written.
    """
    if path.resolve() == source.resolve():
        raise CheckpointError(f"{path}: is the file to read from; name another output")
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if partial.is_file():
            partial.unlink()
        raise CheckpointError(
            f"{path}: cannot write ({error}); name a file in a folder with space and permission"
        ) from error
