"""AP of LVIS by faster-coco-eval. In LVIS, every image was searched for some of the categories only."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import METRICS
from numpy.typing import NDArray

from dali_pipelines.source import SourceError
from mcl.config import ConfigError
from mcl.finetune.metric import KINDS, FolderMetric, percent

PACKAGE = "faster-coco-eval==1.8.0"
MOST = 300
"""Maximum number of detections per image."""

_NEEDED = (
    ("images", "neg_category_ids", list),
    ("images", "not_exhaustive_category_ids", list),
    ("images", "id", int),
    ("categories", "frequency", str),
)
_COCO = "or take COCO's AP: val_evaluator.type=FolderMetric"


@METRICS.register_module()
class LVISFolderMetric(FolderMetric):
    """AP of LVIS, also of rare, common and frequent categories, with checked annotations.

    Detections of a category are ignored in images that were not searched for it. False positives are also ignored in
    images in which not all objects of the category were annotated.

    Raises:
        ConfigError: faster-coco-eval is not installed.
        SourceError: the annotations lack LVIS's fields.
    """

    default_prefix = "lvis"

    def __init__(self, ann_file: str, **options: Any) -> None:
        try:
            import faster_coco_eval  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"AP of LVIS needs faster-coco-eval ({error}): pip install {PACKAGE}; {_COCO}") from None
        super().__init__(ann_file, **options)
        for section, field, kind in _NEEDED:
            if not all(isinstance(entry.get(field), kind) for entry in self._coco_api.dataset[section]):
                raise SourceError(
                    f"{ann_file}: AP of LVIS needs {field} of all {section}, {kind.__name__}; take LVIS' annotations, "
                    f"{_COCO}"
                )

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """AP, from 0 to 1, as ``bbox_mAP``, ``segm_mAP_50``, ..., and by frequency as ``bbox_mAP_r``, ``_c``, ``_f``;
        without entries for which there are no objects."""
        self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta["classes"])
        frequencies = np.array([self._coco_api.cats[category]["frequency"] for category in self.cat_ids])
        found = [_best(result) for _, result in results]
        values: dict[str, float] = {}
        self.categories = {}
        with tempfile.TemporaryDirectory() as folder:
            files = self.results2json(found, f"{folder}/found")
            for kind in self.metrics:
                precision = self._precision(json.loads(Path(files[kind]).read_text()), kind)
                parts = {"mAP": precision[..., 0], "mAP_50": precision[:, 0, :, 0], "mAP_75": precision[:, 5, :, 0]}
                parts |= {f"mAP_{size}": precision[..., number] for number, size in enumerate("sml", start=1)}
                parts |= {f"mAP_{letter}": precision[frequencies == letter, ..., 0] for letter in "rcf"}
                values |= {f"{kind}_{name}": float(p[p >= 0].mean()) for name, p in parts.items() if (p >= 0).any()}
                each = zip(self.dataset_meta["classes"], precision[..., 0], strict=True)
                self.categories[KINDS[kind]] = {n: percent(p.mean() if (p >= 0).all() else None) for n, p in each}
        return values

    def _precision(self, found: list[dict[str, Any]], kind: str) -> NDArray[Any]:
        """Precision (category, 10 IoUs, 101 recalls, 4 sizes), -1 where there are no objects.

        Evaluates one category at a time, in the images that were searched for it: all pairs of images and categories
        would need 25 GB.
        """
        from faster_coco_eval import COCO, COCOeval_faster

        searched = defaultdict(set)
        for image in self._coco_api.dataset["images"]:
            for category in image["neg_category_ids"]:
                searched[category].add(image["id"])
        for annotation in self._coco_api.dataset["annotations"]:
            searched[annotation["category_id"]].add(annotation["image_id"])
        found = [detection for detection in found if detection["image_id"] in searched[detection["category_id"]]]
        if kind == "segm":
            for detection in found:
                del detection["bbox"]  # otherwise sizes would be those of boxes
        truth = COCO(self._coco_api.dataset)
        evaluation = COCOeval_faster(truth, truth.loadRes(found), kind, lvis_style=True)
        evaluation.params.maxDets = [MOST]
        precision = np.full((len(self.cat_ids), 10, 101, 4), -1.0)
        for number, category in enumerate(self.cat_ids):
            if searched[category]:
                evaluation.params.catIds, evaluation.params.imgIds = [category], sorted(searched[category])
                evaluation.evaluate()
                evaluation.accumulate()
                precision[number] = evaluation.eval["precision"][:, :, 0, :, 0]
        return precision


def _best(result: dict[str, Any]) -> dict[str, Any]:
    """The best detections of an image, at most ``MOST``."""
    best = np.argsort(-result["scores"], kind="stable")[:MOST]
    parts = {key: value for key, value in result.items() if key != "img_id"}
    kept = {key: [value[i] for i in best] if isinstance(value, list) else value[best] for key, value in parts.items()}
    return {"img_id": result["img_id"], **kept}
