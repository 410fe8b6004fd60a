"""Configuration of a fine-tuning: an MMDetection file, ``key=value`` words, and settings that depend on the machine."""

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from mmengine.config import Config
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from mcl.config import DETECTORS, ConfigError, Devices, at_home, is_folder_name
from mcl.distributed import launch
from mcl.finetune import schedule
from mcl.plain_yaml import parse_yaml
from mcl.records.metrics import log

_TYPES: dict[type, TypeAdapter[Any]] = {bool: TypeAdapter(bool), int: TypeAdapter(int), float: TypeAdapter(FiniteFloat)}
_NUMBER: TypeAdapter[Any] = TypeAdapter(int | FiniteFloat)
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Annotated[int | FiniteFloat | str, Field(union_mode="left_to_right")])
_DEVICES: TypeAdapter[Any] = TypeAdapter(Devices)
_SWITCHES = {"true": True, "false": False}

_PATHS = ("output", "weights", "data.root", "data.index")
_LEAST = {
    **{"global_batch": 1, "val_dataloader.batch_size": 1, "train_cfg.max_iters": 1, "train_cfg.val_interval": 1},
    **{"train_dataloader.num_workers": 0, "val_dataloader.num_workers": 0, "randomness.seed": 0},
    "data.fraction_seed": 0,
}
"""Lowest values of integers."""

_SECTIONS = ("model", "optim_wrapper", "train_dataloader.dataset", "val_dataloader.dataset")
_OURS: dict[str, type] = {
    **dict.fromkeys(("resume", "amp", "timeout", "devices", "data.classes", "data.max_bad_fraction"), object),
    **{"data.fraction": object, "epochs": object, "test": bool},
    **dict.fromkeys((*_SECTIONS, "val_evaluator"), dict),
    **dict.fromkeys(("param_scheduler", "parts"), list),
    **dict.fromkeys(("name", *_PATHS), str),
    **dict.fromkeys(_LEAST, int),
}
"""Types of the keys that mcl reads."""

_OPTIONAL = ("val_dataloader.batch_size", "train_cfg.val_interval", "epochs", "test")
"""Keys that may be missing: MMEngine has defaults, or their absence disables the feature."""


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration and applies ``key=value`` words, for keys that the files have.

    Values of string keys are used as typed; all other values are YAML. For a key that is None, an empty value is None.

    Raises:
        ConfigError: no such file, not a configuration of ``mcl finetune``, unknown key, or illegal value.
    """
    if not path.is_file():
        own = {file.stem: file for file in sorted(DETECTORS.glob("*.py"))}
        if str(path) not in own:
            raise ConfigError(f"{path}: no such file; configurations of mcl are {', '.join(own)}")
        path = own[str(path)]
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a Python file may raise anything
        raise ConfigError(f"{path}: cannot read the configuration ({type(error).__name__}: {error})") from error
    if "pretrained" in config:
        raise ConfigError(f"{path}: pretrained is no longer a key: names are recognised, parts selects what to load")
    if "parts" not in config:
        raise ConfigError(f'{path}: not a configuration of mcl finetune; its _base_ must be one, "_base_/runtime.py"')
    files = {name: node[index] for name, node, index in _places(config)}
    for word in overrides:
        _override(config, word)
    places = {name: (node, index) for name, node, index in _places(config)}
    for key, kind in _OURS.items():
        if key not in places and key in _OPTIONAL:
            continue
        if key not in places:
            raise ConfigError(f"{key}: is missing; set it, or keep its section as it is in the files")
        node, index = places[key]
        if not isinstance(node[index], kind):
            raise ConfigError(f"{key}: expected {kind.__name__}, got {node[index]!r}")
        if key in _PATHS:
            node[index] = at_home(key, node[index])
    config.name = config.name or path.stem
    if not is_folder_name(config.name):
        raise ConfigError(f"name: {config.name!r} is not a plain folder name")
    config.work_dir = str(Path(config.output, config.name, *("test",) * config.get("test", False)))
    _follow(config, files, [word.partition("=")[0] for word in overrides])
    adapt(config)
    return config


def _follow(config: Config, files: Mapping[str, Any], given: Sequence[str]) -> None:
    """Derives settings from the keys of the command line; `files` has the values of the files."""
    schedule.choose_optimizer(config, files.get("optim_wrapper.optimizer.type"), given)
    steps, before = config.train_cfg.max_iters, files.get("train_cfg.max_iters")
    schedule.scale(config, before if isinstance(before, int) and before > 0 else steps, given)
    if config.get("epochs") is not None:
        if "train_cfg.max_iters" in given:
            raise ConfigError("epochs: train_cfg.max_iters is also set; set one of the two")
        config.given = list(given)  # until the number of images is known


def _override(config: Config, word: str) -> None:
    key, separator, text = word.partition("=")
    if not separator:
        raise ConfigError(f"{word!r}: expected key=value")
    places = {name: (node, index) for name, node, index in _places(config)}
    if key not in places:
        close = difflib.get_close_matches(key, places, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "see the configuration file and its _base_"
        raise ConfigError(f"{key}: no such key; {hint}")
    node, index = places[key]
    old = node[index]
    try:
        new = text if isinstance(old, str) else _like(old, parse_yaml(text))
        if new is None and old is not None and text not in ("null", "~"):
            raise ValueError("nothing was given")
        node[index] = new
    except (yaml.YAMLError, ValueError):
        kind = "dict" if isinstance(old, dict) else type(old).__name__
        raise ConfigError(f"{key}: expected {kind}, as in {reprlib.repr(old)}, got {text!r}") from None


def _like(old: Any, new: Any, element: bool = False) -> Any:
    """Converts a value of :func:`~mcl.plain_yaml.parse_yaml` to the type of the value that it replaces.

    Elements of a list get the type of the old list's first element; if it is empty, that of the new value. None can be
    replaced by a number, a boolean or a string.

    Raises:
        ValueError: the value cannot be converted.
    """
    if new is None:
        return None
    if isinstance(new, dict) and (old is None or isinstance(old, dict)):
        return {key: _like((old or {}).get(key), value) for key, value in new.items()}
    if isinstance(new, list) and (old is None or isinstance(old, list | tuple)):
        if old is None:
            return [_like(None, value) for value in new]
        return type(old)(_like(old[0] if old else type(value)(), value, element=True) for value in new)
    if isinstance(new, str) and old is None:
        return _SWITCHES[new] if new in _SWITCHES else _ANYTHING.validate_python(new)
    if isinstance(new, str) and isinstance(old, str):
        return new
    if isinstance(new, str) and isinstance(old, bool | int | float):
        return (_NUMBER if element and type(old) is int else _TYPES[type(old)]).validate_python(new)
    raise ValueError(f"{new!r} is of another kind than {old!r}")


def _places(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every dotted key of sections and leaves, with the container and the index of its value."""
    items = node.items() if isinstance(node, (dict, Config)) else enumerate(node) if isinstance(node, list) else ()
    for index, value in items:
        yield f"{prefix}{index}", node, index
        yield from _places(value, f"{prefix}{index}.")


def adapt(config: Config) -> None:
    """Derives settings from the processes and devices: launcher, images per process, mixed precision, BatchNorm.

    Raises:
        ConfigError: an illegal value, ``global_batch`` is not divisible by the processes, or a setting needs a GPU and
            there is none.
    """
    if not isinstance(config.timeout, int | float) or config.timeout <= 0:
        raise ConfigError(f"timeout: {config.timeout} must be a number above 0, of seconds")
    fraction = config.data.max_bad_fraction
    if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
        raise ConfigError(f"data.max_bad_fraction: {fraction} must be a number between 0 and 1")
    fraction = config.data.fraction
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction: {fraction} must be a number above 0, up to 1; 0.01 are 1%")
    epochs = config.get("epochs")
    if epochs is not None and (type(epochs) not in (int, float) or epochs <= 0):
        raise ConfigError(f"epochs: {epochs} must be a number above 0")
    for key, node, index in _places(config):
        if key in _LEAST and node[index] < _LEAST[key]:
            raise ConfigError(f"{key}: {node[index]} must be at least {_LEAST[key]}")
    try:
        config.devices = _DEVICES.validate_python(parse_yaml(str(config.devices)))
    except (yaml.YAMLError, ValidationError):
        raise ConfigError(f"devices: {config.devices} must be auto, a number or a list of GPUs, as [0,2]") from None
    cuda = torch.cuda.is_available()
    config.launcher, processes = _launcher()
    if processes > 1 and not cuda:
        raise ConfigError(f"{processes} processes, but no GPU: MMEngine trains on a CPU in one process; start one")
    if config.global_batch % processes:
        raise ConfigError(f"global_batch: {config.global_batch} is not divisible by {processes} processes")
    config.train_dataloader.batch_size = config.global_batch // processes
    if config.amp:
        if not cuda:
            raise ConfigError("amp: needs a GPU; remove it")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if not cuda and replace(config.model, "type", "SyncBN", "BN"):
        log.warning("SyncBN is for GPUs; on this CPU it is BN, which computes the same in one process")


def _launcher() -> tuple[str, int]:
    """MMEngine's name of the launcher, and the number of processes."""
    size = launch.world_size()
    return ("pytorch", size) if size > 1 else ("none", 1)


def replace(node: Any, key: str, old: Any, new: Any) -> int:
    """Replaces a value (``...``: any) under a key in nested dictionaries and lists; returns how often it did."""
    count = 0
    if isinstance(node, dict):
        if key in node and (old is ... or node[key] == old):
            node[key] = new
            count += 1
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        count += sum(replace(child, key, old, new) for child in node)
    return count


def innermost(dataset: Any) -> Any:
    """The configuration of the dataset that reads files, inside its wrappers."""
    return innermost(dataset["dataset"]) if "dataset" in dataset else dataset
