"""Configuration of a fine-tuning: an MMDetection file, ``key=value`` words, and what follows from the machine."""

import contextlib
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.config import Config

from mcl.config import ConfigError
from mcl.distributed import launch
from mcl.records.metrics import log


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration and applies ``key=value`` words to it; values are YAML, keys those that the files have.

    Raises:
        ConfigError: no such file, not a configuration of ``mcl finetune``, unknown key, or illegal value.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration; those of mcl are in configs/finetune")
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a Python file may raise anything
        raise ConfigError(f"{path}: cannot read the configuration ({type(error).__name__}: {error})") from error
    if "pretrained" not in config:
        raise ConfigError(f'{path}: not a configuration of mcl finetune; its _base_ must be one, "_base_/runtime.py"')
    for word in overrides:
        _override(config, word)
    config.name = config.name or path.stem
    if Path(config.name).name != config.name:
        raise ConfigError(f"name: {config.name!r} is not a plain folder name")
    for node, key in ((config, "output"), (config, "weights"), (config.data, "root"), (config.data, "index")):
        node[key] = node[key] and os.path.expanduser(node[key])  # the shell leaves data.root=~/coco as it is
    config.work_dir = str(Path(config.output) / config.name)
    adapt(config)
    return config


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
        new = text if isinstance(old, str) else _like(old, yaml.safe_load(text))
    except yaml.YAMLError:
        raise ConfigError(f"{key}: cannot read the value {text!r}") from None
    if old is not None and not isinstance(new, type(old)) and text not in ("null", "~"):
        raise ConfigError(f"{key}: expected {type(old).__name__}, as in {old!r}, got {text!r}")
    node[index] = new


def _like(old: Any, new: Any) -> Any:
    """A value as YAML has it, with the numbers and tuples of the one that it replaces."""
    if old is None or (isinstance(old, float) and isinstance(new, int | str)):
        with contextlib.suppress(ValueError):
            return float(new)  # YAML takes 1e-4, without a point, for a word
    if isinstance(old, list | tuple) and isinstance(new, list):
        return type(old)(_like(old[0], value) if old else value for value in new)
    return new


def _places(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every dotted key of sections and leaves, what holds its value, and the index of the value there."""
    items = node.items() if isinstance(node, (dict, Config)) else enumerate(node) if isinstance(node, list) else ()
    for index, value in items:
        yield f"{prefix}{index}", node, index
        yield from _places(value, f"{prefix}{index}.")


def adapt(config: Config) -> None:
    """Sets what follows from processes and devices: launcher, images per process, mixed precision, BatchNorm.

    Raises:
        ConfigError: an illegal value, ``global_batch`` does not divide by the processes, or something needs a GPU that
            is not there.
    """
    if config.timeout <= 0:
        raise ConfigError(f"timeout: {config.timeout} must be above 0, in seconds")
    if not 0 <= config.data.max_bad_fraction <= 1:
        raise ConfigError(f"data.max_bad_fraction: {config.data.max_bad_fraction} must be between 0 and 1")
    cuda = torch.cuda.is_available()
    config.launcher, processes = _launcher()
    if processes > 1 and not cuda:
        raise ConfigError(f"{processes} processes, but no GPU: MMEngine trains on a CPU in one process; start one")
    if config.global_batch < 1 or config.global_batch % processes:
        raise ConfigError(f"global_batch: {config.global_batch} does not divide by {processes} processes")
    config.train_dataloader.batch_size = config.global_batch // processes
    if config.amp:
        if not cuda:
            raise ConfigError("amp: needs a GPU; leave it out")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    steps = config.train_cfg.max_iters
    if steps < 1:
        raise ConfigError(f"train_cfg.max_iters: {steps} must be at least 1")
    late = [m for scheduler in config.param_scheduler for m in scheduler.get("milestones", ()) if m >= steps]
    if late:
        log.warning(
            "the learning rate will not fall at %s: train_cfg.max_iters=%d; set param_scheduler.1.milestones",
            late,
            steps,
        )
    if not cuda and replace(config.model, "type", "SyncBN", "BN"):
        log.warning("SyncBN is for GPUs; on this CPU it is BN, which computes the same in one process")


def _launcher() -> tuple[str, int]:
    """MMEngine's name of what started this process, and the number of processes."""
    size = launch.world_size()
    return ("pytorch", size) if size > 1 else ("none", 1)


def replace(node: Any, key: str, old: Any, new: Any) -> int:
    """Replaces a value under a key wherever it occurs in nested dictionaries and lists; returns how often it did."""
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
    """The configuration of the dataset that reads files, within those that wrap it."""
    return innermost(dataset["dataset"]) if "dataset" in dataset else dataset
