"""Checkpoints: the whole state of training, written atomically; the last k are kept.

A file contains plain tensors, numbers, strings and containers, so it loads with ``weights_only=True``: ``format``,
``config`` (the resolved configuration as a dictionary), ``step`` (number of finished steps), ``model``, ``optimizer``,
``scaler``, ``loader``, ``rng`` and ``environment``, and for objectives with labels ``classes``, their names. The
SHA-256 of the zip archive follows the archive, where readers of zip files ignore it. Files of earlier versions have no
checksum.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch

from dali_pipelines.source.files import replacing
from mcl import config
from mcl.config import Config
from mcl.objectives import Objective, build

FORMAT = 1
LAST, BEST = "last.pt", "best.pt"
_CHECKSUM = "sha256"
_TRAILER = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_TRAILER_SIZE = 73  # bytes
_DAMAGED = "use an earlier one of the same folder"
_ALWAYS = {"config": dict, "step": int, "model": dict}
_TO_RESUME = {"optimizer": dict, "scaler": dict, "loader": dict, "files": str, "rng": dict, "environment": dict}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


def save(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Writes ``step_<step>.pt``, points ``last.pt`` at it and deletes all checkpoints but the last `keep` and the best.

    A crash, a signal or a full disk leaves the previous checkpoint in place.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full.
    """
    path = folder / f"step_{state['step']:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for abandoned in folder.glob("*.partial"):  # left by a process that was killed
            abandoned.unlink()
        with replacing(path) as file:
            write({"format": FORMAT, **state}, file)
        _point(folder / LAST, path)
        for old in steps(folder)[:-keep]:
            if old.name != (folder / BEST).resolve().name:
                old.unlink()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(
            f"{path}: cannot save ({error}); earlier checkpoints are unchanged. Free space or correct the folder's "
            "permissions, then start the same command again"
        ) from error
    return path


def mark_best(folder: Path, step: int) -> None:
    """Points ``best.pt`` at the checkpoint of a step, if there is one.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    path = folder / f"step_{step:08d}.pt"
    try:
        if path.exists():
            _point(folder / BEST, path)
    except OSError as error:
        raise CheckpointError(
            f"{folder / BEST}: cannot be written ({error}); correct the folder's permissions"
        ) from error


def _point(link: Path, path: Path) -> None:
    """Replaces a link to a checkpoint in the same folder atomically."""
    partial = link.with_name(f"{link.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(path.name)
    os.replace(partial, link)
    _sync_folder(link.parent)


def write(state: dict[str, Any], file: IO[bytes]) -> None:
    """Writes a state, followed by its checksum."""
    hashing = _Hashing(file)
    torch.save({**state, "checksum": _CHECKSUM}, hashing)  # type: ignore[arg-type]  # torch needs only its methods
    file.write(f"\n{_CHECKSUM} {hashing.hash.hexdigest()}\n".encode())


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name))


def load(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, without executing code in it.

    Raises:
        CheckpointError: no such file, or it is incomplete, damaged or not a checkpoint of mcl.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path}: a folder; name a checkpoint in it, such as {Path(path) / LAST}")
    try:
        checked = _check(Path(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except CheckpointError:
        raise
    except Exception as error:  # an incomplete file fails in the zip reader, the unpickler or the tensor reader
        raise CheckpointError(
            f"{path}: incomplete or not a checkpoint of mcl ({reason(error)}); "
            "use an earlier one of the same folder. mcl import-openselfsup converts checkpoints of the authors' code"
        ) from error
    if not _holds(state, {"format": int, **_ALWAYS}) or state["format"] != FORMAT or not is_weights(state["model"]):
        raise CheckpointError(
            f"{path}: not a checkpoint of mcl (format {FORMAT}); mcl import-openselfsup converts those of the authors' "
            "code"
        )
    if state.pop("checksum", None) is not None and not checked:
        raise CheckpointError(f"{path}: damaged: its checksum is missing; {_DAMAGED}")
    return state


def latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that a run can be resumed from; others are skipped with a warning. None if there is none.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    files = steps(folder)
    for path in reversed(files):
        try:
            state = load(path)
            if not _holds(state, _TO_RESUME):
                raise CheckpointError(f"{path}: contains weights only; start a new run with model.init={path}")
            return state
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the previous one", stacklevel=2)
    if files:
        raise CheckpointError(
            f"{folder}: none of the {len(files)} checkpoints can be read; remove them to start a new run"
        )
    return None


def load_model(path: str | Path) -> tuple[Objective, Config]:
    """Builds the model of a checkpoint with its weights, on the CPU.

    Raises:
        CheckpointError: see :func:`load`.
    """
    return built(load(path), path)


def built(state: dict[str, Any], path: str | Path) -> tuple[Objective, Config]:
    """As :func:`load_model`, for a state that was read from `path`.

    Raises:
        CheckpointError: the weights belong to another model.
    """
    cfg = config.from_dict(state["config"])
    with torch.device("meta"):  # allocates nothing before the shapes have been compared
        model = build(cfg, state.get("classes", ()))
    restore(model, state["model"], path)
    return model, cfg


def restore(model: Objective, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Loads weights strictly. A model on the device meta is moved to the CPU.

    Raises:
        CheckpointError: the weights belong to another model; the message names the first key that differs.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or unexpected or shapes:
        first = (missing + unexpected + sorted(shapes))[0]
        raise CheckpointError(
            f"{path}: weights of another model: {len(missing)} keys missing, {len(unexpected)} unexpected, "
            f"{len(shapes)} of another shape, the first: {first}; set the section model as it was trained"
        )
    if any(tensor.is_meta for tensor in own.values()):
        model.to_empty(device="cpu")
    model.load_state_dict(weights)


def is_weights(content: Any) -> TypeGuard[dict[str, torch.Tensor]]:
    """Whether something is a dictionary of dense tensors on the CPU, and not empty."""
    return (
        isinstance(content, dict)
        and len(content) > 0
        and all(isinstance(name, str) for name in content)
        and all(
            isinstance(t, torch.Tensor) and t.layout is torch.strided and t.device.type == "cpu"
            for t in content.values()
        )
    )


def _holds(state: Any, entries: Mapping[str, type]) -> TypeGuard[dict[str, Any]]:
    return isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in entries.items())


def reason(error: Exception) -> str:
    """Type and first sentence of an error; some have no message."""
    message = str(error).partition("\n")[0].partition(". ")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class _Hashing:
    """A file for ``torch.save`` that hashes everything written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _check(path: Path) -> bool:
    """Verifies the checksum of a file; returns whether it has one.

    Raises:
        CheckpointError: the checksum is wrong.
    """
    with open(path, "rb") as file:
        size = max(0, os.fstat(file.fileno()).st_size - _TRAILER_SIZE)
        file.seek(size)
        trailer = _TRAILER.fullmatch(file.read())
        if trailer is None:
            return False
        file.seek(0)
        whole = hashlib.sha256()
        while part := file.read(min(1 << 24, size - file.tell())):
            whole.update(part)
    if whole.hexdigest().encode() != trailer[1]:
        raise CheckpointError(f"{path}: damaged: its content does not have the checksum at its end; {_DAMAGED}")
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
