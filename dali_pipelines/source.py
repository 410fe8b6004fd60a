"""Sources of images: what files there are, their sizes and classes, and which of them cannot be used.

A source is opened once per run. It reads every file's header (not its pixels), so that crop windows can be planned from
the image's size and most broken files are found before training. Broken files stay in the numbering: the plan puts
substitutes in their places, so that the order of the others does not depend on them.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
"""File names taken for images in a folder; a file that then turns out not to be one is listed as bad."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that every engine decodes to the same pixels."""

MAX_PIXELS = 100_000_000
"""A larger image is taken for a broken or hostile file."""


class SourceError(ValueError):
    """Images that cannot be used; the message names the folder or file and the remedy."""


@dataclass(frozen=True)
class Source:
    """n images: their paths, classes and sizes."""

    root: str
    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]  # (n,) class, -1 unknown
    sizes: npt.NDArray[np.int32]  # (n, 2) width, height, pixels; 0, 0 for a bad file
    classes: tuple[str, ...] = ()
    bad: dict[int, str] = field(default_factory=dict)  # what the headers revealed: index -> reason

    def __len__(self) -> int:
        return len(self.paths)

    def digest(self) -> str:
        """Hash of the file names below the root, in order: two sources with the same one number the same images."""
        folder = os.path.dirname(self.root) if os.path.isfile(self.root) else self.root
        names = "\n".join(os.path.relpath(path, folder) for path in self.paths)
        return hashlib.sha256(names.encode()).hexdigest()


def open_source(
    root: str, kind: Literal["auto", "folders", "flat", "list"] = "auto", threads: int = 8, key: str = "data.root"
) -> Source:
    """Finds the images of `root` and reads their headers.

    Args:
        root: a folder of class folders, a flat folder, or a list file (one image per line: a path relative to the
            list's folder, then optionally white space and a class, an integer or a name).
        kind: which of the three; auto: a file is a list, a folder with images directly in it is flat.
        threads: headers read at a time.
        key: of the configuration, for errors.

    Raises:
        SourceError: no such folder, nothing in it, or something unreadable.
    """
    try:
        return _open(root, kind, threads)
    except SourceError as error:
        raise SourceError(f"{key}: {error}") from error.__cause__


def _open(root: str, kind: str, threads: int) -> Source:
    if not root:
        raise SourceError("not set; name a folder of images or a list file")
    if not os.path.exists(root):
        raise SourceError(f"{root} does not exist")
    try:
        if kind == "auto":
            kind = "list" if os.path.isfile(root) else "flat" if _images_in(root) else "folders"
        if (kind == "list") != os.path.isfile(root):
            what = "folder" if kind == "list" else "file"
            raise SourceError(f"{root} is a {what}, but data.source is {kind}")
        paths, names = {"folders": _class_folders, "flat": _flat_folder, "list": _list_file}[kind](root)
    except OSError as error:
        raise SourceError(f"cannot read {error.filename} ({error.strerror})") from error
    if not paths:
        raise SourceError(f"no images in {root} (looked for {', '.join(EXTENSIONS)}; data.source={kind})")
    labels, classes = _number(names)
    with ThreadPoolExecutor(threads) as pool:
        headers = list(pool.map(read_header, paths, chunksize=256))
    sizes = np.array([header if isinstance(header, tuple) else (0, 0) for header in headers], np.int32)
    bad = {i: header for i, header in enumerate(headers) if isinstance(header, str)}
    return Source(root=root, paths=tuple(paths), labels=labels, sizes=sizes, classes=classes, bad=bad)


def read_header(path: str) -> tuple[int, int] | str:
    """(width, height) in pixels as stored, before any EXIF rotation, or why the file cannot be used."""
    try:
        with Image.open(path) as image:
            if image.format not in FORMATS:
                return f"format {image.format} is not supported; convert it to JPEG or PNG"
            if getattr(image, "n_frames", 1) > 1 and image.format != "JPEG":
                return f"{image.format} with {image.n_frames} frames; keep one of them"  # type: ignore[attr-defined]
            width, height = image.size
    except Exception as error:  # broken headers make Pillow raise nearly anything; all of it means a bad file
        return f"not an image: {type(error).__name__}: {error}" if os.path.exists(path) else "no such file"
    if width * height > MAX_PIXELS:
        return f"{width} x {height} pixels; more than {MAX_PIXELS} are refused"
    return width, height


def _images_in(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if e.name.lower().endswith(EXTENSIONS) and not e.name.startswith("."))


def _images_below(folder: str) -> list[str]:
    found: list[str] = []
    for directory, folders, _ in os.walk(folder, followlinks=True, onerror=_raise):
        folders.sort()
        found += _images_in(directory)
    return found


def _raise(error: OSError) -> None:
    raise error


def _class_folders(root: str) -> tuple[list[str], list[str]]:
    paths: list[str] = []
    names: list[str] = []
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    for name in folders:
        found = _images_below(os.path.join(root, name))
        paths += found
        names += [name] * len(found)
    return paths, names


def _flat_folder(root: str) -> tuple[list[str], list[str]]:
    paths = _images_below(root)
    return paths, [""] * len(paths)


def _list_file(root: str) -> tuple[list[str], list[str]]:
    try:
        lines = Path(root).read_text().splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"cannot read the list {root}: {error}") from None
    folder = os.path.dirname(os.path.abspath(root))
    paths: list[str] = []
    names: list[str] = []
    for line in (line.strip() for line in lines):
        if not line:
            continue
        path, _, name = (line, "", "") if line.lower().endswith(EXTENSIONS) else _split_class(line)
        paths.append(os.path.join(folder, path))
        names.append(name)
    return paths, names


def _split_class(line: str) -> tuple[str, str, str]:
    path, separator, name = line.rpartition("\t") if "\t" in line else line.rpartition(" ")
    return (path.strip(), separator, name) if separator else (line, "", "")


def _number(names: Iterable[str]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Class numbers: the integers themselves where all names are integers, else the rank of the name; "" is unknown."""
    names = list(names)
    known = sorted(set(names) - {""})
    if known and all(name.isdecimal() for name in known):
        classes = tuple(str(i) for i in range(max(map(int, known)) + 1))
        return np.array([int(name) if name else -1 for name in names], np.int64), classes
    number = {name: i for i, name in enumerate(known)} | {"": -1}
    return np.array([number[name] for name in names], np.int64), tuple(known)
