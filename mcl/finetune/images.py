"""Checks that the images of a COCO-format folder match their annotations.

MMDetection decodes with OpenCV, which rotates images by their EXIF orientation. So width, height, boxes and masks of
annotations must be those of the rotated image. Pre-training uses pixels as stored.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dali_pipelines.source import SourceError
from dali_pipelines.source.files import MISSING, Local
from dali_pipelines.source.headers import Header, read_header
from dali_pipelines.source.index import Image, Index
from dali_pipelines.source.names import Names
from dali_pipelines.source.source import CHUNK, stamps_of
from mcl.finetune.console import shown
from mcl.records.metrics import log

_UPRIGHT = 1
_RULE = "fine-tuning turns images as their EXIF orientation says, pre-training does not"


def check(
    folder: Path,
    names: Sequence[str],
    sizes: Sequence[tuple[float, float]],
    annotations: Path,
    *,
    index: str = "",
    max_bad_fraction: float = 0.0,
    decode: bool = False,
) -> None:
    """Compares the sizes of images with their annotations. Headers of unchanged files are taken from the index.

    Args:
        folder: folder of the images.
        names: (n) paths within it.
        sizes: (n) annotated width and height in pixels.
        annotations: the annotation file, for messages.
        index: folder of the index; empty: the user's cache.
        max_bad_fraction: fraction of the images that may be unreadable, since others will replace them.
        decode: whether to decode the images as well.

    Raises:
        SourceError: an image is missing or has a different size, or too many images cannot be read.
    """
    files, paths = Local(str(folder)), Names.of(str(folder / name) for name in names)
    stamps = stamps_of(files, paths, files.threads)
    if missing := np.flatnonzero((stamps == MISSING).all(1)).tolist():
        raise SourceError(
            f"{paths[missing[0]]} is missing, and {len(missing) - 1} more images that {annotations} names"
        )
    place = Index(index, str(folder), "COCO, decoded" if decode else "COCO, headers", str(annotations))
    scan = functools.partial(_scan, decode=decode)
    with shown(f"{'decoding' if decode else 'reading headers of'} {folder}", "images") as show:
        table = place.update(
            paths, stamps, scan, threads=files.threads, chunk=CHUNK, progress=lambda done, of, images: show(done, of)
        )
    wrong = np.flatnonzero((table.sizes != np.array(sizes)).any(1) & (table.sizes > 0).all(1)).tolist()
    orientations = table.labels  # _scan stores them there
    if wrong:
        i = wrong[0]
        found, stated = table.sizes[i].tolist(), list(sizes[i])
        raise SourceError(
            f"{paths[i]} has {found[0]} x {found[1]} pixels, but {annotations} says {stated[0]} x {stated[1]}, and "
            f"{len(wrong) - 1} more images differ: boxes would not fit the images. "
            f"{_remedy(found, stated, orientations[i])} ({_RULE})"
        )
    if turned := np.flatnonzero(orientations > _UPRIGHT).tolist():
        log.warning(
            "%s: %d images have an EXIF orientation, e.g. %s; boxes must be those of the turned image (%s)",
            *(annotations, len(turned), paths[turned[0]], _RULE),
        )
    if bad := table.bad:
        i, reason = min(bad.items())
        said = f"{annotations}: {len(bad)} of the {len(paths)} images cannot be used, the first: {paths[i]}: {reason}"
        if len(bad) > max_bad_fraction * len(paths):
            allowed = f", or raise data.max_bad_fraction={max_bad_fraction}" if max_bad_fraction else ""
            raise SourceError(f"{said}; repair these files, or remove them from the annotations{allowed}")
        log.warning("%s; others will replace them", said)


def _remedy(found: list[int], stated: list[float], orientation: int) -> str:
    if found != stated[::-1]:
        return "Correct width and height, or use the images that were annotated"
    if orientation > 4:  # which exchanges width and height
        return (
            f"EXIF orientation {orientation} exchanges width and height: if the boxes are those of the image as it is "
            "stored, remove the orientation (exiftool -Orientation= FOLDER), otherwise exchange width and height in "
            "the annotations"
        )
    return "Width and height are exchanged: exchange them in the annotations, or turn the image"


def _scan(path: str, size: int, decode: bool) -> list[Image]:
    """The image in a file, with its size as OpenCV decodes it, and its EXIF orientation in place of a class."""
    if not size:  # a pipe has size 0, too; reading it could block forever
        return [Image("", 0, size, _UPRIGHT, "the file is empty")]
    with open(path, "rb") as file:
        header = read_header(file)
        encoded = b""
        if decode or isinstance(header, str):  # OpenCV may read what pre-training does not
            file.seek(0)
            encoded = file.read()
    if not encoded:
        assert not isinstance(header, str)
        return [Image("", 0, size, header.orientation, header._replace(size=header.upright))]
    from mmcv import imfrombytes  # what MMDetection loads images with

    if (pixels := imfrombytes(encoded)) is None:
        return [Image("", 0, size, _UPRIGHT, header if isinstance(header, str) else "cannot be decoded")]
    orientation = _UPRIGHT if isinstance(header, str) else header.orientation
    return [Image("", 0, size, orientation, Header(pixels.shape[1::-1], orientation, by_pillow=False))]
