"""AP by pycocotools, and its tables in the run folder."""

import functools
import json
import math
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
"""LVIS only: rare, common and frequent categories."""

KINDS = {"bbox": "box", "segm": "mask", "11points": "box (11 points)", "area": "box (area)"}
RESULTS = "ap.json"
TABLE = "ap.md"
CATEGORIES = "categories.json"


@METRICS.register_module()
class FolderMetric(CocoMetric):
    """MMDetection's metric, with checked annotations; also for detectors without any detection."""

    metrics: list[str]
    categories: dict[str, dict[str, float | None]]
    """AP in percent of the last evaluation, by kind and category; None for a category without objects."""

    def __init__(self, ann_file: str, **options: Any) -> None:
        super().__init__(**options, classwise=True)
        self._coco_api = CheckedCOCO(ann_file, masks="segm" in self.metrics)
        self._coco_api.loadRes = functools.partial(_load, self._coco_api)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """AP, from 0 to 1, as ``bbox_mAP``, ``segm_mAP_50``, ...; without sizes that no object has."""
        found: dict[str, float] = {}
        kinds, self.categories = self.metrics, {}
        for kind in kinds:  # one by one: MMDetection gives both APs of a category the same name
            self.metrics = [kind]
            measured = super().compute_metrics(results if kind == "segm" else [_without_masks(r) for r in results])
            aps = {name: float(measured.pop(f"{name}_precision", math.nan)) for name in self.dataset_meta["classes"]}
            self.categories[KINDS[kind]] = {name: percent(None if math.isnan(ap) else ap) for name, ap in aps.items()}
            found |= measured
        self.metrics = kinds
        return {name: value for name, value in found.items() if value >= 0}


def _without_masks(result: Any) -> Any:
    truth, found = result
    return truth, {name: value for name, value in found.items() if name != "masks"}


def _load(truth: COCO, found: list[Any]) -> COCO:
    """Detections in pycocotools' form, which cannot load an empty list itself."""
    if found:
        return type(truth).loadRes(truth, found)
    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


@HOOKS.register_module()
class APTable(Hook):
    """Writes AP to the run folder: ``ap.json`` and ``ap.md``, with one entry per evaluation, and ``categories.json``,
    with the AP by category of the last evaluation."""

    _loaded = 0

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get("meta", {}).get("iter", 0)

    @master_only
    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        folder, step = Path(runner.work_dir), runner.iter or self._loaded  # runner.iter is 0 if nothing is trained
        record: dict[str, Any] = {"step": step, **_aps(metrics or {}, runner.cfg.val_evaluator.metric)}
        records = [other for other in read(folder) if other["step"] < step]
        records.append(record)
        rewrite(folder / RESULTS, json.dumps(records, indent=1) + "\n")
        rewrite(folder / TABLE, table(records))
        aps = [f"{kind} AP {_text(record[kind]['AP'])}" for kind in KINDS.values() if kind in record]
        log.info("evaluation at step %d: %s", step, ", ".join(aps))

    @master_only
    def after_val(self, runner: Any) -> None:
        categories = getattr(runner.val_loop.evaluator.metrics[0], "categories", {})
        rewrite(Path(runner.work_dir) / CATEGORIES, json.dumps(categories, indent=1, ensure_ascii=False) + "\n")


def _aps(metrics: Mapping[str, float], measured: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """AP by kind and name, in percent; None for sizes that no object has."""
    found = {name.partition("/")[2]: value for name, value in metrics.items()}
    aps: dict[str, dict[str, float | None]] = {}
    for kind in measured:
        more = {measure: name for measure, name in _FREQUENCIES.items() if f"{kind}_{measure}" in found}
        values = {name: found.get(f"{kind}_{measure}") for measure, name in (_NAMES | more).items()}
        aps[KINDS[kind]] = {name: percent(value) for name, value in values.items()}
    return aps


def percent(value: float | None) -> float | None:
    """A fraction in percent, rounded to one decimal place."""
    return None if value is None else round(100 * value, 1)


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of the evaluations of a run, in their order."""
    path = folder / RESULTS
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table of evaluations, AP in percent."""
    rows = [(record["step"], kind, record[kind]) for record in records for kind in KINDS.values() if kind in record]
    names = dict.fromkeys([*_NAMES.values(), *(name for *_, aps in rows for name in aps)])
    lines = ["| step | of | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for step, kind, aps in rows:
        lines.append(f"| {step} | {kind} | " + " | ".join(_text(aps.get(name)) for name in names) + " |")
    return "\n".join(lines) + "\n"


def by_category(folder: Path) -> str:
    """Markdown table of the AP by category, in percent, of the last evaluation of a run; empty if there is none."""
    path = folder / CATEGORIES
    aps = json.loads(path.read_text()) if path.exists() else {}
    if not aps:
        return ""
    lines = ["| category | " + " | ".join(f"{kind} AP" for kind in aps) + " |", "|---|" + "---|" * len(aps)]
    for name in next(iter(aps.values())):
        lines.append(f"| {name} | " + " | ".join(_text(values[name]) for values in aps.values()) + " |")
    return "\n".join(lines) + "\n"


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
