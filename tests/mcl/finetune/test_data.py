"""The check of COCO-format folders, and its errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from dali_pipelines.source import SourceError
from mcl.config import ConfigError
from mcl.finetune.data import open_folder
from mcl.finetune.loading import COCOFolder
from tests.mcl.finetune.conftest import CLASSES, make_folder


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder that tests may damage."""
    return make_folder(tmp_path / "coco", train=2, val=1)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_classes_come_from_annotations(folder: Path) -> None:
    found = open_folder(str(folder), masks=True)
    assert found.classes == CLASSES
    assert (found.train.images, found.val.annotations) == ("train", "instances_val.json")
    assert open_folder(str(folder), wanted=["part"]).classes == ("part",)


@pytest.mark.parametrize(
    ("names", "lvis"),
    [
        (("train2017", "val2017", "annotations/instances_train2017.json", "annotations/instances_val2017.json"), False),
        (("train2017", "val2017", "annotations/lvis_v1_train.json", "annotations/lvis_v1_val.json"), True),
        (
            (
                *("leftImg8bit/train", "leftImg8bit/val"),
                *(f"annotations/instancesonly_filtered_gtFine_{split}.json" for split in ("train", "val")),
            ),
            False,
        ),
        (("a", "b/c", "voc_train.json", "voc_val.json"), False),
    ],
)
def test_other_layouts(fresh: Path, names: tuple[str, ...], lvis: bool) -> None:
    for name in ("annotations", "leftImg8bit", "b"):
        (fresh / name).mkdir()
    for old, new in zip(("train", "val", "instances_train.json", "instances_val.json"), names, strict=True):
        (fresh / old).rename(fresh / new)
        if "voc" in new:
            folder = names[("voc_train.json", "voc_val.json").index(new)]

            def name_by_root(content: Any, folder: str = folder) -> None:
                for image in content["images"]:
                    image["file_name"] = f"{folder}/{image['file_name']}"

            change(fresh / new, name_by_root)
    if lvis:
        for split in ("train", "val"):

            def name_by_url(content: Any, split: str = split) -> None:
                for image in content["images"]:
                    image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{image.pop('file_name')}"

            change(fresh / f"annotations/lvis_v1_{split}.json", name_by_url)
    found = open_folder(str(fresh), lvis=lvis)
    assert (found.train.annotations, found.classes) == (names[2], CLASSES)


def _first(content: Any, **values: Any) -> None:
    content["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: _first(c, bbox=[5, 5, -3, 4]), r"instances_train.json: annotations\[0\] \(id 1\) has the bbox"),
        (lambda c: _first(c, segmentation=[]), r"id 1\) has the segmentation \[\]; it .*_r18_fpn_mini"),
        (lambda c: [a.update(area=0) for a in c["annotations"]], r"nothing to train on: no object of .* with an area"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], r"nothing to train on"),
        (lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]], r"nothing to train on"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), r"train/gone.jpg is missing, and 0 more"),
        (lambda c: c["categories"][0].update(name="cat"), r"same categories in the same order; only train has 'cat'"),
        (lambda c: c["categories"].reverse(), r"same categories in the same order; the order differs"),
        (lambda c: c["categories"][0].update(name="part"), r"two categories have the same name, e.g. 'part'"),
    ],
)
def test_what_is_wrong_is_named(fresh: Path, edit: Callable[[Any], object], message: str) -> None:
    change(fresh / "instances_train.json", edit)
    with pytest.raises(SourceError, match=message):
        open_folder(str(fresh), masks=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("instances_val.json", None, "instances_val.json is missing"),
        ("instances_val.json", "", "instances_val.json: is empty"),
        ("instances_val.json", "[1, 2", "instances_val.json: is not JSON"),
        ("instances_val.json", "[]", "instances_val.json: has no images"),
        ("val/1.jpg", None, "val/1.jpg is missing"),
    ],
)
def test_files_that_are_missing_or_broken(fresh: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (fresh / name).unlink()
    else:
        (fresh / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        open_folder(str(fresh))


@pytest.mark.parametrize(("root", "message"), [("", "not set"), ("/no/where", "does not exist")])
def test_no_folder(root: str, message: str) -> None:
    with pytest.raises(SourceError, match=f"data.root: .*{message}"):
        open_folder(root)


def test_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"it must have instances_train\.json and instances_val\.json"):
        open_folder(str(tmp_path))


def test_nothing_to_train_on(fresh: Path) -> None:
    change(fresh / "instances_train.json", lambda c: [a.update(category_id=1) for a in c["annotations"]])
    assert open_folder(str(fresh)).classes == CLASSES
    with pytest.raises(
        SourceError, match=r"instances_train\.json: nothing to train on: no object of part with an area"
    ):
        open_folder(str(fresh), wanted=["part"])
    change(fresh / "instances_train.json", lambda c: [i.update(width=31, height=31) for i in c["images"]])
    for path in (fresh / "train").iterdir():
        Image.new("RGB", (31, 31)).save(path)
    change(fresh / "instances_train.json", lambda c: [a.update(bbox=[0, 0, 9, 9]) for a in c["annotations"]])
    with pytest.raises(
        SourceError,
        match=r"no object of 2 categories \(thing, \.\.\.\) with an area, not a crowd, in an image of at least 32",
    ):
        open_folder(str(fresh))


def test_images_of_an_epoch(fresh: Path) -> None:
    """As many as in MMDetection's dataset: images without objects of a class, and images that are too small, are left
    out."""

    def edit(content: Any) -> None:
        for number, size in ((3, 128), (4, 31), (5, 128)):  # without objects, too small, with a part only
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": size, "height": size})
            Image.new("RGB", (size, size)).save(fresh / "train" / f"{number}.jpg")
        for number, image in ((21, 4), (22, 5)):
            box = {"bbox": [1, 1, 9, 9], "area": 81, "segmentation": [[1, 1, 9, 1, 9, 9]]}
            content["annotations"].append({"id": number, "image_id": image, "category_id": image - 3, **box})

    change(fresh / "instances_train.json", edit)
    for classes, images in ((("thing", "part"), 3), (("thing",), 2)):
        assert open_folder(str(fresh), classes).images == images
        dataset = COCOFolder(
            [],
            ann_file=str(fresh / "instances_train.json"),
            data_prefix={"img": ""},
            metainfo={"classes": classes},
            filter_cfg={"filter_empty_gt": True, "min_size": 32},
        )
        assert len(dataset) == images


def test_wanted_categories(folder: Path) -> None:
    assert open_folder(str(folder), wanted=None).classes == CLASSES
    with pytest.raises(ConfigError, match=r"no category 'unicorn'; there are thing, part; set data\.classes=\[thing\]"):
        open_folder(str(folder), wanted=["thing", "unicorn"])
    with pytest.raises(ConfigError, match=r"data\.classes: 'part' is named 2 times; name it once"):
        open_folder(str(folder), wanted=["part", "thing", "part"])


def test_categories_of_digits(fresh: Path) -> None:
    """YAML reads them as numbers."""
    for split in ("train", "val"):
        change(fresh / f"instances_{split}.json", lambda c: c["categories"][0].update(name="7"))
    words: list[Any] = [7]
    assert open_folder(str(fresh), wanted=words).classes == ("7",)


def test_many_categories_are_not_all_listed(fresh: Path) -> None:
    for split in ("train", "val"):
        more = [{"id": i, "name": f"class {i}"} for i in range(3, 1003)]
        change(fresh / f"instances_{split}.json", lambda c, more=more: c["categories"].extend(more))
    with pytest.raises(ConfigError, match=r"there are thing, part, class 3, .* class 20 and 982 more; set"):
        open_folder(str(fresh), wanted=["unicorn"])


def test_small_boxes_categories_without_objects_and_corrections_are_logged(
    fresh: Path, said: pytest.LogCaptureFixture
) -> None:
    """COCO itself has such boxes."""

    def edit(content: Any) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 1]
        _first(content, bbox=[5, 5, 3, 0.5], id=0)

    change(fresh / "instances_train.json", edit)
    open_folder(str(fresh))
    assert "1 objects of area 0, or with a side below a pixel, are not trained on" in said.text
    assert "instances_train.json: read with corrections: ids of annotations renumbered (2)" in said.text
    assert "no object of 1 categories, e.g. 'part'" in said.text
