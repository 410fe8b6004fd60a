"""``mcl convert voc``: PASCAL VOC annotations in COCO format."""

import json
import re
from pathlib import Path

import pytest

from mcl import cli
from mcl.finetune import voc

Object = tuple[str, tuple[float, float, float, float], int]


def write(folder: Path, key: str, objects: list[Object], size: tuple[int, int] = (64, 48)) -> None:
    """An annotation file in VOC's format."""
    nodes = "".join(
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
        for name, box, difficult in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / f"{key}.xml").write_text(f"<annotation>{sides}{nodes}</annotation>")
    (folder / "JPEGImages" / f"{key}.jpg").touch()


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    kit = tmp_path / "VOCdevkit"
    write(kit / "VOC2007", "000005", [("chair", (1, 1, 64, 48), 0), ("person", (10, 20.5, 10, 30), 1)])
    write(kit / "VOC2007", "000007", [("car", (2, 3, 4, 5), 0)])
    write(kit / "VOC2012", "2008_000002", [("tvmonitor", (34, 11, 40, 48), 0)])
    for year, keys in (("VOC2007", "000005\n"), ("VOC2012", "2008_000002\n")):
        (kit / year / "ImageSets" / "Main" / "trainval.txt").write_text(keys)
    (kit / "VOC2007" / "ImageSets" / "Main" / "test.txt").write_text("000007\n")
    return kit


def test_convert(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pixels are numbered from 1, and the last one belongs to the box. Difficult objects are marked, and may be trained
    on."""
    train, val = kit / "voc_train.json", kit / "voc_val.json"
    folders = [str(kit / "VOC2007"), str(kit / "VOC2012")]
    cli.main(["convert", "voc", *folders, "--ids", "trainval", "--out", str(train)])
    assert capsys.readouterr().out == f"{train}: 2 images, 3 objects, 1 of them difficult, of 20 categories\n"
    content = json.loads(train.read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "VOC2007/JPEGImages/000005.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "VOC2012/JPEGImages/2008_000002.jpg", "width": 64, "height": 48},
    ]
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = [(a["id"], a["image_id"], names[a["category_id"]], a["bbox"], a["area"]) for a in content["annotations"]]
    assert found == [
        (1, 1, "chair", [0, 0, 64, 48], 64 * 48),
        (2, 1, "person", [9, 19.5, 1, 10.5], 10.5),
        (3, 2, "tvmonitor", [33, 10, 7, 38], 7 * 38),
    ]
    assert [(a["difficult"], a["iscrowd"], a.get("ignore")) for a in content["annotations"]] == [
        *((0, 0, None), (1, 0, None), (0, 0, None))
    ]
    ids = kit.parent / "ids.txt"
    ids.write_text("2008_000002 1\n\n000007 -1\n")
    cli.main(["convert", "voc", *folders, "--ids", str(ids), "--out", str(val)])
    listed = json.loads(val.read_text())
    assert [Path(image["file_name"]).stem for image in listed["images"]] == ["2008_000002", "000007"]
    assert listed["categories"] == content["categories"]
    cli.main(["convert", "voc", *folders, "--out", str(val)])
    assert len(json.loads(val.read_text())["images"]) == 3


def test_categories_of_others(kit: Path) -> None:
    """Categories are those of all annotation files, so that all splits have the same."""
    write(kit / "VOC2007", "a", [("zebra", (1, 1, 2, 2), 0)])
    voc.convert([kit / "VOC2007"], kit / "some.json", "test")
    assert len(json.loads((kit / "some.json").read_text())["categories"]) == 20
    voc.convert([kit / "VOC2007"], kit / "all.json")
    names = [category["name"] for category in json.loads((kit / "all.json").read_text())["categories"]]
    assert names == ["car", "chair", "person", "zebra"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<xmax>64</xmax>", "", r"000005\.xml: has no bndbox/xmax; it must be a number"),
        ("<xmax>64</xmax>", "<xmax>x</xmax>", r"000005\.xml: has the bndbox/xmax 'x'; it must be a number"),
        ("<xmax>64</xmax>", "<xmax>0</xmax>", r"000005\.xml: has an object without a name, or with a box turned"),
        ("<width>64</width>", "<width>nan</width>", r"000005\.xml: has the size/width 'nan'"),
        ("<annotation>", "", r"000005\.xml: is not XML"),
        ("<annotation>", '<?xml version="1.0" encoding="x"?><annotation>', r"000005\.xml: is not XML"),
    ],
)
def test_broken_annotations_are_named(
    kit: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kit / "VOC2007" / "Annotations" / "000005.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    check_error([str(kit / "VOC2007")], kit, message, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["."], r"Annotations is missing; name a folder that has it, such as VOCdevkit/VOC2007"),
        (["VOC2007", "--ids", "train"], r"ImageSets/Main/train\.txt: cannot be read .*; name an image set, or a file"),
        (["VOC2012", "--ids", "VOC2007/ImageSets/Main/test.txt"], r"test\.txt: no folder has annotations of the image"),
        (["VOC2012"], r"2008_000002\.xml: the image 2008_000002\.jpg is missing in JPEGImages"),
    ],
)
def test_what_is_missing_is_named(
    kit: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kit)
    (kit / "VOC2012" / "JPEGImages" / "2008_000002.jpg").unlink()
    check_error(words, kit, message, capsys)


def check_error(words: list[str], kit: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "voc", *words, "--out", str(kit / "x.json")])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (kit / "x.json").exists()


def test_a_place_that_cannot_be_written_is_named(kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "voc", str(kit / "VOC2007"), "--output", "/dev/full/x.json"])
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"/dev/full/x.json: cannot be written \(.*\); name another --output", line)
