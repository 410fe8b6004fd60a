"""Selects the checkpoint that a run continues from, and checks that it belongs to the same run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mcl.config import ConfigError
from mcl.finetune.data import Folder
from mcl.finetune.hooks import Identity
from mcl.finetune.settings import innermost
from mcl.finetune.weights import build
from mcl.records.metrics import log
from mcl.train.checkpoint import CheckpointError, reason

_DECISIVE = ("model", "weights", "parts", "global_batch", "optim_wrapper", "param_scheduler", "randomness")
"""Sections that, together with the data, decide what a run computes."""


def _decisive(config: Config, folder: Folder) -> dict[str, str]:
    """Everything that decides what a run computes, as JSON by section."""
    sections = config.to_dict()
    values = {key: sections[key] for key in _DECISIVE}
    values["data.classes"] = sections["data"]["classes"]
    values["data.root"] = folder.digest
    values["data.fraction"] = [sections["data"]["fraction"], sections["data"]["fraction_seed"]]
    values["pipeline"] = innermost(sections["train_dataloader"])["pipeline"]
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}


def prepare(config: Config, folder: Folder) -> Identity:
    """Makes MMEngine continue from the newest readable checkpoint in the run folder, if there is one.

    Args:
        config: configuration of the run.
        folder: the data, which may have moved.

    Returns:
        A hook that stores in new checkpoints what identifies the run.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
        ConfigError: the folder has another run, or ``resume`` is false.
    """
    sections = _decisive(config, folder)
    files = checkpoints(Path(config.work_dir))
    if files and not config.resume:
        raise ConfigError(f"resume: {config.work_dir} already has a run; give this one another name=")
    if files:
        path, before = newest(files)
        for key, now in sections.items():
            if before.get(key, now) != now:
                raise ConfigError(
                    f"{config.work_dir}: the run in this folder had another {key}; give this one another name="
                )
        config.load_from = str(path)
    config.resume = bool(files)
    return Identity(sections)


def to_test(config: Config) -> Path:
    """The checkpoint to evaluate: that of ``load_from``, or the newest of the run.

    Raises:
        CheckpointError: the checkpoint cannot be read, or belongs to another detector.
        ConfigError: the run has no checkpoint.
    """
    run = Path(config.output) / config.name
    files = [Path(config.load_from)] if config.load_from else checkpoints(run)
    if config.load_from and not files[0].is_file():
        raise CheckpointError(f"load_from: {files[0]} does not exist")
    if not files:
        raise ConfigError(f"test: {run} has no checkpoint; name the run by name=, or a checkpoint by load_from=")
    path, _ = newest(files)
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    own = build(config.model).state_dict()
    if wrong := [name for name, tensor in own.items() if name not in found or found[name].shape != tensor.shape]:
        raise CheckpointError(
            f"{path}: of another detector: {len(wrong)} of {len(own)} tensors are missing or have another shape, the "
            f"first: {wrong[0]}; use the configuration and data.classes that it was trained with"
        )
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first."""
    steps = {path: path.stem.removeprefix("iter_") for path in folder.glob("iter_*.pth")}
    files = [path for path, step in steps.items() if step.isdigit()]
    return sorted(files, key=lambda path: int(steps[path]), reverse=True)


def newest(files: list[Path]) -> tuple[Path, Mapping[str, Any]]:
    """The first readable checkpoint, and the sections that identify its run; MMEngine may leave incomplete files.

    Raises:
        CheckpointError: no checkpoint can be read.
    """
    for path in files:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return path, dict(state["meta"].get("mcl", {}))
        except Exception as error:  # an incomplete file fails in the zip reader, the unpickler or the tensor reader
            said = f"{path}: incomplete ({reason(error)})"
            if path != files[-1]:
                log.warning("%s; trying the previous one", said)
    others = f"; none of the {len(files)} checkpoints can be read" if len(files) > 1 else ""
    raise CheckpointError(f"{said}{others}; remove what cannot be read to start a new run")
