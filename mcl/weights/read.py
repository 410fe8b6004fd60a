"""Reads weights from a file or a library, and maps them to canonical names."""

import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from mcl import config
from mcl.config import ModelConfig, all_keys, at_home
from mcl.exporters.canonical import PARTS, beginnings, canonical_names, part
from mcl.exporters.target import Convention
from mcl.models.backbones import Backbone
from mcl.objectives import build
from mcl.train import checkpoint
from mcl.train.checkpoint import CheckpointError
from mcl.weights import files
from mcl.weights.libraries import LIBRARIES
from mcl.weights.names import CONVENTIONS

_CONSTANTS = (".num_batches_tracked", ".relative_position_index", ".attn_mask")
"""Endings of buffers that may be missing: unused counters, and values that depend only on sizes."""
_NORMS = "backbone.body.norms."
"""LayerNorms of maps, which detectors have; classifiers have at most the last one."""

BACKBONES: tuple[str, ...] = next(get_args(key.kind) for key in all_keys(ModelConfig) if key.name == "backbone")


@dataclass(frozen=True)
class Contents:
    """All tensors of a source."""

    source: str
    """As the user wrote it."""
    tensors: Mapping[str, Tensor]
    """Tensors by their names in the source; keys of nested dictionaries are joined by dots."""
    conventions: Mapping[str, Convention] = field(default_factory=lambda: CONVENTIONS)
    """Conventions to try."""
    network: str = ""
    """Word that the prefix of a tensor's name must contain, such as teacher; empty: any prefix."""
    model: Mapping[str, Tensor] | None = None
    """State dict of a checkpoint of mcl, unless the source selects a convention or network."""


def read(source: str, key: str) -> Contents:
    """Reads the tensors of a source.

    Args:
        source: a file or folder (:func:`mcl.weights.files.load`); WORD:FILE, where WORD is one of ``CONVENTIONS`` or a
            network in the file, such as teacher; or torchvision:MODEL or timm:MODEL, which download.
        key: key of the configuration, for errors.

    Raises:
        CheckpointError: the source cannot be read, or has no tensors.
        ConfigError: the library has no such model, or is not installed.
    """
    word, _, rest = source.partition(":")
    if os.path.exists(source) or not rest:
        return _of_file(source, Path(source))
    path = Path(at_home(key, rest))
    if word in LIBRARIES and not os.path.exists(path):
        return Contents(source, dict(LIBRARIES[word](rest, key)), {word: CONVENTIONS[word]})
    contents = _of_file(source, path)
    if word in CONVENTIONS:
        return replace(contents, conventions={word: CONVENTIONS[word]}, model=None)
    return replace(contents, network=word, model=None)


def _of_file(source: str, path: Path) -> Contents:
    content = files.load(path)
    if isinstance(content, dict) and {"format", "config", "model"} <= content.keys():
        state = checkpoint.load(path)
        cfg = config.from_dict(state["config"])
        with torch.device("meta"):
            names = canonical_names(build(cfg, state.get("classes", ())).online)
        tensors = dict(_canonical(state["model"], names))
        return Contents(source, tensors, {"mcl": CONVENTIONS["mcl"]}, model=state["model"])
    tensors = dict(files.flatten(content))
    if not tensors:
        raise CheckpointError(f"{path}: has no named tensors; expected a state dict, or a checkpoint with one")
    return Contents(source, tensors)


def _canonical(model: Mapping[str, Tensor], names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.items():
        network, _, rest = name.partition(".")
        yield f"{network}.{names.get(rest, rest)}", tensor


@dataclass(frozen=True)
class Taken:
    """Tensors by canonical names, and a report on all others; ``str()`` gives one line for the log."""

    source: str
    convention: str
    """Convention of the names in the source."""
    prefix: str
    """Prefix of the names in the source, with its dot; may be empty."""
    names: Mapping[str, str]
    """From canonical names to names in the convention, for the wanted tensors that the convention can name."""
    weights: Mapping[str, Tensor]
    """Tensors by canonical names, in the wanted dtypes and shapes."""
    missing: tuple[str, ...]
    """Canonical names of wanted tensors that the source lacks, except constant buffers."""
    kept: tuple[str, ...]
    """Canonical names of LayerNorms of maps that the source lacks, since it is not a detector."""
    shapes: Mapping[str, str]
    """From canonical names of tensors with a wrong shape to a description of the difference."""
    unmapped: tuple[str, ...]
    """Names of the other tensors of the source."""

    def __str__(self) -> str:
        of = Counter(map(part, self.weights))
        left = [f"no {p}: {flaw}" for p in PARTS if (flaw := self.flaw(p))]
        maps = dict.fromkeys(f"C{int(name.split('.')[3]) + 2}" for name in self.kept)
        left += [f"no LayerNorm of {', '.join(maps)}"] * bool(maps)
        taken = ", ".join(f"{name} {n}" for name, n in of.items())
        return "; ".join(
            [f"{self.source}: {taken} tensors, {self.where}", *left, f"unused: {beginnings(self.unmapped)}"]
        )

    @property
    def where(self) -> str:
        """Convention and prefix, in words."""
        return f"names as in {self.convention}" + (f" under {self.prefix[:-1]}" if self.prefix else "")

    def flaw(self, of: str) -> str:
        """Why a part is incomplete; empty if it is complete, or not wanted."""
        own = [name for name in self.names if part(name) == of and not name.endswith(_CONSTANTS)]
        missing = [self.names[name] for name in own if name in self.missing]
        wrong = [self.shapes[name] for name in own if name in self.shapes]
        if len(missing) == len(own):
            return "none of its tensors found" * bool(own)
        kinds = (("are missing", missing), ("are of another shape", wrong))
        flaws = [
            f"{len(names)} of its {len(own)} tensors {what}, the first: {names[0]}" for what, names in kinds if names
        ]
        return "; ".join(flaws)

    def strangers(self) -> list[str]:
        """Unmapped tensors within the backbone's modules, which show that the source has a different backbone."""
        own = [f"{self.prefix}{theirs}".split(".") for name, theirs in self.names.items() if part(name) == "backbone"]
        depth = next((i for i, words in enumerate(zip(*own, strict=False)) if len(set(words)) > 1), 0) + 1
        modules = {tuple(words[:depth]) for words in own}
        others = [name for name in self.unmapped if tuple(name.split(".")[:depth]) in modules]
        return [name for name in others if not name.endswith(_CONSTANTS)]


def take(contents: Contents, wanted: Mapping[str, Tensor], backbone: str, parts: Sequence[str] = ()) -> Taken:
    """Finds the tensors of a backbone, and those of an FPN and a region head if these are complete.

    If a file has several networks, the first one is used, which usually is the online network.

    Args:
        contents: result of :func:`read`.
        wanted: tensors with the wanted shapes and dtypes, by canonical names; includes the whole backbone.
        backbone: name of the backbone, a value of ``model.backbone``.
        parts: parts to return, which must be complete; empty: the backbone, and the other parts that are complete.

    Raises:
        CheckpointError: the backbone or one of `parts` is incomplete or has wrong shapes, or a weight is not finite.
    """
    found = _match(contents, wanted, backbone)
    if found is None or all(name.endswith(_CONSTANTS) for name in found.weights):
        under = f" under {contents.network}" if contents.network else ""
        raise CheckpointError(
            f"{contents.source}: no tensors of a {backbone}{under}, named as in {', '.join(contents.conventions)}; "
            f"its names begin with {beginnings(contents.tensors)}"
        )
    flaws = {of: found.flaw(of) for of in ("backbone", *parts)}
    if strangers := found.strangers():
        flaws["backbone"] = flaws["backbone"] or f"{len(strangers)} unexpected tensors, the first: {strangers[0]}"
    for of, flaw in flaws.items():
        if flaw:
            what, hint = (backbone, _hint(contents)) if of == "backbone" else (of, "")
            raise CheckpointError(f"{contents.source}: has no complete {what}, {found.where}: {flaw}{hint}")
    whole = [of for of in (parts or PARTS) if not found.flaw(of)]
    weights = {name: tensor for name, tensor in found.weights.items() if part(name) in whole}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{contents.source}: weights are not finite, e.g. {found.names[name]}")
    return replace(found, weights=weights)


def _match(contents: Contents, wanted: Mapping[str, Tensor], backbone: str) -> Taken | None:
    """The result of the convention that finds most complete parts, then most tensors."""

    def score(found: Taken) -> tuple[int, int]:
        present = {part(name) for name in found.weights}
        return sum(not found.flaw(of) for of in present), len(found.weights)

    found = [_by(name, contents, wanted, backbone) for name in contents.conventions]
    return max(filter(None, found), key=score, default=None)


def _by(form: str, contents: Contents, wanted: Mapping[str, Tensor], backbone: str) -> Taken | None:
    convention = contents.conventions[form]
    names = {name: theirs for name in wanted if (theirs := convention.name_of(name, backbone)) is not None}
    known, places = set(names.values()), Counter[str]()
    for name in contents.tensors:
        words = name.split(".")
        for i in range(len(words)):
            if ".".join(words[i:]) in known and (not contents.network or contents.network in words[:i]):
                places["".join(f"{word}." for word in words[:i])] += 1
    if not places:
        return None
    prefix = max(places, key=places.__getitem__)  # the first of equals
    weights, missing, shapes = {}, [], {}
    for name, theirs in names.items():
        tensor, shape = contents.tensors.get(prefix + theirs), convention.adapt({theirs: wanted[name]})[theirs].shape
        if tensor is None:
            missing += [name] * (not name.endswith(_CONSTANTS) and not name.startswith(_NORMS))
        elif tensor.shape != shape:
            shapes[name] = f"{prefix}{theirs}, {list(tensor.shape)} instead of {list(shape)}"
        else:
            weights[name] = convention.restore(theirs, tensor).to(wanted[name].dtype).view(wanted[name].shape)
    kept = tuple(name for name in wanted if name.startswith(_NORMS) and name not in weights | shapes)
    used = {prefix + theirs for theirs in known}
    unmapped = tuple(name for name in contents.tensors if name not in used)
    return Taken(contents.source, form, prefix, names, weights, tuple(missing), kept, shapes, unmapped)


def _hint(contents: Contents) -> str:
    """Which supported backbone the source has; otherwise the beginnings of its names."""
    for name in BACKBONES:
        found = _match(contents, backbone_tensors(name), name)
        if found and not found.flaw("backbone") and not found.strangers():
            return f". It is a {name}"
    return f". Its names begin with {beginnings(contents.tensors)}"


@functools.cache
def backbone_tensors(name: str) -> dict[str, Tensor]:
    """Tensors of one of mcl's backbones by canonical names, on the device meta."""
    with torch.device("meta"):
        return {f"backbone.body.{key}": tensor for key, tensor in Backbone(name).state_dict().items()}
