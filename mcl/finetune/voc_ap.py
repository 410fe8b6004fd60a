"""AP of PASCAL VOC: the mean precision at 11 recalls, or the area under the curve, at IoU 0.5 to 0.95."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.registry import METRICS
from numpy.typing import NDArray
from torchvision.ops import box_iou

from mcl.config import ConfigError
from mcl.finetune.metric import KINDS, FolderMetric, percent

THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]
RULES = "11points", "area"


class Image(NamedTuple):
    """Detections and objects of one category in an image; boxes are [left, top, right, bottom]."""

    boxes: NDArray[Any]
    """(n, 4)"""
    scores: NDArray[Any]
    """(n)"""
    objects: NDArray[Any]
    """(k, 4)"""
    difficult: NDArray[Any]
    """(k) flags"""


def average_precision(images: Iterable[Image]) -> NDArray[Any] | None:
    """AP of a category, by the rule of VOC's development kit.

    A detection is assigned to the object with the highest IoU. It is correct if that IoU reaches the threshold and no
    better detection is assigned to the same object. It is ignored if the object is difficult.

    Returns:
        (10, 2): by :data:`THRESHOLDS` and :data:`RULES`; None if there are only difficult objects, or none.
    """
    images = list(images)
    starts = np.cumsum([0, *(len(image.objects) for image in images)])
    difficult = np.concatenate([image.difficult for image in images]).astype(bool)
    scores = np.concatenate([image.scores for image in images])
    order = np.argsort(-scores, kind="stable")
    overlap, nearest = np.full(len(scores), -1.0), np.zeros(len(scores), int)
    done = 0
    for start, image in zip(starts, images, strict=False):
        part = slice(done, done := done + len(image.scores))
        if len(image.objects) and len(image.scores):
            found, objects = (torch.as_tensor(boxes, dtype=torch.float64) for boxes in (image.boxes, image.objects))
            best = box_iou(found, objects).max(1)
            overlap[part], nearest[part] = best.values.numpy(), start + best.indices.numpy()
    count = int((~difficult).sum())
    if not count:
        return None
    return np.array([_areas(_right(overlap[order], nearest[order], difficult, t), count) for t in THRESHOLDS])


def _right(overlap: NDArray[Any], nearest: NDArray[Any], difficult: NDArray[Any], threshold: float) -> NDArray[Any]:
    """Whether detections, best first, are correct; without those that are ignored."""
    reached = overlap >= threshold
    counts = ~(reached & difficult[nearest])
    candidates = np.flatnonzero(reached & counts)
    right = np.zeros(len(overlap), bool)
    right[candidates[np.unique(nearest[candidates], return_index=True)[1]]] = True  # the first of each object
    kept: NDArray[Any] = right[counts]
    return kept


def _areas(right: NDArray[Any], objects: int) -> tuple[float, float]:
    """AP by :data:`RULES`. The precision at a recall is the highest precision at that recall or above."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(10 * hits, np.arange(11) * objects)  # integers: 3 of 10 is a recall of 0.3
    return float(np.append(best, 0)[reached].mean()), float(best[right].sum() / objects)


@METRICS.register_module()
class VOCFolderMetric(FolderMetric):
    """AP of PASCAL VOC with checked annotations; AP is the mean over IoU thresholds, as detectron2 reports it.

    MMDetection's ``VOCMetric`` would make boxes in COCO's format one pixel too wide and too high, and rounding in its
    ``eval_map`` puts 3 of 10 objects below a recall of 0.3.

    Args:
        ann_file: annotations in COCO's format; objects whose ``difficult`` is 1 are ignored.
        metric: rules to use: ``11points``, VOC's rule until 2009 and detectron2's for VOC 2007, and ``area``, VOC's
            rule since then.
    """

    default_prefix = "voc"

    def __init__(self, ann_file: str, metric: list[str], **options: Any) -> None:
        super().__init__(ann_file, **options)
        if unknown := {*metric} - {*RULES}:
            raise ConfigError(f"val_evaluator.metric: {min(unknown)!r} is none of {', '.join(RULES)}")
        self.rules = metric

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """AP, from 0 to 1, as ``11points_mAP``, ``area_mAP_50``, ..."""
        truth = defaultdict(list)
        for annotation in self._coco_api.dataset["annotations"]:
            truth[annotation["image_id"], annotation["category_id"]].append(annotation)
        names = self.dataset_meta["classes"]
        by_name = {
            names[i]: average_precision(_image(found, i, truth[found["img_id"], category]) for _, found in results)
            for i, category in enumerate(self._coco_api.get_cat_ids(cat_names=names))
        }
        self.categories = {
            KINDS[rule]: {n: percent(None if ap is None else ap[:, i].mean()) for n, ap in by_name.items()}
            for i, rule in enumerate(RULES)
            if rule in self.rules
        }
        aps = [ap for ap in by_name.values() if ap is not None]
        mean = np.mean(aps, axis=0) if aps else np.full((len(THRESHOLDS), 2), np.nan)
        values: dict[str, float] = {}
        for rule in self.rules:
            by_threshold = mean[:, RULES.index(rule)]
            named = {"mAP": by_threshold.mean(), "mAP_50": by_threshold[0], "mAP_75": by_threshold[5]}
            values |= {f"{rule}_{name}": float(value) for name, value in named.items() if np.isfinite(value)}
        return values


def _image(found: dict[str, Any], label: int, truth: list[dict[str, Any]]) -> Image:
    mine = found["labels"] == label
    objects = np.array([annotation["bbox"] for annotation in truth], float).reshape(-1, 4)
    objects[:, 2:] += objects[:, :2]
    difficult = np.array([annotation.get("difficult", 0) for annotation in truth], bool)
    return Image(found["bboxes"][mine], found["scores"][mine], objects, difficult)
