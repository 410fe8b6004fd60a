"""A run small enough for tests, and whether two of them came to the same."""

from typing import Any

import torch

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"threads": 1},
    "montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]},
    "model": {"backbone": "resnet18", "width": 16, "head_convs": 1, "hidden": 32, "loss_weights": [0.5, 0.5]},
    "optim": {"warmup_epochs": 1},
    "trainer": {"global_batch": 8, "precision": "fp32", "epochs": 2, "log_every": 2, "checkpoint_epochs": 1, "keep": 2},
    "log": {"tensorboard": False, "preview": False},
}
STEPS = 8  # of a TINY run on 32 photographs


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
