"""AP by pycocotools, of folders and detectors as they are, and its tables in the run folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mcl.finetune.loading import CheckedCOCO
from mcl.records.metrics import rewrite

_NAMES = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "APs", "mAP_m": "APm", "mAP_l": "APl"}
_KINDS = {"bbox": "box", "segm": "mask"}
RESULTS = "ap.json"
TABLE = "ap.md"


@METRICS.register_module()
class FolderMetric(CocoMetric):
    """MMDetection's, of checked annotations; and a detector that finds nothing has an AP of 0 instead of none."""

    def __init__(self, ann_file: str, **options: Any) -> None:
        super().__init__(**options)
        self._coco_api = CheckedCOCO(ann_file, masks="segm" in self.metrics)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """By ``bbox_mAP``, ``segm_mAP_50``, ...; -1 where there is nothing of that size to find."""
        found: dict[str, float] = super().compute_metrics(results)
        for kind in self.metrics:
            for measure in _NAMES:
                found.setdefault(f"{kind}_{measure}", 0.0)
        return found


@HOOKS.register_module()
class APTable(Hook):
    """Writes what pycocotools measured into the run folder: ``ap.json``, a record per evaluation, and ``ap.md``."""

    @master_only
    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        folder = Path(runner.work_dir)
        record = {"step": runner.iter, **_aps(metrics or {})}
        records = [other for other in read(folder) if other["step"] < runner.iter]
        records.append(record)
        rewrite(folder / RESULTS, json.dumps(records, indent=1) + "\n")
        rewrite(folder / TABLE, table(records))
        runner.logger.info("\n%s", table([record]))


def _aps(metrics: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """AP by kind and name, in percent; None where there is nothing of that size to detect."""
    aps: dict[str, dict[str, float | None]] = {}
    for name, value in metrics.items():
        kind, _, measure = name.removeprefix("coco/").partition("_")
        if kind in _KINDS and measure in _NAMES:
            aps.setdefault(_KINDS[kind], {})[_NAMES[measure]] = round(100 * value, 1) if value >= 0 else None
    return aps


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of the evaluations of a run, in their order."""
    path = folder / RESULTS
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table of evaluations, AP in percent."""
    lines = [
        "| step | of | " + " | ".join(_NAMES.values()) + " |",
        "|---|---|" + "---|" * len(_NAMES),
    ]
    for record in records:
        for kind in _KINDS.values():
            if kind in record:
                values = ["-" if value is None else f"{value:.1f}" for value in record[kind].values()]
                lines.append(f"| {record['step']} | {kind} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
