"""AP of PASCAL VOC, compared with values by hand, and with MMDetection's evaluation where that is correct."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmdet.evaluation import eval_map

from mcl.config import ConfigError
from mcl.finetune import metric, voc_ap
from tests.mcl.finetune.test_run import recorded

A, B, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (50, 50, 60, 60)
LOWER_62 = (0, 0, 10, 6.2)  # IoU with A


def image(found: list[tuple[float, tuple[float, ...]]], objects: list[tuple[tuple[float, ...], int]]) -> voc_ap.Image:
    boxes, difficult = (np.array([o[i] for o in objects], float) for i in (0, 1))
    scores, at = (np.array([f[i] for f in found], float) for i in (0, 1))
    return voc_ap.Image(at.reshape(-1, 4), scores, boxes.reshape(-1, 4), difficult.astype(bool))


HARD = [
    image([(0.9, A), (0.8, A), (0.7, B)], [(A, 0), (B, 1)]),  # correct, duplicate, difficult object
    image([(0.6, LOWER_62), (0.5, FAR)], [(A, 0)]),  # correct up to an IoU of 0.6, wrong
    image([], []),
]


def test_by_hand() -> None:
    """Two objects count. In the order of scores, up to an IoU of 0.6: right, wrong, right, wrong; above: right and
    wrong."""
    ap = voc_ap.average_precision(HARD)
    assert ap is not None
    eleven, area = ap.T
    # Recall 0.5 has a precision of 1, recall 1 one of 2/3: six of eleven points, and half of the area, are below 0.5.
    np.testing.assert_allclose(eleven, [(6 + 5 * 2 / 3) / 11] * 3 + [6 / 11] * 7)
    np.testing.assert_allclose(area, [(1 + 2 / 3) / 2] * 3 + [1 / 2] * 7)


def test_precision_of_a_higher_recall_counts() -> None:
    """Wrong, right, right: both recalls have the precision of the second, 2/3."""
    ap = voc_ap.average_precision([image([(0.9, FAR), (0.8, A), (0.7, B)], [(A, 0), (B, 0)])])
    np.testing.assert_allclose(ap, np.full((10, 2), 2 / 3))


@pytest.mark.parametrize("found", range(11))
def test_recalls_of_tenths(found: int) -> None:
    """k of 10 objects have the recall k/10, which floating-point arithmetic misses for 3, 6 and 7."""
    boxes = [(20.0 * i, 0.0, 20.0 * i + 10, 10.0) for i in range(10)]
    ap = voc_ap.average_precision([image([(1 - i / 20, boxes[i]) for i in range(found)], [(b, 0) for b in boxes])])
    expected = (found + 1) / 11 if found else 0
    np.testing.assert_allclose(ap, [[expected, found / 10]] * 10)


def test_nothing_counts() -> None:
    assert voc_ap.average_precision([image([(0.9, A)], [(A, 1)]), image([(0.9, A)], [])]) is None
    np.testing.assert_array_equal(voc_ap.average_precision([image([], [(A, 0)])]), np.zeros((10, 2)))


@pytest.mark.parametrize("seed", range(5))
def test_equals_mmdetection_if_recalls_are_not_tenths(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def boxes(n: int) -> Any:
        corner = rng.uniform(0, 40, (n, 2))
        return np.hstack([corner, corner + rng.uniform(10, 30, (n, 2))])

    objects, difficult = boxes(17), np.arange(17) >= 13
    found = np.vstack([objects[rng.integers(0, 17, 30)] + rng.uniform(-4, 4, (30, 4)), boxes(20)])
    scores = rng.random(50)
    ap = voc_ap.average_precision([voc_ap.Image(found, scores, objects, difficult)])
    assert ap is not None
    truth = {"bboxes": objects[~difficult], "labels": np.zeros(13, int)}
    truth |= {"bboxes_ignore": objects[difficult], "labels_ignore": np.zeros(4, int)}
    detected = [[np.column_stack([found, scores])]]
    for threshold, values in zip(voc_ap.THRESHOLDS, ap, strict=True):
        for rule, value in zip(voc_ap.RULES, values, strict=True):
            theirs, _ = eval_map(detected, [truth], iou_thr=threshold, eval_mode=rule, logger="silent")
            assert value == pytest.approx(theirs, abs=1e-6)


@pytest.fixture
def measure(tmp_path: Path) -> voc_ap.VOCFolderMetric:
    """Measures HARD as second category; the first one has nothing that counts."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 64} for i in range(3)]
    annotations = []
    for number, one in enumerate(HARD):
        for (x, y, right, bottom), difficult in zip(one.objects.tolist(), one.difficult.tolist(), strict=True):
            box = {"bbox": [x, y, right - x, bottom - y], "difficult": int(difficult)}
            annotations.append({"image_id": number, "category_id": 2, **box})
    annotations.append({"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "difficult": 1})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    path = tmp_path / "voc_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    made = voc_ap.VOCFolderMetric(ann_file=str(path), metric=["11points", "area"])
    made.dataset_meta = {"classes": ("cat", "dog")}
    return made


def test_metric(measure: voc_ap.VOCFolderMetric, tmp_path: Path) -> None:
    """The mean is over categories with objects that count."""
    results = [
        ({}, {"img_id": i, "bboxes": one.boxes, "scores": one.scores, "labels": np.ones(len(one.scores), int)})
        for i, one in enumerate(HARD)
    ]
    values = measure.compute_metrics(results)
    record = recorded({f"voc/{name}": value for name, value in values.items()}, tmp_path, "11points", "area")
    eleven, area = record["box (11 points)"], record["box (area)"]
    assert [eleven[name] for name in ("AP", "AP50", "AP75")] == [63.6, 84.8, 54.5]
    assert [area[name] for name in ("AP", "AP50", "AP75", "APs")] == [60.0, 83.3, 50.0, None]
    assert measure.categories == {
        "box (11 points)": {"cat": None, "dog": 63.6},
        "box (area)": {"cat": None, "dog": 60.0},
    }
    assert (tmp_path / metric.TABLE).read_text().splitlines()[
        -1
    ] == "| 5 | box (area) | 60.0 | 83.3 | 50.0 | - | - | - |"


def test_other_rules_are_refused(measure: voc_ap.VOCFolderMetric, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"val_evaluator\.metric: 'bbox' is none of 11points, area"):
        voc_ap.VOCFolderMetric(ann_file=str(tmp_path / "voc_val.json"), metric=["bbox"])
