"""Other arithmetic, the same learning: 200 steps on photographs, beside five seeds in fp32.

Accumulated gradients are compared with steps of the whole whose BatchNorms take micro-batches by themselves, since that
alone makes a difference (tests/mcl/test_step.py), and not a small one: with 16 instead of 32 images the loss is higher
by 0.08 after 200 steps, three to four standard deviations of the seeds.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mcl import config
from mcl.trainer import Trainer
from tests.step import normalize_parts

Curve = npt.NDArray[np.float64]

STEPS, WINDOW, SEEDS = 200, 20, 5
WAYS = {  # words, and in how many parts BatchNorm takes a batch
    "bf16": (["trainer.precision=bf16"], 1),
    "compiled": (["trainer.compile=true"], 1),
    "recomputed": (["trainer.recompute=true"], 1),
    "accumulated": (["trainer.accumulate=2"], 2),
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


def windows(photos: Path, folder: Path, words: list[str], parts: int = 1) -> Curve:
    """Mean loss of every 20 steps; `parts`: see :func:`~tests.step.normalize_parts`."""
    words = [*words, f"data.root={photos / 'train'}", f"output={folder}", "name=" + "_".join(words).replace("=", "_")]
    trainer = Trainer(config.override(config.from_dict(_CONFIG), words))
    if parts > 1:
        normalize_parts(trainer.model, trainer.config.montage.canvases(trainer.images), parts)
    assert trainer.steps >= STEPS
    losses = []
    with trainer.loader:
        while trainer.step < STEPS:
            losses.append(trainer.train_step(*next(trainer.loader))[0].loss.item())
            trainer.step += 1
    return np.reshape(losses, (-1, WINDOW)).mean(1)


@pytest.mark.soak
def test_they_learn_as_fp32_does(photos: Path, tmp_path: Path) -> None:
    expected: dict[int, tuple[Curve, Curve]] = {}
    for parts in (1, 2):
        seeds = range(SEEDS)
        losses = np.stack([windows(photos, tmp_path / str(parts), [f"trainer.seed={s}"], parts) for s in seeds])
        mean, deviation = expected[parts] = losses.mean(0), losses.std(0, ddof=1)
        assert mean[-1] < mean[0] - 10 * deviation[0]  # something is learned at all
    distance = {}
    for name, (words, parts) in WAYS.items():
        losses = windows(photos, tmp_path, words)
        for others, (mean, deviation) in expected.items():
            each = np.abs(losses - mean) / deviation
            whole = "the whole batch" if others == 1 else f"{others} parts of it"
            shown = np.array2string(each, precision=2)
            print(f"{name:12} standard deviations from fp32, BatchNorm of {whole}, every {WINDOW} steps: {shown}")
            if others == parts:
                distance[name] = each
    assert not {name: each.max() for name, each in distance.items() if each.max() > 3}
