"""Region probe: classifies objects by the features of their boxes, which are also what a detector classifies.

The ground-truth boxes of a COCO-format folder are pooled from the feature pyramid as a detector pools its proposals,
and classified by nearest neighbours and by a linear classifier. Only the linear classifier is trained.
"""

import copy
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dali_pipelines.geometry import STRIDE
from dali_pipelines.source import Source, SourceError, open_source
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.evaluation.features import STATISTICS_IMAGES, Features, Progress, photos
from mcl.evaluation.knn_linear import knn, linear
from mcl.finetune import annotations
from mcl.finetune.console import shown
from mcl.finetune.data import find_splits
from mcl.ops import region_pool
from mcl.records.metrics import Record, log

IMAGES = 5000
"""Maximum number of images per split, evenly spaced: the size of COCO's val2017."""

_BINS = 6  # per side of a box
_PARTS = 3  # per side of a box; the feature is the means of these parts
_CHUNK = 16  # images that networks process at once
_RESAMPLES = 2000


@dataclass(frozen=True)
class Boxes:
    """The images of a split and their objects."""

    source: Source
    numbers: npt.NDArray[np.int64]  # (n,) numbers of the images in the source
    boxes: Mapping[int, Tensor]  # by number: (r, 4) x1, y1, x2, y2 as fractions of width and height
    labels: Mapping[int, Tensor]  # by number: (r,) int64
    classes: tuple[str, ...]


def open_boxes(config: Config) -> tuple[Boxes, Boxes]:
    """Train and val of the folder ``evaluation.regions``, which has the layout that ``mcl finetune`` reads.

    Crowds, images without objects, and images whose size differs from their annotations are left out.

    Raises:
        ConfigError: the folder is not set, or does not exist.
        SourceError: annotations or images are missing or broken, or train and val have different categories.
    """
    folder = config.evaluation.regions
    if not folder:
        raise ConfigError("evaluation.regions: not set; set it to a folder in COCO format, as for mcl finetune")
    if not Path(folder).is_dir():
        raise ConfigError(f"evaluation.regions: {folder} does not exist")
    train, val = (
        _read(Path(folder, split.images), Path(folder, split.annotations), config.data.index)
        for split in find_splits(Path(folder), key="evaluation.regions")
    )
    if train.classes != val.classes:
        only = min({*train.classes} ^ {*val.classes})
        raise SourceError(f"evaluation.regions: {folder}: only one of train and val has the category {only!r}")
    return train, val


def _read(images: Path, file: Path, index: str) -> Boxes:
    found = annotations.read(file, masks=False)
    source = open_source(str(images), "coco", key="evaluation.regions", annotations=str(file), index=index)
    classes = tuple(sorted(category["name"] for category in found.categories))
    number_of = {category["id"]: classes.index(category["name"]) for category in found.categories}
    prefix = source.base.rstrip("/") + "/"
    place = {name.removeprefix(prefix): i for i, name in enumerate(source.names)}
    objects: dict[int | str, list[annotations.Entry]] = {}
    for entry in found.annotations:
        if not (entry["iscrowd"] or entry.get("ignore")):
            objects.setdefault(entry["image_id"], []).append(entry)
    boxes, labels, strange = {}, {}, []
    for image in found.images:
        i, size = place[posixpath.normpath(image["file_name"])], (image["width"], image["height"])
        own = objects.get(image["id"])
        if not own or i in source.bad:
            continue
        if tuple(source.sizes[i].tolist()) != size:
            strange.append(image["file_name"])
            continue
        corners = torch.tensor([entry["bbox"] for entry in own])
        corners[:, 2:] += corners[:, :2]
        boxes[i] = (corners / torch.tensor(size * 2)).clamp(0, 1)
        labels[i] = torch.tensor([number_of[entry["category_id"]] for entry in own])
    if strange:
        log.warning("%s: left out %d images of other sizes than annotated, e.g. %s", file, len(strange), strange[0])
    if not boxes:
        raise SourceError(f"evaluation.regions: {file} has no object in an image that can be used")
    numbers = np.array(sorted(boxes))
    return Boxes(source, numbers[:: -(-len(numbers) // IMAGES)], boxes, labels, classes)


class Pyramid(nn.Module):
    """Region features of an encoder, which is copied."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        if getattr(encoder, "fpn", None) is None:
            raise ConfigError("evaluation: regions needs a model with an FPN; remove it from the evaluations")
        self.backbone, self.fpn = copy.deepcopy(encoder.backbone), copy.deepcopy(encoder.fpn)
        self.strides = [STRIDE / ratio for ratio in encoder.ratios]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(n, 3, S, S) to the maps of all levels, coarsest first."""
        maps: list[Tensor] = self.fpn(self.backbone(pixels), range(len(self.strides)))
        return maps

    def regions(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Means of the features in 3 x 3 parts of each image's boxes, which are in pixels: (R, 9 * width)."""
        rows = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        corners = torch.cat(list(boxes))
        level = level_of(corners, self.strides)
        pooled = region_pool(self(pixels), self.strides, torch.cat([rows, corners], 1), level, _BINS)
        return F.avg_pool2d(pooled, _BINS // _PARTS).flatten(1)


def level_of(boxes: Tensor, strides: Sequence[float]) -> Tensor:
    """(R,) number of the map from which a detector pools each box (arXiv 1612.03144): 224 px from the map of stride 16.

    Args:
        boxes: (R, 4) x1, y1, x2, y2, pixels.
        strides: strides of the maps, decreasing.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    wanted = 16 * 2 ** torch.floor(torch.log2(area.sqrt() / 224) + 1e-6)
    return (torch.tensor(strides, device=boxes.device)[:, None] > wanted).sum(0).clamp(max=len(strides) - 1)


def regions(
    encoders: Mapping[str, nn.Module], config: Config, device: torch.device, progress: Progress = lambda: None
) -> Record:
    """Scores encoders on the objects of ``evaluation.regions``; all processes must call this.

    BatchNorm's statistics are re-estimated on training images of that folder.

    Args:
        encoders: encoders by the keys of their scores, which include ``accuracy`` and ``random``.
        progress: see :data:`mcl.evaluation.features.Progress`.

    Returns:
        A record. ``KEY`` is the kNN top-1 of an encoder and ``linear_KEY`` that of the linear classifier; ``gain`` is
        ``accuracy`` minus ``random``. ``KEY_interval`` is the 95% interval, by images of val, since the objects of an
        image are not independent.

    Raises:
        ConfigError, SourceError: see :func:`open_boxes`; or a model has no FPN.
    """
    train, val = open_boxes(config)
    networks = [Pyramid(encoder).to(device, torch.float32).eval() for encoder in encoders.values()]
    with distributed.alone():  # all processes use the same images
        for network in networks:
            few = _batches(train, config, device, progress, STATISTICS_IMAGES)
            update_bn((pixels for pixels, index in few if index), network)
    learnt, asked = (_extract(networks, split, config, device, progress) for split in (train, val))
    classes, k, seed = len(train.classes), config.evaluation.k, config.trainer.seed
    hits = {"image": asked[0].index, "label": asked[0].labels}
    for key, known, test in zip(encoders, learnt, asked, strict=True):
        hits[key] = knn(known, test, k, classes, device, False, progress) == test.labels
        hits[f"linear_{key}"] = linear(known, test, classes, device, seed, progress) == test.labels
    everyone = distributed.gather_objects(hits)
    hits = {key: torch.cat([own[key] for own in everyone]) for key in hits}
    image, counts = hits.pop("image"), hits.pop("label").bincount()
    values = {key: found.float() for key, found in hits.items()}
    for by in ("", "linear_") if "random" in encoders else ():
        values[f"{by}gain"] = values[f"{by}accuracy"] - values[f"{by}random"]
    return {
        "split": "val",
        **{key: found.mean().item() for key, found in values.items()},
        **{f"{key}_interval": interval(found, image) for key, found in values.items()},
        "chance": (counts.max() / counts.sum()).item(),
        "classes": classes,
        "images": len(image.unique()),
        "boxes": len(image),
        "k": k,
    }


def describe(record: Record) -> str:
    """Formats a record of :func:`regions`."""

    def row(name: str, by: str) -> str:
        trained, random, gain = (
            "{:6.1%} ({:.1%} to {:.1%})".format(record[by + key], *record[f"{by}{key}_interval"])
            for key in ("accuracy", "random", "gain")
        )
        return f"   {name:<6} top-1 {trained}   random network {random}   difference {gain}"

    heading = (
        f"regions   {record['split']:<5} {record['boxes']} objects in {record['images']} images, 95% intervals; "
        f"largest of {record['classes']} classes {record['chance']:6.1%}"
    )
    return "\n".join([heading, row("knn", ""), row("linear", "linear_")])


def interval(values: Tensor, image: Tensor) -> list[float]:
    """95% interval of a mean over objects, by bootstrapping images.

    Args:
        values: (R,) value of each object.
        image: (R,) int64 number of each object's image.
    """
    _, own, counts = image.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts)).index_add_(0, own, values)
    drawn = torch.randint(len(counts), (_RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [low, high]


def _batches(
    split: Boxes, config: Config, device: torch.device, progress: Progress, images: int | None = None
) -> Iterator[tuple[Tensor, list[int]]]:
    """Whole images of this process's share, in small batches, and their numbers."""
    cells = config.evaluation.region_cells or 2 * config.montage.final.cells
    for pixels, index in photos(config, split.source, device, split.numbers[:images], whole=True, cells=cells):
        yield from zip(pixels.split(_CHUNK), (part.tolist() for part in index.split(_CHUNK)), strict=True)
        progress()


@torch.no_grad()
def _extract(
    networks: Sequence[Pyramid], split: Boxes, config: Config, device: torch.device, progress: Progress
) -> list[Features]:
    """For each network, the features of this process's objects; `index` has the numbers of their images."""
    values: list[list[Tensor]] = [[] for _ in networks]
    labels, images = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    done, share = 0, -(-len(split.numbers) // distributed.world_size())
    with shown("regions", "images") as show:
        for pixels, numbers in _batches(split, config, device, progress):
            if not numbers:
                continue
            boxes = [(split.boxes[i] * pixels.shape[-1]).to(device) for i in numbers]
            for own, network in zip(values, networks, strict=True):
                own.append(network.regions(pixels, boxes).cpu())
            labels += [split.labels[i] for i in numbers]
            images += [torch.full((len(split.labels[i]),), i) for i in numbers]
            show(done := done + len(numbers), share)
    return [Features(torch.cat(own), torch.cat(images), torch.cat(labels)) for own in values]
