"""Which checkpoint a run continues from, and whether it is one of the same run."""

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
from mcl.records.metrics import log
from mcl.train.checkpoint import CheckpointError, reason

_DECISIVE = ("model", "weights", "parts", "global_batch", "optim_wrapper", "param_scheduler", "randomness")
"""Sections that decide what a run computes, beside its data."""


def _decisive(config: Config, folder: Folder) -> dict[str, str]:
    """What decides the course of a run, as JSON by section."""
    sections = config.to_dict()
    values = {key: sections[key] for key in _DECISIVE}
    values["data.classes"] = sections["data"]["classes"]
    values["data.root"] = folder.digest
    values["pipeline"] = innermost(sections["train_dataloader"])["pipeline"]
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items()}


def prepare(config: Config, folder: Folder) -> Identity:
    """Lets MMEngine continue from the newest checkpoint in the run folder that can be read, if there is one.

    Args:
        folder: the data, which may have moved.

    Returns:
        The hook by which the checkpoints to come tell what run they are of.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
        ConfigError: the folder holds a run that was not to be continued, or another one.
    """
    sections = _decisive(config, folder)
    files = _checkpoints(Path(config.work_dir))
    if files and not config.resume:
        raise ConfigError(f"resume: {config.work_dir} holds a run already; give this one another name=")
    if files:
        path, before = _newest(files)
        for key, now in sections.items():
            if before.get(key, now) != now:
                raise ConfigError(
                    f"{config.work_dir}: the run in this folder had another {key}; give this one another name="
                )
        config.load_from = str(path)
    config.resume = bool(files)
    return Identity(sections)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    steps = {path: path.stem.removeprefix("iter_") for path in folder.glob("iter_*.pth")}
    files = [path for path, step in steps.items() if step.isdigit()]
    return sorted(files, key=lambda path: int(steps[path]), reverse=True)


def _newest(files: list[Path]) -> tuple[Path, Mapping[str, Any]]:
    """The newest checkpoint that can be read, since MMEngine's writing can be cut, and its decisive sections."""
    for path in files:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return path, dict(state["meta"].get("mcl", {}))
        except Exception as error:  # half a file fails in the zip reader, the unpickler or the tensor reader
            log.warning("%s: incomplete (%s); trying the one before", path, reason(error))
    raise CheckpointError(
        f"{files[0].parent}: none of the {len(files)} checkpoints can be read; remove them to start anew"
    )
