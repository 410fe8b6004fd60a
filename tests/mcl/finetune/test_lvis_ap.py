"""AP of LVIS, compared with values computed by hand."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from faster_coco_eval import COCO, COCOeval_faster
from pycocotools.mask import encode

from dali_pipelines.source import SourceError
from mcl.config import ConfigError
from mcl.finetune import lvis_ap, metric
from tests.conftest import ROOT
from tests.mcl.finetune.test_run import recorded

CAT, DOG, COW = 1, 2, 3
BOX, FAR = [10, 10, 40, 30], [60, 60, 30, 20]  # x, y, width, height
Found = tuple[int, int, list[int], float]
"""Image, category, box, score."""

RIGHT: list[Found] = [(1, DOG, BOX, 0.8), (2, CAT, BOX, 0.5)]


def annotations(path: Path, **changes: Any) -> dict[str, Any]:
    """A dog in the first image and a cat in the second. The first was not searched for cats, and not all dogs of the
    second are marked."""
    images: list[dict[str, Any]] = [
        {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []},
        {"id": 2, "neg_category_ids": [], "not_exhaustive_category_ids": [DOG]},
        {"id": 3, "neg_category_ids": [DOG], "not_exhaustive_category_ids": []},
    ]
    images = [{**image, "file_name": f"{image['id']}.jpg", "width": 100, "height": 90} for image in images]
    names = ((CAT, "cat", "r"), (DOG, "dog", "f"), (COW, "cow", "c"))
    categories = [{"id": number, "name": name, "frequency": frequency} for number, name, frequency in names]
    objects = [(1, DOG, BOX), (2, CAT, BOX), (2, DOG, FAR)]
    marked = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        for number, (image, category, box) in enumerate(objects, start=1)
    ]
    for annotation in marked:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    content = {"images": images, "categories": categories, "annotations": marked, **changes}
    path.write_text(json.dumps(content))
    return content


def results(found: list[Found], order: tuple[int, ...] = (CAT, DOG, COW)) -> list[Any]:
    """Results of a detector, with boxes as masks."""
    made = []
    for image in (1, 2, 3):
        mine = [f for f in found if f[0] == image]
        boxes = np.array([f[2] for f in mine], float).reshape(-1, 4)
        masks = np.zeros((90, 100, len(mine)), np.uint8, order="F")
        for number, (x, y, w, h) in enumerate(boxes.astype(int)):
            masks[y : y + h, x : x + w, number] = 1
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([f[3] for f in mine])
        labels = np.array([order.index(f[1]) for f in mine], int)
        rles = encode(masks) if mine else []
        made.append(({}, {"img_id": image, "bboxes": boxes, "scores": scores, "labels": labels, "masks": rles}))
    return made


def measured(kind: type[metric.FolderMetric], path: Path, found: list[Found]) -> dict[str, float]:
    measure = kind(ann_file=str(path), metric=["bbox", "segm"])
    measure.dataset_meta = {"classes": ("cat", "dog", "cow")}
    values: dict[str, float] = measure.compute_metrics(results(found))
    return values


SECOND_DOG: Found = (2, DOG, FAR, 0.7)


@pytest.mark.parametrize(
    ("more", "lvis", "coco"),
    [
        ([], 1, 1),
        # Image 1 was not searched for cats. COCO counts the cat as wrong, with precision 1/2 at all recalls of cats.
        ([(1, CAT, BOX, 0.9)], 1, (0.5 + 1) / 2),
        # Image 2 may have more dogs than those marked. COCO counts the others as wrong, and its two dogs follow at 1/2
        # and 2/3.
        ([(2, DOG, BOX, 0.9)], 1, (1 + 2 / 3) / 2),
        # Image 3 was searched for dogs, and has none.
        ([(3, DOG, BOX, 0.9)], (1 + 2 / 3) / 2, (1 + 2 / 3) / 2),
        # There are no cows, so they have no AP.
        ([(3, COW, BOX, 0.9)], 1, 1),
    ],
)
def test_categories_that_were_not_searched_for_do_not_count(
    more: list[Found], lvis: float, coco: float, tmp_path: Path
) -> None:
    annotations(tmp_path / "lvis.json")
    found = [*RIGHT, SECOND_DOG, *more]
    for kind, expected in ((lvis_ap.LVISFolderMetric, lvis), (metric.FolderMetric, coco)):
        values = measured(kind, tmp_path / "lvis.json", found)
        assert values["bbox_mAP"] == pytest.approx(expected, abs=1e-3)
        assert values["segm_mAP"] == pytest.approx(expected, abs=1e-3)


def test_frequencies_are_columns(tmp_path: Path) -> None:
    """Dogs, of which the small one is missed, are frequent; common cows do not occur."""
    annotations(tmp_path / "lvis.json")
    values = measured(lvis_ap.LVISFolderMetric, tmp_path / "lvis.json", RIGHT)
    half = 51 / 101  # recalls 0, 0.01, ..., 1
    assert values["bbox_mAP_r"] == 1
    assert values["bbox_mAP_f"] == values["bbox_mAP_50"] * 2 - 1 == pytest.approx(half)
    record = recorded({f"lvis/{name}": value for name, value in values.items()}, tmp_path, "bbox", "segm")
    assert {name: record["mask"].get(name) for name in ("APr", "APc", "APf", "APl")} == {
        **{"APr": 100.0, "APc": None, "APf": 50.5, "APl": None}
    }
    header, _, box, _ = (tmp_path / metric.TABLE).read_text().splitlines()
    assert header == "| step | of | AP | AP50 | AP75 | APs | APm | APl | APr | APf |"
    assert box == "| 5 | box | 75.2 | 75.2 | 75.2 | 0.0 | 100.0 | - | 100.0 | 50.5 |"


@pytest.mark.parametrize(("others", "ap"), [(299, 1), (300, 0)])
def test_300_detections_of_an_image_count(others: int, ap: float, tmp_path: Path) -> None:
    content = annotations(tmp_path / "lvis.json")
    annotations(tmp_path / "lvis.json", annotations=content["annotations"][:1])
    more: list[Found] = [(1, COW, FAR, 0.9)] * others
    values = measured(lvis_ap.LVISFolderMetric, tmp_path / "lvis.json", [*RIGHT[:1], *more])
    assert values["bbox_mAP"] == ap


def test_equals_an_evaluation_of_all_pairs_at_once(tmp_path: Path) -> None:
    """Compares random boxes with a single evaluation by faster-coco-eval."""
    rng = np.random.default_rng(0)
    boxes = [[*rng.integers(0, 40, 2).tolist(), *rng.integers(5, 50, 2).tolist()] for _ in range(12)]
    marked = [
        {"id": i, "image_id": int(rng.integers(1, 4)), "category_id": int(rng.integers(1, 4)), "bbox": box, "area": 900}
        for i, box in enumerate(boxes, start=1)
    ]
    content = annotations(tmp_path / "lvis.json", annotations=marked)
    found = [
        (a["image_id"], a["category_id"], [v + int(d) for v, d in zip(a["bbox"], rng.integers(0, 6, 4), strict=True)])
        for a in marked
    ]
    found += [(int(rng.integers(1, 4)), int(rng.integers(1, 4)), boxes[rng.integers(12)]) for _ in range(40)]
    scored: list[Found] = [(*one, float(score)) for one, score in zip(found, rng.random(len(found)), strict=True)]
    measure = lvis_ap.LVISFolderMetric(ann_file=str(tmp_path / "lvis.json"), metric=["bbox"])
    measure.dataset_meta = {"classes": ("cat", "dog", "cow")}
    values = measure.compute_metrics(results(scored))
    truth = COCO(content)
    keys = ("image_id", "category_id", "bbox", "score")
    detections = truth.loadRes([dict(zip(keys, one, strict=True)) for one in scored])
    theirs = COCOeval_faster(truth, detections, "bbox", lvis_style=True)
    theirs.params.maxDets = [300]
    theirs.run()
    names = {"mAP": "AP_all", "mAP_50": "AP_50", "mAP_75": "AP_75", "mAP_s": "AP_small", "mAP_r": "APr", "mAP_f": "APf"}
    expected = {f"bbox_{ours}": theirs.stats_as_dict[name] for ours, name in names.items()}
    assert 0.1 < expected["bbox_mAP"] < 0.9
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    aps = [ap for ap in measure.categories["box"].values() if ap is not None]
    assert np.mean(aps) == pytest.approx(100 * expected["bbox_mAP"], abs=0.05)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("images", "neg_category_ids", None, r"AP of LVIS needs neg_category_ids of all images, list; take LVIS'"),
        ("categories", "frequency", None, r"AP of LVIS needs frequency of all categories, str; .*FolderMetric"),
        ("categories", "frequency", "x", r"categories\[0\] \(id 1\) has the frequency 'x'; it must be r, c or f"),
        (
            "images",
            "neg_category_ids",
            [9],
            r"images\[0\] \(id 1\) has the neg_category_ids 9, which the file does not",
        ),
        ("images", "neg_category_ids", 9, r"images\[0\] \(id 1\) has the neg_category_ids 9; it must be a list of ids"),
    ],
)
def test_annotations_of_others_are_refused(section: str, field: str, value: Any, message: str, tmp_path: Path) -> None:
    content = annotations(tmp_path / "lvis.json")
    content[section][0][field] = value
    annotations(tmp_path / "lvis.json", **content)
    with pytest.raises(SourceError, match=message):
        lvis_ap.LVISFolderMetric(ann_file=str(tmp_path / "lvis.json"))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations(tmp_path / "lvis.json")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ConfigError, match=r"AP of LVIS needs faster-coco-eval .*: pip install faster-coco-eval==[0-9]"):
        lvis_ap.LVISFolderMetric(ann_file=str(tmp_path / "lvis.json"))
    assert lvis_ap.PACKAGE in (ROOT / "requirements" / "dev.txt").read_text().splitlines()
