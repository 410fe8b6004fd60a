"""Annotations that pass the check can be trained on, and a perfect detector has an AP of 100 on them.

Annotation files are random, and many are damaged at random places of the JSON, or of its bytes.
"""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmdet.datasets.transforms import LoadAnnotations
from mmengine.logging import MMLogger
from pycocotools import mask as rle

from dali_pipelines.source import SourceError
from mcl.finetune.annotations import Annotations, check
from mcl.finetune.loading import COCOFolder
from mcl.finetune.metric import FolderMetric

SIDES = st.integers(1, 50)
ODD = st.sampled_from(
    [
        *(None, True, False, "", "7", "-0.5", "x", "NaN", "\ud800", "\udce9", "a\0", [], {}, [[]], [0], [[1, 2, 3]]),
        *(0, 1, 2, -1, 0.5, 1e-9, 7.0, 300, 2**31, 2**53, 2**63, 10**400, -(10**400), 1e300, -1e300),
        *(float("nan"), float("inf"), float("-inf"), "1" * 400, [[0, 0, 9, 9]], {"size": [9, 9], "counts": "Q2"}),
    ]
)


@st.composite
def images_of_objects(draw: st.DrawFn) -> dict[str, Any]:
    """Annotations in order, with ids, flags and masks of all kinds."""
    key = draw(
        st.sampled_from(
            [
                lambda i: i,
                lambda i: i + 1,
                str,
                lambda i: f"image {i}",
                lambda i: i + 2**62,
                lambda i: i + 2**63,
                lambda i: f"{i}" if i else i,
            ]
        )
    )
    number = draw(st.sampled_from([lambda v: v, lambda v: v, str, float]))
    images = [
        {"id": key(i), "file_name": f"{i}.jpg", "width": number(draw(SIDES)), "height": number(draw(SIDES))}
        for i in range(draw(st.integers(1, 3)))
    ]
    categories = [{"id": key(i), "name": f"class {i}"} for i in range(draw(st.integers(1, 2)))]
    flaw = draw(st.sampled_from([None, None, None, None, "size", "counts", "far"]))
    annotations = []
    for i in range(draw(st.integers(1, 6))):
        image = draw(st.sampled_from(images))
        width, height = int(float(image["width"])), int(float(image["height"]))
        x, y = draw(st.floats(-width / 2, width - 0.5)), draw(st.floats(-height / 2, height - 0.5))
        box = [x, y, max(0, -x) + draw(st.floats(0, width)), max(0, -y) + draw(st.floats(0, height))]
        annotation = {
            "id": key(i),
            "image_id": image["id"],
            "category_id": draw(st.sampled_from(categories))["id"],
            "bbox": [number(v) for v in box],
            "area": number(box[2] * box[3]),
            "segmentation": draw(masks(box, width, height, flaw)),
        }
        if draw(st.booleans()):
            annotation["iscrowd"] = draw(st.sampled_from([0, 0, 1, None, "1", True]))
        annotations.append(annotation)
    return {"images": images, "categories": categories, "annotations": annotations}


@st.composite
def masks(draw: st.DrawFn, box: list[float], width: int, height: int, flaw: str | None) -> Any:
    """Polygons around a box, or an encoding of the box or of noise; with a flaw that was reported of real files."""
    x, y, w, h = box
    kind = draw(st.sampled_from(["polygons", "list", "text"]))
    if kind == "polygons":
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        noise = draw(st.lists(st.floats(-1, 1), min_size=8, max_size=8))
        shaken = [
            corner + draw(st.sampled_from([0, 1, 5 if flaw != "far" else 1e9])) * shift
            for corner, shift in zip(corners, noise, strict=True)
        ]
        return [corners, shaken][: draw(st.integers(1, 2))] + draw(st.sampled_from([[], [corners[:4]]]))
    if flaw == "size":
        width, height = height, width
    pixels = np.zeros((height, width), np.uint8, order="F")
    if draw(st.booleans()):
        pixels[max(0, int(y)) : int(y + h), max(0, int(x)) : int(x + w)] = 1
    else:
        pixels[:] = np.random.default_rng(draw(st.integers(0, 9))).random(pixels.shape) < draw(st.floats(0, 1))
    flat = pixels.ravel(order="F")
    counts = np.diff([0, *np.flatnonzero(np.diff(flat, prepend=0)), flat.size]).tolist()
    if flaw == "counts":
        counts[draw(st.integers(0, len(counts) - 1))] += draw(st.sampled_from([-1, 1, 5, 1000, 2**28]))
    mask = {"size": [height, width], "counts": counts}
    if kind == "text" and min(counts) >= 0:
        mask["counts"] = rle.frPyObjects(mask, height, width)["counts"].decode()
    return mask


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Bytes of an annotation file, which may be damaged at a few places."""
    content = draw(images_of_objects())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        damage(draw, content)
    data = bytearray(json.dumps(content, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass"))
    if draw(st.integers(0, 7)) == 0:
        place = draw(st.integers(0, len(data) - 1))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


def damage(draw: st.DrawFn, content: Any) -> None:
    """Changes, removes or repeats a value."""
    node = content
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 9))):
            break
        node = node[key]
    act = draw(st.integers(0, 3))
    if act == 0:
        del node[key]
    elif act == 1 and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(draw(ODD))


def passes(data: bytes, masks: bool, folder: Path) -> None:
    """Either the check refuses annotations, or MMDetection loads them and they have an AP of 100 as detections."""
    try:
        checked = check(data, "x", masks)
    except SourceError as error:
        str(error).encode()
        event("refused")
        return
    event("corrected" if checked.corrections else "in order")
    path = folder / "annotations.json"
    path.write_bytes(data)
    with contextlib.redirect_stdout(None):  # pycocotools prints
        load(path, checked, masks)
        measured = evaluate(path, checked, masks)
    found = [annotation for annotation in checked.annotations if not annotation["iscrowd"]]
    # For such small boxes, the result depends on rounding.
    if found and not any(0 < min(annotation["bbox"][2:]) < 1e-3 for annotation in found):
        assert measured["coco/bbox_mAP"] == 1
    images = {image["id"]: image for image in checked.images}
    if masks and found and all(rle.area(encoded(a["segmentation"], images[a["image_id"]])) > 0 for a in found):
        assert measured["coco/segm_mAP"] == 1


def load(path: Path, checked: Annotations, masks: bool = True) -> None:
    dataset = COCOFolder(
        ann_file=str(path),
        data_prefix={"img": ""},
        metainfo={"classes": [category["name"] for category in checked.categories]},
        pipeline=[{"type": "mmdet.LoadAnnotations", "with_bbox": True, "with_mask": masks}],
        serialize_data=False,
    )
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        loaded = LoadAnnotations(with_mask=masks)({**info, "ori_shape": (info["height"], info["width"])})
        assert len(loaded["gt_masks" if masks else "gt_bboxes_labels"]) == len(loaded["gt_bboxes"])


def evaluate(path: Path, checked: Annotations, masks: bool = True) -> dict[str, float]:
    """The metric of a detector that finds exactly the annotations."""
    metric = FolderMetric(ann_file=str(path), metric=["bbox", "segm"] if masks else ["bbox"])
    metric.dataset_meta = {"classes": [category["name"] for category in checked.categories]}
    labels = {category["id"]: label for label, category in enumerate(checked.categories)}
    for image in checked.images:
        own = [a for a in checked.annotations if a["image_id"] == image["id"] and not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        predicted = {
            "bboxes": boxes,
            "scores": torch.full((len(own),), 0.9),
            "labels": torch.tensor([labels[a["category_id"]] for a in own], dtype=torch.long),
        }
        if masks:
            predicted["masks"] = [encoded(a["segmentation"], image) for a in own]
        shape = image["height"], image["width"]
        metric.process({}, [{"img_id": image["id"], "ori_shape": shape, "pred_instances": predicted}])
    measured: dict[str, float] = metric.evaluate(size=len(checked.images))
    return measured


def encoded(mask: Any, image: dict[str, Any]) -> Any:
    """A mask as in a detector's results: encoded pixels."""
    parts = mask if isinstance(mask, list) else [mask]
    if not (isinstance(mask, dict) and isinstance(mask["counts"], str)):
        parts = rle.frPyObjects(parts, image["height"], image["width"])
    pixels = rle.decode(parts).max(axis=2)
    return rle.encode(np.asfortranarray(pixels))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    MMLogger.get_current_instance().setLevel("ERROR")
    return tmp_path_factory.mktemp("annotations")


def ids_from_zero(content: Any) -> None:
    for section in ("images", "categories", "annotations"):
        for entry in content[section]:
            entry["id"] -= 1
    for annotation in content["annotations"]:
        annotation["image_id"] -= 1
        annotation["category_id"] -= 1


def ids_as_text(content: Any) -> None:
    for section in ("images", "categories", "annotations"):
        for entry in content[section]:
            entry["id"] = f"number {entry['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"number {annotation['image_id']}"
        annotation["category_id"] = f"number {annotation['category_id']}"


def numbers_as_text(content: Any) -> None:
    for annotation in content["annotations"]:
        annotation["bbox"] = list(map(str, annotation["bbox"]))
        annotation["area"] = str(annotation["area"])
        annotation["segmentation"] = [list(map(str, polygon)) for polygon in annotation["segmentation"]]


def without_flags_and_areas(content: Any) -> None:
    for annotation in content["annotations"]:
        annotation.update(iscrowd=None, area=None)


@pytest.mark.parametrize("edit", [ids_from_zero, ids_as_text, numbers_as_text, without_flags_and_areas])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_harmless_deviations(folder: Path, scratch: Path, edit: Callable[[Any], None], encoding: str) -> None:
    content = json.loads((folder / "instances_val.json").read_text())
    edit(content)
    path = scratch / "annotations.json"
    path.write_text(json.dumps(content), encoding=encoding)
    checked = check(path.read_bytes(), "x")
    load(path, checked)
    measured = evaluate(path, checked)
    assert measured["coco/bbox_mAP"] == measured["coco/segm_mAP"] == 1


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=damaged(), masks=st.booleans())
def test_annotations_are_refused_or_a_perfect_detector_has_100(data: bytes, masks: bool, scratch: Path) -> None:
    passes(data, masks, scratch)


@pytest.mark.soak
@settings(max_examples=5000, deadline=None, database=None)
@given(data=damaged(), masks=st.booleans())
def test_many_annotations(data: bytes, masks: bool, scratch: Path) -> None:
    passes(data, masks, scratch)
