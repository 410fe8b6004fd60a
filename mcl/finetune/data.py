"""COCO-format folders: their layouts, and checks of their content."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dali_pipelines.source import SourceError
from mcl import distributed
from mcl.config import ConfigError
from mcl.finetune.annotations import read
from mcl.finetune.images import check as check_images
from mcl.finetune.labels import choose
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
    Split("", "voc_{}.json"),
)
"""Layouts of folders, in the order in which they are tried; {} is train or val. The first is this project's, then
COCO's, Cityscapes' (as MMDetection converts it) and VOC's (as ``mcl convert voc`` writes it). LVIS shares
COCO's folder."""

MIN_SIDE = 32
"""Pixels; images with a shorter side are not trained on, as in MMDetection's configurations (``filter_cfg.min_size``).
"""


@dataclass(frozen=True)
class Folder:
    """A COCO-format folder that has passed all checks."""

    root: Path
    train: Split
    val: Split
    classes: tuple[str, ...]
    """Names of the categories to detect, in the order of the annotations, which is that of the labels."""
    digest: str
    """Hash of both annotation files; the same for a copy of the folder."""
    chosen: tuple[int | str, ...]
    """Ids of the images to train on."""
    images: int
    """Training images in an epoch: those with objects of the classes, as MMDetection counts them."""


def open_folder(
    root: str,
    wanted: Sequence[str] | None = None,
    masks: bool = False,
    lvis: bool = False,
    index: str = "",
    max_bad_fraction: float = 0.0,
    fraction: float = 1.0,
    seed: int = 0,
) -> Folder:
    """Reads both annotation files of a folder and checks that all images exist.

    Annotations are kept for later calls, until :func:`mcl.finetune.annotations.forget`. The first process of every
    machine checks images; the others wait.

    Args:
        root: the folder.
        wanted: categories to detect; empty or None for all.
        masks: whether every object must have a mask.
        lvis: whether to look for LVIS annotations first, since the folder may also have COCO's.
        index: folder of the indices of image sizes; empty: the user's cache.
        max_bad_fraction: fraction of the training images that may be unreadable.
        fraction: fraction of the training images to train on.
        seed: seed that selects them, by :func:`mcl.finetune.labels.choose`.

    Raises:
        SourceError: a folder, annotation file or image is missing; annotations are empty or broken; the categories of
            train and val differ; the size of an image differs from its annotation; too many images cannot be read.
        ConfigError: a category in `wanted` does not exist, or is named twice.
    """
    folder = Path(root)
    if not root:
        raise SourceError("data.root: not set; name a COCO-format folder, e.g. data.root=data/cutouts")
    if not folder.is_dir():
        raise SourceError(f"data.root: {root} does not exist")
    splits = find_splits(folder, lvis)
    # Val is read first, since its evaluator keeps it. Otherwise it would fragment the memory of train, which is freed.
    val, _, _, evaluated_on = _read(folder, splits[1], masks)
    train, used, chosen, trained_on = _read(folder, splits[0], masks, fraction, seed)
    if train != val:
        raise SourceError(
            f"data.root: {splits[0].annotations} and {splits[1].annotations} must have the same categories in the same "
            f"order; {_difference(train, val)}"
        )
    names = [str(name) for name in wanted or ()]  # in a Python file, a category such as 7 may be a number
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"data.classes: {name!r} is named {count} times; name it once")
        if name not in train:
            known = ", ".join(train[:20]) + (f" and {len(train) - 20} more" if len(train) > 20 else "")
            raise ConfigError(
                f"data.classes: no category {name!r}; there are {known}; "
                f"set data.classes=[{train[0]}], for example, or data.classes=[] for all"
            )
    classes = tuple(name for name in train if name in names or not names)
    if not used.intersection(classes):
        what = classes[0] if len(classes) == 1 else f"{len(classes)} categories ({classes[0]}, ...)"
        raise SourceError(
            f"{folder / splits[0].annotations}: nothing to train on: no object of {what} with an area, not a crowd, in "
            f"an image of at least {MIN_SIDE} x {MIN_SIDE} pixels, among the {len(chosen)} training images; change "
            "data.classes, data.root or data.fraction"
        )

    def check_images() -> None:
        trained_on(index=index, max_bad_fraction=max_bad_fraction)
        evaluated_on(index=index, decode=True)

    distributed.once_per_machine(check_images)
    annotations, others = (read(folder / split.annotations, masks) for split in splits)
    digest = hashlib.sha256(annotations.digest + others.digest).hexdigest()
    ids = {category["id"] for category in annotations.categories if category["name"] in classes}
    shown = {annotation["image_id"] for annotation in annotations.annotations if annotation["category_id"] in ids}
    shown &= set(chosen)
    images = [i for i in annotations.images if i["id"] in shown and min(i["width"], i["height"]) >= MIN_SIDE]
    return Folder(folder, *splits, classes, digest, tuple(chosen), len(images))


def find_splits(folder: Path, lvis: bool = False, key: str = "data.root") -> tuple[Split, Split]:
    """Train and val in the first layout of which the folder has an annotation file.

    Args:
        folder: the folder.
        lvis: whether LVIS's layout is tried first instead of last.
        key: key of the configuration, for errors.

    Raises:
        SourceError: the folder has no annotation file of any layout, or the layout is incomplete.
    """
    names = []
    for images, annotations in (_LVIS, *_LAYOUTS) if lvis else (*_LAYOUTS, _LVIS):
        train, val = (Split(images.format(name), annotations.format(name)) for name in ("train", "val"))
        if any((folder / split.annotations).is_file() for split in (train, val)):
            for split in (train, val):
                if not (folder / split.annotations).is_file():
                    raise SourceError(f"{key}: {folder / split.annotations} is missing")
                if not (folder / split.images).is_dir():
                    raise SourceError(f"{key}: {folder / split.images} is missing, the folder of the images")
            return train, val
        names.append(f"{train.annotations} and {val.annotations}")
    raise SourceError(f"{key}: {folder} has no annotations; it must have {'; '.join(names)}")


def _read(
    folder: Path, split: Split, masks: bool, fraction: float = 1.0, seed: int = 0
) -> tuple[list[str], set[str], list[int | str], Callable[..., None]]:
    """Checks an annotation file, and chooses a fraction of its images.

    Returns:
        Names of all categories; names of those that MMDetection trains on, which have an object with an area, not a
        crowd, in a chosen image that is not too small; ids of the chosen images; and
        :func:`~mcl.finetune.images.check` of all images.
    """
    path = folder / split.annotations
    images, categories, annotations, corrections, _ = read(path, masks, keep=True)
    warn = log.warning if distributed.rank() == 0 else log.debug  # all processes read the same
    if corrections:
        warn("%s: read with corrections: %s", path, corrections)
    names = {category["id"]: category["name"] for category in categories}
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise SourceError(f"{path}: two categories have the same name, e.g. {repeated[0]!r}; make them unique")
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    objects = [a for a in annotations if a["area"] > 0 and min(a["bbox"][2:]) >= 1]
    if left := len(annotations) - len(objects):
        warn("%s: %d objects of area 0, or with a side below a pixel, are not trained on", path, left)
    used = {annotation["category_id"] for annotation in annotations}
    if unused := [name for key, name in names.items() if key not in used]:
        warn("%s: no object of %d categories, e.g. %r", path, len(unused), unused[0])
    chosen = choose(sizes, fraction, seed)
    large = {key for key in chosen if min(sizes[key]) >= MIN_SIDE}
    trained = {a["category_id"] for a in objects if not (a["iscrowd"] or a.get("ignore")) and a["image_id"] in large}
    files = [image["file_name"] for image in images]
    check = functools.partial(check_images, folder / split.images, files, list(sizes.values()), path)
    return list(names.values()), {names[key] for key in trained}, chosen, check


def _difference(train: Sequence[str], val: Sequence[str]) -> str:
    only = [f"only train has {name!r}" for name in train if name not in val]
    only += [f"only val has {name!r}" for name in val if name not in train]
    return f"{only[0]}, and {len(only) - 1} more differ" if only else "the order differs"
