"""The curated photographs: reading ``photos.csv`` and building the set that is kept in the repository."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .packages import VERSIONS, DataError, Packages, as_rgb, dhash, fresh_folder, near_duplicate, shrink

SELECTION = Path(__file__).parents[1] / "photos.csv"
SPLITS = ("train", "val")
SHORT_SIDE = 250  # pixels
JPEG_QUALITY = 85
MAX_BYTES = 8_000_000  # of the whole set
MIN_PER_CLASS = 8
DUPLICATE_BITS = 12  # of the 256 bits of a dHash

_LICENCES = ("public-domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0")


@dataclass(frozen=True)
class Photo:
    """One row of ``photos.csv``."""

    label: str
    split: str
    name: str
    title: str
    author: str
    licence: str
    package: str
    archive: str  # a Qt resource file; empty for a plain file
    path: str
    url: str  # origin that the package states; may be empty
    changes: str  # changes that the package's makers state; may be empty
    background: bool  # shows no object of a category in cutouts.json

    @property
    def file(self) -> str:
        """Path in the built set."""
        return f"{self.split}/{self.label}/{self.name}.jpg"

    @property
    def origin(self) -> str:
        """Package, version, path and, where known, address of the original."""
        inside = f"{self.archive}:{self.path}" if self.archive else self.path
        return f"{self.package} {VERSIONS[self.package]}, {inside}" + (f"; {self.url}" if self.url else "")


def read_selection(path: Path = SELECTION) -> list[Photo]:
    """Every photograph of the selection, in file order. Raises ``DataError`` for a row that breaks the set's rules."""
    columns = ["class" if f.name == "label" else f.name for f in fields(Photo)]
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != columns:
            raise DataError(f"{path}: the columns are {reader.fieldnames}, not {columns}")
        rows = list(reader)
    photos = []
    for number, row in enumerate(rows, start=2):
        label, background = row.pop("class"), row.pop("background") == "yes"
        photo = Photo(label=label, background=background, **row)
        if photo.split not in SPLITS:
            raise DataError(f"{path}: row {number}: split {photo.split!r} is not one of {SPLITS}")
        if photo.licence not in _LICENCES or not photo.author:
            raise DataError(f"{path}: row {number}: no author, or licence {photo.licence!r} not in {_LICENCES}")
        photos.append(photo)
    _check(photos, path)
    return photos


def _check(photos: list[Photo], path: Path) -> None:
    repeated = [name for name, count in Counter((p.label, p.name) for p in photos).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: class and name repeat: {repeated}")
    per_class = Counter(p.label for p in photos)
    per_split = Counter((p.label, p.split) for p in photos)
    for label, count in per_class.items():
        if count < MIN_PER_CLASS or any(not per_split[label, split] for split in SPLITS):
            raise DataError(f"{path}: class {label} has {count} photos, or none in a split")


def build_embedded(packages: Packages, out: Path) -> str:
    """Write ``out/{train,val}/<class>/<name>.jpg`` and ``out/CREDITS.csv``; return a summary line.

    Short side 250 px (smaller originals keep their size), RGB JPEG of quality 85, no metadata. Raises ``DataError``
    for near-duplicates, and for a set of more than 8 MB.
    """
    photos = read_selection()
    credits: list[dict[str, str | int]] = []
    hashes: list[np.ndarray] = []
    total = 0
    with fresh_folder(out) as folder:
        for photo in photos:
            original = as_rgb(packages.image(photo.package, photo.path, photo.archive))
            image = shrink(original, short=SHORT_SIDE)
            fingerprint = dhash(image)
            twin = near_duplicate(fingerprint, hashes, DUPLICATE_BITS)
            if twin is not None:
                raise DataError(f"{photo.file} and {photos[twin].file} are near-duplicates")
            hashes.append(fingerprint)
            target = folder / photo.file
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target, "JPEG", quality=JPEG_QUALITY, optimize=True)
            total += target.stat().st_size
            credits.append(_credit(photo, image.size, scaled=image.size != original.size))
        if total > MAX_BYTES:
            raise DataError(f"the photographs take {total} bytes; {MAX_BYTES} are allowed")
        with (folder / "CREDITS.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(credits[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(credits)
    splits = Counter(p.split for p in photos)
    return f"{splits['train']} train and {splits['val']} val photos, {total / 1e6:.2f} MB"


def _credit(photo: Photo, size: tuple[int, int], scaled: bool) -> dict[str, str | int]:
    return {
        "file": photo.file,
        "class": photo.label,
        "split": photo.split,
        "title": photo.title,
        "author": photo.author,
        "licence": photo.licence,
        "origin": photo.origin,
        "width": size[0],
        "height": size[1],
        "changes": "; ".join(filter(None, [photo.changes, "scaled down and re-encoded" if scaled else "re-encoded"])),
    }
