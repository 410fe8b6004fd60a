"""COCO-format folders: where things lie in them, and whether they can be trained on."""

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dali_pipelines.source import SourceError
from mcl.config import ConfigError
from mcl.finetune.images import check as check_images
from mcl.records.metrics import log


class Split(NamedTuple):
    """Images and annotations of train or val, relative to the root."""

    images: str
    annotations: str


_LVIS = Split("", "annotations/lvis_v1_{}.json")
_LAYOUTS = (
    Split("{}", "instances_{}.json"),
    Split("{}2017", "annotations/instances_{}2017.json"),
    Split("leftImg8bit/{}", "annotations/instancesonly_filtered_gtFine_{}.json"),
)
"""Where kinds of folders keep things, {} standing for train or val: the one of this project first, then COCO's and
Cityscapes' (as MMDetection converts it). LVIS has its images in COCO's folders."""

MIN_SIDE = 32
"""Pixels; smaller images are left out, as MMDetection's configurations for COCO do (``filter_cfg.min_size``)."""


@dataclass(frozen=True)
class Folder:
    """A COCO-format folder that was found to be in order."""

    root: Path
    train: Split
    val: Split
    classes: tuple[str, ...]
    """Names of the categories to detect, in the order of the annotations, which is that of the labels."""

    def digest(self) -> str:
        """Of both annotation files: the same for a copy of the folder elsewhere."""
        files = [self.root / split.annotations for split in (self.train, self.val)]
        digests = [hashlib.sha256(file.read_bytes()).digest() for file in files]
        return hashlib.sha256(b"".join(digests)).hexdigest()


def open_folder(
    root: str,
    wanted: Sequence[str] = (),
    masks: bool = False,
    lvis: bool = False,
    index: str = "",
    max_bad_fraction: float = 0.0,
) -> Folder:
    """Reads both annotation files of a folder and looks whether all that they name is there.

    Args:
        root: the folder.
        wanted: categories to detect; empty for all.
        masks: whether every object must have a mask.
        lvis: look for annotations of LVIS first; COCO's may be there, too.
        index: folder of the indices of image sizes; empty: the user's cache.
        max_bad_fraction: of the training images that need not be readable.

    Raises:
        SourceError: a folder, annotation file or image is missing; annotations are empty or broken; the categories of
            train and val differ; images have other sizes than annotations say, or cannot be read.
        ConfigError: a category that is wanted does not exist.
    """
    folder = Path(root)
    if not root:
        raise SourceError("data.root: not set; name a COCO-format folder, e.g. data.root=data/cutouts")
    if not folder.is_dir():
        raise SourceError(f"data.root: {root} does not exist")
    splits = _splits(folder, (_LVIS, *_LAYOUTS) if lvis else (*_LAYOUTS, _LVIS))
    check = functools.partial(check_images, index=index)
    train, used = _read(folder, splits[0], masks, functools.partial(check, max_bad_fraction=max_bad_fraction))
    val, _ = _read(folder, splits[1], masks, functools.partial(check, decode=True))
    if train != val:
        raise SourceError(
            f"data.root: {splits[0].annotations} and {splits[1].annotations} must have the same categories in the same "
            f"order; {_difference(train, val)}"
        )
    for name in wanted:
        if name not in train:
            raise ConfigError(f"data.classes: no category {name!r}; there are {', '.join(train)}")
    classes = tuple(name for name in train if name in wanted or not wanted)
    if not used.intersection(classes):
        what = classes[0] if len(classes) == 1 else f"{len(classes)} categories ({classes[0]}, ...)"
        raise SourceError(
            f"{folder / splits[0].annotations}: nothing to train on: no object of {what} with an area, in an image of "
            f"at least {MIN_SIDE} x {MIN_SIDE} pixels; set data.classes, or data.root, to others"
        )
    return Folder(folder, *splits, classes)


def _splits(folder: Path, layouts: Sequence[Split]) -> tuple[Split, Split]:
    """Train and val in the first layout of which the folder has a part."""
    names = []
    for images, annotations in layouts:
        train, val = (Split(images.format(name), annotations.format(name)) for name in ("train", "val"))
        if any((folder / split.annotations).is_file() for split in (train, val)):
            for split in (train, val):
                if not (folder / split.annotations).is_file():
                    raise SourceError(f"data.root: {folder / split.annotations} is missing")
                if not (folder / split.images).is_dir():
                    raise SourceError(f"data.root: {folder / split.images} is missing, the folder of the images")
            return train, val
        names.append(f"{train.annotations} and {val.annotations}")
    raise SourceError(f"data.root: {folder} has no annotations; it must have {'; '.join(names)}")


def _read(folder: Path, split: Split, masks: bool, check: Callable[..., None]) -> tuple[list[str], set[str]]:
    """Checks an annotation file and, by `check`, its images.

    Returns:
        Names of the categories, and of those that MMDetection trains on: that have an object with an area in an image
        that is not too small.
    """
    path = folder / split.annotations
    images, annotations, categories = _sections(path)
    names = {category["id"]: category["name"] for category in categories}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise SourceError(f"{path}: two categories have the same name, e.g. {repeated[0]!r}; make them unique")
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    objects = []
    for annotation in annotations:
        where = f"{path}: annotation {annotation['id']}"
        if annotation["image_id"] not in sizes:
            raise SourceError(f"{where} is of image {annotation['image_id']}, which is not in the file")
        if annotation["category_id"] not in names:
            raise SourceError(f"{where} is of category {annotation['category_id']}, which is not among the categories")
        _check_box(where, annotation["bbox"], sizes[annotation["image_id"]])
        if masks:
            _check_mask(where, annotation.get("segmentation"))
        if annotation["area"] > 0 and min(annotation["bbox"][2:]) >= 1:
            objects.append(annotation)
    if left := len(annotations) - len(objects):
        log.warning("%s: %d objects of area 0, or with a side below a pixel, are left out", path, left)
    used = {annotation["category_id"] for annotation in annotations}
    if unused := [name for key, name in names.items() if key not in used]:
        log.warning("%s: no object of %d categories, e.g. %r", path, len(unused), unused[0])
    check(folder / split.images, [file_name(image) for image in images], list(sizes.values()), path)
    trained = {a["category_id"] for a in objects if min(sizes[a["image_id"]]) >= MIN_SIDE}
    return list(names.values()), {names[key] for key in trained}


_ID, _NUMBER = (int, str), (int, float)
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": _ID, "width": _NUMBER, "height": _NUMBER},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": (list,), "area": _NUMBER},
    "categories": {"id": _ID, "name": (str,)},
}


def _sections(path: Path) -> list[list[dict[str, Any]]]:
    """Images, annotations and categories of an annotation file, each with the fields that it must have."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        reason = "is empty" if path.stat().st_size == 0 else f"is not JSON ({error})"
        raise SourceError(f"{path}: {reason}; write COCO's annotations anew") from None
    for name, required in _FIELDS.items():
        section = content.get(name) if isinstance(content, dict) else None
        if not isinstance(section, list) or not section:
            raise SourceError(f"{path}: has no {name}; it must have COCO's images, annotations and categories")
        for number, entry in enumerate(section):
            for field, kinds in required.items():
                if not isinstance(entry, dict) or field not in entry:
                    raise SourceError(f"{path}: {name}[{number}] has no {field}")
                if not isinstance(entry[field], kinds):
                    wanted = " or ".join(kind.__name__ for kind in kinds)
                    raise SourceError(f"{path}: {name}[{number}] has the {field} {entry[field]!r}; it must be {wanted}")
            if name == "images" and not ("file_name" in entry or "coco_url" in entry):
                raise SourceError(f"{path}: images[{number}] has no file_name")
        if len({entry["id"] for entry in section}) < len(section):
            raise SourceError(f"{path}: two {name} have the same id; make them unique")
    return [content[name] for name in _FIELDS]


def _check_box(where: str, box: list[Any], size: tuple[int, int]) -> None:
    """A box must be one, and be in the image."""
    numbers = len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not numbers or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise SourceError(f"{where} has the box {box}; it must be [x, y, width, height] in pixels")
    x, y, width, height = box
    if x >= size[0] or y >= size[1] or x + width < 0 or y + height < 0:
        raise SourceError(f"{where} has the box {box}, outside of its image of {size[0]} x {size[1]} pixels")


def _check_mask(where: str, mask: Any) -> None:
    """A mask must be one that pycocotools reads, which looks at the first polygon alone."""
    if not mask:
        raise SourceError(f"{where} has no segmentation; add masks, or train a detector of boxes alone")
    first = mask[0] if isinstance(mask, list) else None
    polygon = isinstance(first, list) and len(first) >= 6 and len(first) % 2 == 0
    encoded = isinstance(mask, dict) and {"counts", "size"} <= mask.keys()
    if not (polygon or encoded):
        raise SourceError(
            f"{where} has a segmentation that is neither polygons of three points or more, [[x, y, x, y, ...], ...], "
            "nor a run-length encoding"
        )


def file_name(image: dict[str, Any]) -> str:
    """Path of an image within the folder of images; LVIS has its URL at COCO's instead, which ends with it."""
    return image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:])


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    only = [f"only train has {name!r}" for name in train if name not in val]
    only += [f"only val has {name!r}" for name in val if name not in train]
    return f"{only[0]}, and {len(only) - 1} more differ" if only else "the order differs"
