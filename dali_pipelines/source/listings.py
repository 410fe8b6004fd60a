"""Listings of plain files: which files are images, in which order, and of which class.

Each function returns paths relative to the base folder, and the class name of each file ("" if unknown).
"""

import codecs
import json
import os
import posixpath
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tqdm.auto import tqdm

from dali_pipelines.settings import can_be_named
from dali_pipelines.source.files import Files, SourceError, is_remote
from dali_pipelines.source.headers import EXTENSIONS, UNREAD
from dali_pipelines.source.names import Names

Listing = tuple[Names, list[str]]


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def folders(files: Files, flat: bool, threads: int) -> Listing:
    """A folder of class folders, or a flat folder of images, searched to any depth.

    Warns of pictures that are left out because their format is not read.
    """
    parts: list[Names] = []
    classes: list[str] = []
    unread: list[str] = []
    below = [""] if flat else files.entries(files.base)[1]
    with ThreadPoolExecutor(threads) as pool:
        listed = pool.map(lambda folder: Names.of(_images_below(files, folder, unread)), below)
        bar = tqdm(listed, "listing", len(below), unit=" folders", disable=None, delay=1, leave=False)
        for folder, found in zip(below, bar, strict=True):
            parts.append(found)
            classes += [folder] * len(found)
    if unread:
        warnings.warn(
            f"{files.base}: {len(unread)} files such as {min(unread)} are left out, because mcl does not read their "
            "format; convert them to JPEG to use them",
            stacklevel=2,
        )
    return Names.concatenate([Names.of([]), *parts]), classes


def _images_below(files: Files, folder: str, unread: list[str]) -> Iterator[str]:
    """Yields the images below a folder and adds pictures of other formats to `unread`."""
    prefix = f"{folder}/" if folder else ""
    names, folders = files.entries(f"{files.base}/{folder}" if folder else files.base)
    yield from (prefix + name for name in names if is_image(name))
    unread += (prefix + name for name in names if name.lower().endswith(UNREAD))
    for name in folders:
        yield from _images_below(files, prefix + name, unread)


def list_file(files: Files, path: str, allow_outside: bool) -> Listing:
    """A text file. Each line has a path (any bytes but newlines), then optionally a space or tab and a class."""
    content = files.read(path).removeprefix(codecs.BOM_UTF8)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise SourceError(f"cannot read the list {path}: it is not text, or is UTF-16; save it as text in UTF-8")
    names: list[str] = []
    classes: list[str] = []
    for number, line in enumerate(os.fsdecode(content).split("\n"), 1):
        if not (line := line.strip(" \t\r")):
            continue
        name, label = (line, "") if is_image(line) else _split_class(line)
        names.append(_inside(name, allow_outside, f"{path}, line {number}"))
        classes.append(label)
    return Names.of(names), classes


def _split_class(line: str) -> tuple[str, str]:
    parts = [line.rpartition(separator) for separator in "\t " if separator in line]
    # A tab may be part of an image's name, and the file in front of a class need not be called an image.
    name, _, label = next((part for part in parts if is_image(part[0].rstrip())), parts[0] if parts else (line, "", ""))
    return name.rstrip(" \t"), label


def coco(annotations: Files, path: str, allow_outside: bool) -> Listing:
    """The images that a COCO annotation file lists, in the order of their ids."""
    try:
        # Annotations are dropped as soon as they are parsed, to save memory: there are far more of them than images.
        content = json.loads(
            annotations.read(path), object_hook=lambda o: o if {"file_name", "images"} & {*o} else None
        )
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise SourceError(f'{path} has no list "images"; set data.annotations to a COCO annotation file')
    try:
        named = sorted((image["id"], image["file_name"]) for image in content["images"])
        names = [_inside(name, allow_outside, f"{path}, image {number!r}") for number, name in named]
    except (KeyError, TypeError, AttributeError):
        raise SourceError(f'{path}: an image has no "id" or "file_name", or one of the wrong type') from None
    return Names.of(names), [""] * len(names)


def _inside(name: str, allow_outside: bool, where: str) -> str:
    """The normalised path; raises an error if it may not be used."""
    if not can_be_named(name):
        raise SourceError(f"{where}: {name!r} is not a legal file name; correct or remove the entry")
    outside = name.startswith("/") or is_remote(name) or ".." in name.split("/")
    if outside and not allow_outside:
        raise SourceError(
            f"{where}: {name!r} may lie outside the folder of data.root; name files relative to it, without .., or set "
            "data.allow_outside=true if you trust this file"
        )
    return name if is_remote(name) else posixpath.normpath(name)
