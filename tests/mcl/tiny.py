"""A run small enough for tests, and comparison of two runs."""

import shutil
from pathlib import Path
from typing import Any

import torch

from mcl import config
from mcl.config import Config
from mcl.train import checkpoint
from mcl.train.trainer import Trainer

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"threads": 1},
    "montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]},
    "model": {"backbone": "resnet18", "width": 16, "head_convs": 1, "hidden": 32, "loss_weights": [0.5, 0.5]},
    "optim": {"warmup_epochs": 1},
    "trainer": {"global_batch": 8, "precision": "fp32", "epochs": 2, "log_every": 2, "checkpoint_epochs": 1, "keep": 2},
    "log": {"tensorboard": False, "preview": False},
}
STEPS = 8  # steps of a TINY run on 32 photographs


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def resumed_without_its_end(cfg: Config, folder: Path) -> Any:
    """The last checkpoint of a finished run. A copy without it is resumed, and must end with the same bits.

    Args:
        folder: folder for the copy.
    """
    whole = checkpoint.load(cfg.run_folder / "checkpoints" / checkpoint.LAST)
    shutil.copytree(cfg.run_folder, folder / cfg.name)
    (folder / cfg.name / "checkpoints" / f"step_{whole['step']:08d}.pt").unlink()
    resumed = Trainer(config.override(cfg, [f"output={folder}"]))
    assert 0 < resumed.step < whole["step"]
    resumed.fit()
    assert equal(checkpoint.load(resumed.folder / "checkpoints" / checkpoint.LAST)["model"], whole["model"])
    return whole
