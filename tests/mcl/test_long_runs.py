"""Other arithmetic, the same learning: 200 steps on photographs, beside five seeds in fp32."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mcl import config
from mcl.trainer import Trainer

STEPS, WINDOW, SEEDS = 200, 20, 5
WAYS = {
    "bf16": ["trainer.precision=bf16"],
    "compiled": ["trainer.compile=true"],
    "recomputed": ["trainer.recompute=true"],
    "accumulated": ["trainer.accumulate=2"],
}
_CONFIG = {
    "montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]},
    "model": {
        **{"backbone": "resnet18", "width": 64, "head_convs": 2, "hidden": 256},
        **{"temperature": 0.2, "loss_weights": [0.5, 0.5]},
    },
    "optim": {"name": "adamw", "base_lr": 8e-3, "weight_decay": 1e-2, "warmup_epochs": 2, "clip_norm": 5, "ema": 0.95},
    "trainer": {"global_batch": 32, "precision": "fp32", "epochs": 30},
    "log": {"tensorboard": False, "preview": False},
}


def windows(photos: Path, folder: Path, words: list[str]) -> npt.NDArray[np.float64]:
    """Mean loss of every 20 steps."""
    words = [*words, f"data.root={photos / 'train'}", f"output={folder}", "name=" + "_".join(words).replace("=", "_")]
    trainer = Trainer(config.override(config.from_dict(_CONFIG), words))
    assert trainer.steps >= STEPS
    losses = []
    with trainer.loader:
        while trainer.step < STEPS:
            losses.append(trainer.train_step(*next(trainer.loader))[0].loss.item())
            trainer.step += 1
    return np.reshape(losses, (-1, WINDOW)).mean(1)


@pytest.mark.soak
def test_they_learn_as_fp32_does(photos: Path, tmp_path: Path) -> None:
    seeds = np.stack([windows(photos, tmp_path, [f"trainer.seed={seed}"]) for seed in range(SEEDS)])
    mean, deviation = seeds.mean(0), seeds.std(0, ddof=1)
    assert mean[-1] < mean[0] - 10 * deviation[0]  # something is learned at all
    found = {name: windows(photos, tmp_path, words) for name, words in WAYS.items()}
    distance = {name: np.abs(losses - mean) / deviation for name, losses in found.items()}
    for name, each in distance.items():
        print(f"{name:12} standard deviations from fp32, every {WINDOW} steps: {np.array2string(each, precision=2)}")
    assert all(each.max() <= 3 for each in distance.values()), distance
