"""Converts annotations of PASCAL VOC to COCO's format."""

import json
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dali_pipelines.source import SourceError
from dali_pipelines.source.files import replacing

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def convert(folders: Sequence[Path], output: Path, ids: str = "") -> str:
    """Writes an annotation file in COCO's format.

    Difficult objects of VOC get ``"difficult": 1``, which only the evaluation ignores. ``ignore`` or ``iscrowd`` would
    exclude them from training as well, while published detectors are trained on all objects.

    Args:
        folders: folders with Annotations/ and JPEGImages/, such as VOCdevkit/VOC2007.
        output: the file to write. Paths of images in it are relative to its folder.
        ids: images to convert: the name of an image set, such as trainval, that every folder has in ImageSets/Main/,
            or a file with one id per line; empty: all images with annotations.

    Returns:
        Summary of the written file.

    Raises:
        SourceError: a file is missing or broken, or `output` cannot be written; the message names it.
    """
    chosen = _choose(folders, ids)
    files = {folder: {path.stem: path for path in (folder / "JPEGImages").iterdir()} for folder in folders}
    read = [(files[folder].get(path.stem), path, *_read(path)) for folder, path in chosen]
    names = {name for *_, objects in read for name, *_ in objects}
    if not names <= {*CLASSES}:  # not VOC's classes: use those of all images, so that train and val have the same ones
        names = {name for _, path in _choose(folders, "") for name, *_ in _read(path)[1]}
    classes = CLASSES if names <= {*CLASSES} else tuple(sorted(names))
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (image, path, (width, height), objects) in enumerate(read, start=1):
        if image is None:
            raise SourceError(f"{path}: the image {path.stem}.jpg is missing in JPEGImages")
        file_name = os.path.relpath(image, output.parent)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for name, box, difficult in objects:
            keys = {"id": len(annotations) + 1, "image_id": image_id, "category_id": numbers[name]}
            flags = {"iscrowd": 0, "difficult": difficult}
            annotations.append({**keys, "bbox": box, "area": box[2] * box[3], **flags})
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    content = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    try:
        with replacing(output) as file:
            file.write(content.encode())
    except OSError as error:
        raise SourceError(f"{output}: cannot be written ({error.strerror}); name another --output") from None
    hard = sum(annotation["difficult"] for annotation in annotations)
    of = f"{len(annotations)} objects, {hard} of them difficult, of {len(classes)} categories"
    return f"{output}: {len(images)} images, {of}"


def _choose(folders: Sequence[Path], ids: str) -> list[tuple[Path, Path]]:
    """Folder and annotation file of every image to convert."""
    for folder in folders:
        for part in ("Annotations", "JPEGImages"):
            if not (folder / part).is_dir():
                raise SourceError(f"{folder / part} is missing; name a folder that has it, such as VOCdevkit/VOC2007")
    if not ids:
        chosen = [(folder, path) for folder in folders for path in sorted((folder / "Annotations").glob("*.xml"))]
    elif Path(ids).is_file():
        places = {path.stem: (folder, path) for folder, path in _choose(folders, "")}
        chosen = []
        for key in _lines(Path(ids)):
            if key not in places:
                raise SourceError(f"{ids}: no folder has annotations of the image {key!r}")
            chosen.append(places[key])
    else:
        sets = [(folder, folder / "ImageSets" / "Main" / f"{ids}.txt") for folder in folders]
        chosen = [(folder, folder / "Annotations" / f"{key}.xml") for folder, file in sets for key in _lines(file)]
    if not chosen:
        raise SourceError(f"{ids or folders[0] / 'Annotations'}: names no image")
    return chosen


def _lines(file: Path) -> Iterator[str]:
    """Ids in an image set; in image sets of a category, a flag follows each id."""
    try:
        return (line.split()[0] for line in file.read_text().splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: cannot be read ({error}); name an image set, or a file of ids") from None


def _read(path: Path) -> tuple[tuple[int, int], list[tuple[str, list[float], int]]]:
    """Width and height of an image; for each object its name, [x, y, width, height] in pixels, and difficult flag."""
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two: unknown or wrong encodings
        raise SourceError(f"{path}: is not XML ({error})") from None
    width, height = (int(_number(path, root, f"size/{side}")) for side in ("width", "height"))
    objects = []
    for node in root.findall("object"):
        name = node.findtext("name", "").strip()
        left, top, right, bottom = (_number(path, node, f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax"))
        if not name or right < left or bottom < top:
            raise SourceError(f"{path}: has an object without a name, or with a box turned inside out; correct it")
        # Edges are the first and the last pixel, counted from 1.
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        objects.append((name, box, int(node.findtext("difficult", "").strip() == "1")))
    return (width, height), objects


def _number(path: Path, node: Any, tag: str) -> float:
    text = node.findtext(tag)
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        what = f"no {tag}" if text is None else f"the {tag} {reprlib.repr(text)}"
        raise SourceError(f"{path}: has {what}; it must be a number")
    return value
