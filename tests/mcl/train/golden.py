"""Twenty steps in float64 on photographs of the repository, stored as text.

``python -m tests.mcl.train.golden`` writes the file.

Write it only after an intended change of the results of runs, which the changelog then describes. Canvases have two
cells, since with one cell BatchNorm normalises so few values that rounding errors grow by five orders of magnitude.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mcl import config
from mcl.train.trainer import Trainer
from tests.conftest import PHOTOS, ROOT

FILE = ROOT / "tests" / "data" / "golden_r18.txt"

_CONFIG = {
    "name": "golden",
    "data": {"source": "list", "threads": 1},
    "montage": {"cells": 2, "ratios": [1, 2], "images_per_canvas": [1, 4]},
    "model": {"backbone": "resnet18", "width": 16, "head_convs": 1, "hidden": 32, "loss_weights": [0.5, 0.5]},
    "optim": {"warmup_epochs": 1},
    "trainer": {"global_batch": 8, "precision": "fp64", "epochs": 5, "device": "cpu"},
    "log": {"tensorboard": False, "preview": False},
}
_IMAGES = 32


def steps(folder: Path) -> Iterator[list[float]]:
    """Loss, gradient norm, and the losses of both directions at every level, for each step."""
    files = sorted((PHOTOS / "train").rglob("*.jpg"))
    chosen = files[:: len(files) // _IMAGES][:_IMAGES]
    (folder / "list.txt").write_text("".join(f"{file.relative_to(PHOTOS)}\n" for file in chosen))
    (folder / chosen[0].relative_to(PHOTOS).parts[0]).symlink_to(PHOTOS / "train")
    words = [f"data.root={folder / 'list.txt'}", f"output={folder / 'runs'}", f"data.index={folder / 'index'}"]
    trainer = Trainer(config.override(config.from_dict(_CONFIG), words))
    with trainer.loader:
        while trainer.step < trainer.steps:
            output, norm = trainer.train_step(*next(trainer.loader))
            trainer.step += 1
            yield [output.loss.item(), norm.item(), *output.losses.flatten().tolist()]


def read() -> list[list[float]]:
    """The content of the file."""
    return [[float(word) for word in line.split()] for line in FILE.read_text().splitlines()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        lines = [" ".join(map(repr, values)) + "\n" for values in steps(Path(name))]
    FILE.write_text("".join(lines))
    sys.stdout.writelines(lines)
