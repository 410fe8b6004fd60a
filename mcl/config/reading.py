"""Reads configurations from YAML, words and dictionaries, and lists their keys."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError, WrapValidator

from dali_pipelines.settings import ConfigError, Trait, can_be_named
from mcl.config.configuration import Config
from mcl.plain_yaml import parse_yaml

PRESETS = Path(__file__).parents[1] / "presets"
"""Folder of the presets of ``mcl pretrain``."""

DETECTORS = Path(__file__).parents[1] / "finetune" / "configs"
"""Folder of the presets of ``mcl finetune``."""

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration: a leaf of the tree."""

    name: str
    """Dotted name, such as data.root."""
    kind: Any
    """Type of its values as they are written."""
    default: Any
    documentation: str
    traits: frozenset[Trait]

    @property
    def is_text(self) -> bool:
        """Whether its value is text or one of several words."""
        return self.kind is str or get_origin(self.kind) is Literal


def all_keys(section: type = Config, prefix: str = "", traits: frozenset[Trait] = frozenset()) -> Iterator[Key]:
    """Yields every key, in the order of declaration; `traits` are those of the section."""
    for name, field in section.__pydantic_fields__.items():  # type: ignore[attr-defined]
        own = traits | {trait for trait in field.metadata if isinstance(trait, Trait)}
        if dataclasses.is_dataclass(field.annotation):
            yield from all_keys(field.annotation, f"{prefix}{name}.", own)  # type: ignore[arg-type]
        else:
            documentation = " ".join((field.description or "").split())
            kind = next(
                (v.json_schema_input_type for v in field.metadata if isinstance(v, WrapValidator)), field.annotation
            )
            yield Key(f"{prefix}{name}", kind, field.default, documentation, own)


def value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section: Any = config
    for part in key.split("."):
        section = getattr(section, part)
    return section


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys that have different values and change what a run computes."""
    return [
        key.name
        for key in all_keys()
        if Trait.RESUMABLE not in key.traits and value(before, key.name) != value(now, key.name)
    ]


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists), as in ``config.yaml`` of a run."""
    plain: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return plain


def schema() -> dict[str, Any]:
    """JSON schema of a configuration, with which editors complete and check YAML files."""
    return _ADAPTER.json_schema()


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a configuration.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type or illegal value.
    """
    known = {key.name: key for key in all_keys()}
    for key in _leaves(values):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise ConfigError(f"{key}: no such key; {_nearest(key, list(known))}")
    try:
        return _ADAPTER.validate_python(_texts(values, known))
    except ValidationError as error:
        first, *others = error.errors()
        parts = [str(part) for part in first["loc"]]
        key = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in known), ".".join(parts))
        if first["type"] == "value_error":  # our own checks: `loc` is the section, the message starts with its key
            message = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{key}.{message}" if key else message) from None
        # A key of several types has one error per type.
        same = [first, *(other for other in others if ".".join(map(str, other["loc"])).startswith(f"{key}."))]
        wanted = list(
            dict.fromkeys(one["msg"].removeprefix("Input should be ").partition(", unable")[0] for one in same)
        )
        message = first["msg"] if len(wanted) == 1 else f"Input should be {' or '.join(wanted)}"
        message = message.replace("a valid tuple", "a list, such as [1, 2]")
        got = "nothing" if first["input"] is None else repr(first["input"])
        raise ConfigError(f"{key}: {message} (got {got})") from None


def load(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Reads a YAML file or a preset and applies changes to it (see :func:`override`).

    A change of data.root removes the file's data.val_root, unless that is changed as well.

    Raises:
        ConfigError: no such file or preset, not YAML, or see :func:`from_dict`.
    """
    presets = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    if not Path(path).is_file():
        path = presets.get(str(path), path)
    try:
        values = parse_yaml(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({error.strerror}); presets are {', '.join(presets)}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
    changes = _changes(overrides)
    if "data.root" in changes and isinstance(values.get("data"), dict):
        values["data"].pop("val_root", None)
    return from_dict(_apply(values, changes))


def override(config: Config, overrides: Iterable[str] | Mapping[str, Any]) -> Config:
    """Applies ``key=value`` words, or values by dotted keys, to a configuration. ``key=`` sets the empty text.

    Raises:
        ConfigError: see :func:`from_dict`.
    """
    return from_dict(_apply(to_dict(config), _changes(overrides)))


def _changes(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    texts = {key.name for key in all_keys() if key.is_text}
    values = {}
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"{word!r}: expected key=value")
        try:
            values[key] = text if key in texts else parse_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: cannot read the value {text!r}") from None
    return values


def _apply(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} is not a section")
        node[leaf] = value
    return values


def _texts(values: Mapping[str, Any], keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """Replaces None by the empty text for text keys, and ~ by the home folder in paths.

    Raises:
        ConfigError: there is no home folder.
    """
    result = dict(values)
    for name, value in values.items():
        key = keys.get(f"{prefix}{name}")
        if isinstance(value, Mapping):
            result[name] = _texts(value, keys, f"{prefix}{name}.")
        elif key and key.kind is str and value is None:
            result[name] = ""
        elif key and isinstance(value, str):
            if not can_be_named(value):
                raise ConfigError(f"{key.name}: no file can be called {value!r}; remove what is written with \\")
            result[name] = at_home(key.name, value) if Trait.PATH in key.traits else value
    return result


def at_home(key: str, path: str) -> str:
    """A path with ~ replaced by the home folder, which the shell does not do in data.root=~/images.

    Raises:
        ConfigError: there is no home folder; the message names the key.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and path.split("/")[0] == "~":
        raise ConfigError(f"{key}: {path}: ~ needs a home folder; set HOME, or write the whole path")
    return expanded


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _nearest(key: str, known: list[str]) -> str:
    """Suggests the known key with the same last word or a similar spelling."""
    leaf = key.rsplit(".", 1)[-1]
    close = [k for k in difflib.get_close_matches(key, known, n=1, cutoff=0.5) if _alike(leaf, k.rsplit(".", 1)[-1])]
    same = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    same = difflib.get_close_matches(key, same, n=1, cutoff=0)  # of several, the one in the most similar section
    leaves = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.6)
    similar = [k for k in known if leaves and k.rsplit(".", 1)[-1] == leaves[0]]
    candidates = same or close or similar
    return f"did you mean {candidates[0]}?" if candidates else "see `mcl pretrain --help` for all keys"


def _alike(one: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, one, other).ratio() > 0.4
