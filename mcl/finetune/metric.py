"""AP by pycocotools, of folders and detectors as they are, and its tables in the run folder."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mcl.finetune.loading import CheckedCOCO
from mcl.records.metrics import log, rewrite

_NAMES = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "APs", "mAP_m": "APm", "mAP_l": "APl"}
_FREQUENCIES = {"mAP_r": "APr", "mAP_c": "APc", "mAP_f": "APf"}
"""Of LVIS alone: rare, common and frequent categories."""

_KINDS = {"bbox": "box", "segm": "mask", "11points": "box (11 points)", "area": "box (area)"}
RESULTS = "ap.json"
TABLE = "ap.md"


@METRICS.register_module()
class FolderMetric(CocoMetric):
    """MMDetection's, of checked annotations, and for detectors that find nothing, too."""

    def __init__(self, ann_file: str, **options: Any) -> None:
        super().__init__(**options)
        self._coco_api = CheckedCOCO(ann_file, masks="segm" in self.metrics)
        self._coco_api.loadRes = functools.partial(_load, self._coco_api)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """By ``bbox_mAP``, ``segm_mAP_50``, ...; without those of sizes that no object has."""
        found: dict[str, float] = super().compute_metrics(results)
        return {name: value for name, value in found.items() if value >= 0}


def _load(truth: COCO, found: list[Any]) -> COCO:
    """Detections beside the annotations; pycocotools evaluates an empty list, but does not load it."""
    if found:
        return type(truth).loadRes(truth, found)
    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


@HOOKS.register_module()
class APTable(Hook):
    """Writes what pycocotools measured into the run folder: ``ap.json``, a record per evaluation, and ``ap.md``."""

    @master_only
    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        folder = Path(runner.work_dir)
        record = {"step": runner.iter, **_aps(metrics or {}, runner.cfg.val_evaluator.metric)}
        records = [other for other in read(folder) if other["step"] < runner.iter]
        records.append(record)
        rewrite(folder / RESULTS, json.dumps(records, indent=1) + "\n")
        rewrite(folder / TABLE, table(records))
        aps = [f"{kind} AP {_text(record[kind]['AP'])}" for kind in _KINDS.values() if kind in record]
        log.info("evaluation at step %d: %s", runner.iter, ", ".join(aps))


def _aps(metrics: Mapping[str, float], measured: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """AP by kind and name, in percent; None where there is nothing of that size to detect."""
    found = {name.partition("/")[2]: value for name, value in metrics.items()}
    aps: dict[str, dict[str, float | None]] = {}
    for kind in measured:
        more = {measure: name for measure, name in _FREQUENCIES.items() if f"{kind}_{measure}" in found}
        values = {name: found.get(f"{kind}_{measure}") for measure, name in (_NAMES | more).items()}
        aps[_KINDS[kind]] = {name: None if value is None else round(100 * value, 1) for name, value in values.items()}
    return aps


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of the evaluations of a run, in their order."""
    path = folder / RESULTS
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table of evaluations, AP in percent."""
    rows = [(record["step"], kind, record[kind]) for record in records for kind in _KINDS.values() if kind in record]
    names = dict.fromkeys([*_NAMES.values(), *(name for *_, aps in rows for name in aps)])
    lines = ["| step | of | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for step, kind, aps in rows:
        lines.append(f"| {step} | {kind} | " + " | ".join(_text(aps.get(name)) for name in names) + " |")
    return "\n".join(lines) + "\n"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
