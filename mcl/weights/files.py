"""Reads tensors and their names from a file, without executing code in it."""

import argparse
import contextlib
import io
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mcl.train.checkpoint import CheckpointError, reason

_DEPTH = 4
"""Depth to which nested dictionaries are searched for tensors, such as the networks of a training checkpoint."""
_PLAIN = (
    "python -c \"import torch; c = torch.load('{}', map_location='cpu', weights_only=False); "
    "torch.save({{'state_dict': c.get('state_dict', c.get('model', c))}}, 'plain.pth')\""
)


def load(path: Path) -> Any:
    """Reads the content of a file, usually a dictionary of tensors or of nested dictionaries.

    Args:
        path: a file written by ``torch.save``, a safetensors file, or a pickle of NumPy arrays (``.pkl``), which
            detectron2 writes; or a folder with one safetensors file, or whose config.json names one, as on the Hugging
            Face Hub.

    Raises:
        CheckpointError: the file cannot be read, or not without executing code in it.
    """
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):  # any content is possible
            named = json.loads((path / "config.json").read_bytes()).get("weights")
            inside = [file for file in inside if file.name == named] or inside
        if len(inside) != 1:
            raise CheckpointError(f"{path}: a folder with {len(inside)} *.safetensors files; name one of them")
        path = inside[0]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".pkl":
            return _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        with torch.serialization.safe_globals([argparse.Namespace]):  # training options; executes nothing
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read ({error.strerror or error})") from None
    except Exception as error:  # an incomplete file fails in the zip reader, the unpickler or the tensor reader
        if obstacle := re.search(r"GLOBAL (\S+)", str(error)):
            remedy = f"save only its tensors with\n    {_PLAIN.format(path)}\nand use plain.pth"
            raise CheckpointError(
                f"{path}: contains {obstacle[1]} besides tensors, and loading that could run code"
                + ("" if path.suffix == ".pkl" else f". If you trust the file, {remedy}")
            ) from None
        raise CheckpointError(
            f"{path}: incomplete, or not in the format of its extension ({reason(error)}); compare its size with that "
            "of the original"
        ) from error


def flatten(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries, with the keys joined by dots; entries whose keys are not strings are skipped."""
    seen: set[int] = set()  # dictionaries in a file may contain themselves

    def walk(node: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        if not isinstance(node, Mapping) or id(node) in seen or depth > _DEPTH:
            return
        seen.add(id(node))
        for name, value in node.items():
            if isinstance(value, _Array):
                value = value.tensor
            if not isinstance(name, str):
                continue
            if not isinstance(value, Tensor):
                yield from walk(value, f"{prefix}{name}.", depth + 1)
            elif value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized:
                yield prefix + name, value.detach()

    return walk(content, "", 0)


class _Type:
    """Replaces ``numpy.dtype`` in a pickle; supports numbers and booleans only."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"arrays of {self.dtype}")

    def __setstate__(self, state: tuple[int, Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Replaces ``numpy.ndarray`` in a pickle, since NumPy does not verify the sizes that a file states."""

    tensor: Tensor | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Type, bool, bytes | str]) -> None:
        _, shape, kind, fortran, data = state
        self._fill(data.encode("latin1") if isinstance(data, str) else data, kind, shape, "F" if fortran else "C")

    def _fill(self, data: bytes, kind: _Type, shape: tuple[int, ...], order: Any) -> "_Array":
        array = np.frombuffer(data, kind.dtype).reshape(shape, order=order)
        self.tensor = torch.from_numpy(np.array(array, kind.dtype.newbyteorder("="), order="C"))
        return self


_KNOWN = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    "_reconstruct": lambda *_: _Array(),
    "scalar": lambda kind, data: _Array()._fill(data, kind, (), "C"),
    "_frombuffer": lambda *arguments: _Array()._fill(*arguments),
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "__builtin__.bytes": lambda: b"",
    "collections.OrderedDict": OrderedDict,
}


class _Arrays(pickle._Unpickler):
    """Unpickles NumPy arrays and containers only; nothing that a file names is imported or called.

    It extends the unpickler written in Python, since the one in C allocates as much memory as a file states.
    """

    def find_class(self, module: str, name: str) -> Any:
        inside = re.fullmatch(r"numpy\._?core\.(multiarray|numeric)", module)
        known = _KNOWN.get(name if inside else f"{module}.{name}")
        if known is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known

    def _load_bytes(self: Any) -> None:  # of a bytearray, for which the base class allocates memory before reading
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytes}
