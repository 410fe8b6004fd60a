"""Multi-label classification with linear support vector machines, the usual protocol for VOC 2007 (arXiv 1905.01235).

The classes of an image are those of its boxes in a COCO annotation file. Each class has its own machine, whose cost is
chosen by three-fold cross-validation on the training images. The score is the average precision on held-out images,
averaged over classes. Needs scikit-learn.
"""

import json
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dali_pipelines.source import Source
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.evaluation.features import Features, Numbers, Progress

COSTS = (0.01, 0.1, 1.0, 10.0)
"""Costs from which cross-validation chooses."""

_FOLDS = 3
_MOST_BYTES = 2 << 30  # limit for all features; scikit-learn needs twice as much
_KEYS = {"train": "evaluation.annotations", "val": "evaluation.val_annotations"}

Labels = npt.NDArray[np.int8]
"""(n, classes) 1 if an image has the class, -1 if it does not, 0 if this is unknown (difficult, crowd)."""


def check(config: Config) -> None:
    """Checks that the evaluation is possible.

    Raises:
        ConfigError: held-out images or annotations are not set, or scikit-learn is not installed.
    """
    own = config.evaluation
    if not config.data.val_root:
        raise ConfigError("data.val_root: svm needs held-out images; set it to their folder")
    for key, path in (("annotations", own.annotations), ("val_annotations", own.val_annotations)):
        if not path:
            raise ConfigError(f"evaluation.{key}: svm needs the classes of images; set it to a COCO annotation file")
    if find_spec("sklearn") is None:
        raise ConfigError("evaluation: svm needs scikit-learn; pip install scikit-learn")


def annotated(path: str, source: Source, split: str) -> tuple[Numbers, Labels, list[str]]:
    """Reads a COCO annotation file: numbers of the images that it lists, labels of all images, and names of classes.

    Args:
        path: the file; it names images relative to the folder of the source.
        source: the images.
        split: train or val.

    Raises:
        ConfigError: the file cannot be read, is not a COCO annotation file, or lists none of the images.
    """
    key = _KEYS[split]
    try:
        with open(path, "rb") as file:
            content: Any = json.load(file)
        names = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        column = {category: i for i, category in enumerate(names)}
        prefix = source.base.rstrip("/") + "/"
        number = {name.removeprefix(prefix): i for i, name in enumerate(source.names)}
        row = {image["id"]: number[image["file_name"]] for image in content["images"] if image["file_name"] in number}
        labels = np.full((len(source), len(names)), -1, np.int8)
        for one in content["annotations"]:
            if one["image_id"] in row:
                known = not (one.get("iscrowd") or one.get("ignore") or one.get("difficult"))
                at = row[one["image_id"]], column[one["category_id"]]
                labels[at] = 1 if known else max(0, labels[at])
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {path} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{key}: {path} is not a COCO annotation file ({what})") from None
    if not row:
        raise ConfigError(f"{key}: {path} lists none of the images in {source.root}; it must name them relative to it")
    numbers = np.array(sorted(row.values()))
    return numbers, labels, list(names.values())


def mean_average_precision(
    train: Features, train_labels: Labels, test: Features, test_labels: Labels, progress: Progress
) -> tuple[float, float]:
    """Score on the test images, and the score of guessing, which is the share of images with a class, averaged.

    Classes are divided among the processes. Features are those of the process's share; labels are those of all images.

    Raises:
        ConfigError: the features of all images take more than 2 GB.
    """
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.svm import LinearSVC

    x, of_x = _everyone(train)
    y, of_y = _everyone(test)
    results = []
    rank, world = distributed.rank(), distributed.world_size()
    for own in range(0, train_labels.shape[1], world):
        if own + rank < train_labels.shape[1]:
            truth, asked = train_labels[of_x, own + rank], test_labels[of_y, own + rank]
            known, tested = truth != 0, asked != 0
            if min((truth == 1).sum(), (truth == -1).sum()) >= _FOLDS and (asked == 1).any():
                machines = [
                    LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
                    for cost in COSTS
                ]
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # machines that do not converge: their cost is not chosen
                    folds = StratifiedKFold(_FOLDS)
                    scores = [
                        cross_val_score(m, x[known], truth[known], cv=folds, scoring="average_precision").mean()
                        for m in machines
                    ]
                    best = machines[int(np.argmax(scores))].fit(x[known], truth[known])
                found = average_precision_score(asked[tested] == 1, best.decision_function(y[tested]))
                results.append((float(found), float((asked[tested] == 1).mean())))
        progress()
    everyone = [result for part in distributed.gather_objects(results) for result in part]
    if not everyone:
        raise ConfigError(
            f"{_KEYS['train']}: no class has {_FOLDS} training images with it, {_FOLDS} without, and a held-out image"
        )
    score, chance = np.mean(everyone, 0).tolist()
    return score, chance


def _everyone(features: Features) -> tuple[npt.NDArray[np.float32], Numbers]:
    """Features of all processes, scaled to unit length, and the numbers of their images."""
    if sum(distributed.gather_objects(features.values.numel())) * 4 > _MOST_BYTES:
        raise ConfigError("evaluation: too many features for svm; use knn or linear for sets of this size")
    parts = distributed.gather_objects((features.values, features.index))
    values, index = (torch.cat(part) for part in zip(*parts, strict=True))
    return torch.nn.functional.normalize(values, dim=1).numpy(), index.numpy()
