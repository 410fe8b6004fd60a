"""Other precisions and variants learn as well as fp32: 200 steps on photographs, compared with five seeds in fp32.

Rounding changes the course of a run, and five seeds give a rough estimate of deviations, so distances differ by CPU.
Accumulated gradients are compared with steps of the whole batch whose BatchNorms take the statistics of micro-batches:
these alone raise the loss, by two to four deviations (docs/design.md).
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mcl import config
from mcl.train.trainer import Trainer
from tests.step import normalize_parts

Curve = npt.NDArray[np.float64]

STEPS, WINDOW, SEEDS = 200, 20, 5
WAYS = {  # and into how many parts BatchNorm divides a batch
    "trainer.precision=bf16": 1,
    "trainer.compile=true": 1,
    "trainer.recompute=true": 1,
    "trainer.accumulate=2": 2,
}
_CONFIG = {
    "montage": {"cells": 1, "ratios": [1, 2], "images_per_canvas": [1, 4]},
    "model": {
        **{"backbone": "resnet18", "width": 64, "head_convs": 2, "hidden": 256},
        **{"temperature": 0.2, "loss_weights": [0.5, 0.5]},
    },
    "optim": {"name": "adamw", "base_lr": 4e-3, "weight_decay": 1e-2, "warmup_epochs": 5, "clip_norm": 5, "ema": 0.95},
    "trainer": {"global_batch": 64, "precision": "fp32", "epochs": 80},
    "log": {"tensorboard": False, "preview": False},
}


def windows(photos: Path, folder: Path, word: str, parts: int = 1) -> Curve:
    """Mean loss of every 20 steps; `parts`: see :func:`~tests.step.normalize_parts`."""
    words = [word, f"data.root={photos / 'train'}", f"output={folder / str(parts)}", f"name={word.replace('=', '_')}"]
    trainer = Trainer(config.override(config.from_dict(_CONFIG), words))
    assert trainer.steps >= STEPS
    if parts > 1:
        normalize_parts(trainer.model, trainer.loader.plan.geometry.canvases(trainer.images), parts)
    losses = []
    with trainer.loader:
        while trainer.step < STEPS:
            losses.append(trainer.train_step(*next(trainer.loader))[0].loss.item())
            trainer.step += 1
    return np.reshape(losses, (-1, WINDOW)).mean(1)


@pytest.mark.soak
@pytest.mark.parametrize("parts", [1, 2])
def test_they_learn_as_fp32_does(photos: Path, tmp_path: Path, parts: int) -> None:
    seeds = np.stack([windows(photos, tmp_path, f"trainer.seed={seed}", parts) for seed in range(SEEDS)])
    mean, deviation = seeds.mean(0), seeds.std(0, ddof=1)
    assert mean[-1] < mean[0] - 10 * deviation[0]  # something is learned at all
    distance = {
        word: np.abs(windows(photos, tmp_path, word) - mean) / deviation
        for word, batchnorm in WAYS.items()
        if batchnorm == parts
    }
    for word, each in distance.items():
        shown = np.array2string(each, precision=2)
        print(f"{word:22} standard deviations from fp32, every {WINDOW} steps: {shown}")
    assert not {word: each.max() for word, each in distance.items() if each.max() > 3}
