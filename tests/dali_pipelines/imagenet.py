"""Quickly creates a folder with as many images as a benchmark has: all class folders are links to one folder."""

import dataclasses
import os
from pathlib import Path

from PIL import Image

from dali_pipelines.source import Header, listings, source
from dali_pipelines.source.files import Local
from dali_pipelines.source.index import Image as Indexed
from dali_pipelines.source.index import Index

PER_CLASS, SIZE = 1000, (64, 48)


def make(root: Path, index: Path, classes: int) -> int:
    """Creates the folder, and its index without reading all headers; returns the number of images."""
    (first := root.parent / "images").mkdir()
    Image.new("RGB", SIZE).save(first / "n01440764_0.JPEG")
    for i in range(1, PER_CLASS):
        os.link(first / "n01440764_0.JPEG", first / f"n01440764_{i}.JPEG")
    root.mkdir()
    for i in range(classes):
        (root / f"n{1440764 + i:08}").symlink_to(first)
    files = Local(str(root))
    paths = dataclasses.replace(listings.folders(files, False, files.threads)[0], folder=str(root))
    header = Header(SIZE, 1, by_pillow=False)
    Index(str(index), str(root), "folders", "").update(
        paths,
        source.stamps_of(files, paths, files.threads),
        lambda path, size: [Indexed("", 0, size, -1, header)],
        threads=1,
        chunk=source.CHUNK,
    )
    return len(paths)
