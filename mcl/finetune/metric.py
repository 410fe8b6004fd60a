"""AP by pycocotools, of folders and detectors as they are."""

from typing import Any

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS

_MEASURES = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


@METRICS.register_module()
class FolderMetric(CocoMetric):
    """MMDetection's, for annotations without ``iscrowd``, as LVIS has them, too; and a detector that finds nothing has
    an AP of 0 instead of none."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for annotation in self._coco_api.dataset["annotations"]:
            annotation.setdefault("iscrowd", 0)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """By ``bbox_mAP``, ``segm_mAP_50``, ...; -1 where there is nothing of that size to find."""
        found: dict[str, float] = super().compute_metrics(results)
        for kind in self.metrics:
            for measure in _MEASURES:
                found.setdefault(f"{kind}_{measure}", 0.0)
        return found
