"""Errors that the check of annotation files finds, and those that it corrects."""

import codecs
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dali_pipelines.source import SourceError
from mcl.finetune.annotations import Annotations, check, forget, read

WIDTH, HEIGHT = 40, 30
SIZE = [HEIGHT, WIDTH]
BOX = [4, 5, 20, 10]
POLYGON = [4, 5, 24, 5, 24, 15, 4, 15]
RUNS = [125, *[10, 20] * 19, 10, 495]
"""Run lengths of the box: 4 columns of 30 pixels and 5 pixels of the next, then 10 in each of 20 columns."""
HUGE, NAN, INFINITE = 10**400, float("nan"), float("inf")
NO_NUMBERS = (None, "x", "nan", "1e999", True, [3], {}, NAN, INFINITE, -INFINITE, HUGE)

Edit = Callable[[Any], object]


def example() -> dict[str, Any]:
    """Two objects, one of them a crowd, in two images."""
    common = {"bbox": BOX, "area": 200, "category_id": 1}
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "iscrowd": 0, "segmentation": [POLYGON], **common},
            {"id": 2, "image_id": 2, "iscrowd": 1, "segmentation": {"size": SIZE, "counts": RUNS}, **common},
        ],
    }


def encode(content: Any) -> bytes:
    return json.dumps(content).encode()


def edited(edit: Edit) -> bytes:
    content = example()
    edit(content)
    return encode(content)


def first(section: str, **values: Any) -> Edit:
    """Edits the first entry of a section."""
    return lambda content: content[section][0].update(values)


def every(section: str, **values: Any) -> Edit:
    return lambda content: [entry.update(values) for entry in content[section]]


def test_valid_annotations_do_not_change() -> None:
    content = example()
    data = encode(content)
    assert check(data, "x") == Annotations(**content, corrections="", digest=hashlib.sha256(data).digest())


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (section, field, value, message)
        for section, field, message, values in [
            ("images", "id", "a whole number or text", (None, True, 1.5, "", "\0", "\ud800", [1], {})),
            ("images", "width", "a whole number of pixels", (*NO_NUMBERS, 0, -40, 40.5)),
            ("images", "height", "a whole number of pixels", (*NO_NUMBERS, 0, -30, 30.5)),
            ("images", "file_name", "the path of a file", (None, "", 7, ["1.jpg"], "1\0.jpg", "\ud800.jpg")),
            ("categories", "name", "text", (None, "", 7, ["thing"], "thing\0", "\udce9")),
            ("annotations", "id", "a whole number or text", (True, 1.5, "", [1], {})),
            ("annotations", "image_id", "a whole number or text", (None, True, 1.5, [1])),
            ("annotations", "category_id", "a whole number or text", (None, False, 1.5, {"id": 1})),
            ("annotations", "iscrowd", "0 or 1", (2, -1, 0.5, "no", [0], NAN)),
            ("annotations", "ignore", "0 or 1", (2, "maybe")),
            ("annotations", "area", "a number of pixels", (*NO_NUMBERS[1:], -1, 1e11)),
            ("annotations", "bbox", r"\[x, y, width, height\] in pixels", (None, [], "box", 7, {"x": 1}, [BOX])),
            ("annotations", "bbox", r"\[x, y, width, height\] in pixels", ([5, 5, 3], [*BOX, 1], [5, 5, -3, 4])),
            ("annotations", "bbox", r"\[x, y, width, height\] in pixels", [[5, 5, v, 4] for v in NO_NUMBERS]),
            ("annotations", "bbox", r"\[x, y, width, height\] in pixels", [[v, 5, 3, 4] for v in NO_NUMBERS]),
            ("annotations", "segmentation", "polygons of three points", (None, [], [[]], POLYGON, "mask", 5, True)),
            ("annotations", "segmentation", "polygons of three points", ([[1, 2, 3, 4]], [POLYGON, POLYGON[1:]])),
            ("annotations", "segmentation", "polygons of three points", ([[POLYGON]], [POLYGON, 5], [POLYGON, None])),
            ("annotations", "segmentation", "polygons of three points", [[[*POLYGON, 3, v]] for v in NO_NUMBERS[:-1]]),
            ("annotations", "segmentation", "run-length", ({}, {"size": SIZE}, {"counts": RUNS}, [{"counts": RUNS}])),
            ("annotations", "segmentation", "run-length", [{"size": SIZE, "counts": [v]} for v in (*NO_NUMBERS, -1)]),
            ("annotations", "segmentation", "run-length", [{"size": [30, v], "counts": RUNS} for v in NO_NUMBERS]),
        ]
        for value in values
    ],
)
def test_values_that_a_field_does_not_take(section: str, field: str, value: Any, message: str) -> None:
    place = rf"x: {section}\[0\]" + ("" if field == "id" else r" \(id 1\)")
    with pytest.raises(SourceError, match=rf"^{place} has (the|no) {field}.*; it must be .*{message}") as caught:
        check(edited(first(section, **{field: value})), "x")
    str(caught.value).encode()  # the message can be printed


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (field, value, message)
        for field, message, values in [
            ("image_id", "the image_id 99, which the file does not have", [99]),
            ("category_id", "the category_id 'thing', which the file does not have", ["thing"]),
            ("bbox", "a box outside of its image", ([40, 5, 3, 3], [5, 30, 3, 3], [-9, 5, 3, 3], [5, -9, 3, 3])),
            ("bbox", "a box that extends far beyond", ([5, 5, 76, 3], [5, 5, 3, 56], [-41, 5, 50, 3], [5, -31, 3, 50])),
            ("bbox", "a box that extends far beyond", ([5, 5, 1e9, 3], [-1e9, 5, 1e9, 3])),
            ("segmentation", "a mask outside of its image", [[[50, 5, 60, 5, 60, 15]]]),
            (
                "segmentation",
                "a mask that extends far beyond its image of 40 x 30 pixels",
                [
                    [POLYGON, [-164.1, -221.8, 2.08e8, 3.52e8, 225.9, 236.5, 272.0, 384.2]],
                    *([[-41, 5, 24, 5, 24, 15]], [[4, 61, 24, 5, 24, 15]], [POLYGON, [4, 5, 24, -1e300, 24, 15]]),
                    [POLYGON, [4, 5, 24, HUGE, 24.5, 15]],
                ],
            ),
            ("segmentation", "a mask with an outline of more than 4194304 pixels", [[[0, 0, 40, 30] * 90_000]]),
            (
                "segmentation",
                r"a mask of the size .*; that of its image is \[30, 40\]",
                [{"size": size, "counts": RUNS} for size in ([40, 30], [30], [], [30, 40, 1], [1, 1200])],
            ),
            (
                "segmentation",
                "a mask with run lengths of [0-9]+ pixels, not 40 x 30",
                [
                    {"size": SIZE, "counts": counts}
                    for counts in ([], [100, 50], [*RUNS, 1], [2**32 + 1200], "", "9", "1200")
                ],
            ),
            (
                "segmentation",
                "a mask with broken run lengths",
                [
                    {"size": SIZE, "counts": counts}
                    for counts in ("P", "o", "o" * 6 + "0", "\u00e9", "\ud800", " ", "0~", "@", "0000@")
                ],
            ),
        ]
        for value in values
    ],
)
def test_annotations_that_do_not_fit_their_image(field: str, value: Any, message: str) -> None:
    with pytest.raises(SourceError, match=rf"^x: annotations\[0\] \(id 1\) has {message}") as caught:
        check(edited(first("annotations", **{field: value})), "x")
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (first("annotations", id=2), "two annotations have the same id, '2'"),
        (first("annotations", id="2"), "two annotations have the same id, '2'"),
        (first("images", id=2.0), "two images have the same id, '2'"),
        (lambda c: c["categories"].append({"id": 1, "name": "part"}), "two categories have the same id, '1'"),
        (lambda c: c.update(annotations=[]), "has no annotations"),
        (lambda c: c.update(annotations={"0": c["annotations"]}), "has no annotations"),
        (lambda c: c.pop("categories"), "has no categories"),
        (
            lambda c: c.update(images=["1.jpg"]),
            r"images\[0\] is '1.jpg'; it must be an object with id, file_name, width",
        ),
        (every("annotations", bbox=[4, 5, 0, 10]), "no box has a width and a height"),
        (every("images", width=2**20, height=2**20), "a mask in an image of 1048576 x 1048576 pixels; .* at most"),
    ],
)
def test_sections_that_are_wrong(edit: Edit, message: str) -> None:
    with pytest.raises(SourceError, match=f"^x: .*{message}"):
        check(edited(edit), "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\x00{\x00}\x00", "is not UTF-16-BE"),
        (b"\xff\xd8\xff\xe0", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON .*recursion"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON .*4300 digits"),
        (b"[]", "has no images"),
        (b"null", "has no images"),
        (b"NaN", "has no images"),
        ('{"images": "caf\u00e9"}'.encode("latin1"), r"is not UTF-8 \(byte 15\); convert it, e.g. by iconv -f latin1"),
        (b'{"images": "\xed\xa0\x80"}', "is not UTF-8"),
    ],
)
def test_files_that_are_no_annotations(data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=f"^x: {message}"):
        check(data, "x")


def test_numbers_that_json_reads_as_infinite() -> None:
    data = encode(example()).replace(b"24, 15", b"24, 1e999")
    with pytest.raises(SourceError, match="a mask that extends far beyond its image"):
        check(data, "x")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none.json: cannot be read \(No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(SourceError, match=r"cannot be read \(Is a directory"):
        read(tmp_path)


def test_files_are_read_once_until_they_change_or_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(encode(example()))
    assert read(path) is not read(path)
    boxes = read(path, masks=False, keep=True)
    assert "segmentation" not in boxes.annotations[0]
    assert read(path, masks=False) is boxes
    whole = read(path, keep=True)
    assert whole.annotations[0]["segmentation"] == [POLYGON]
    assert read(path) is read(path, masks=False) is whole
    path.write_bytes(edited(first("categories", name="another")))
    assert read(path).categories[0]["name"] == "another"
    forget()
    path.write_bytes(encode(example()))
    assert read(path) is not whole


def as_text(value: Any) -> Any:
    """Converts numbers to text, at every depth."""
    if isinstance(value, dict):
        return {key: as_text(child) for key, child in value.items()}
    return [as_text(child) for child in value] if isinstance(value, list) else str(value)


def ids(section: str, field: str, change: Callable[[int], Any]) -> Edit:
    """Changes the ids of a section, and all references to them."""

    def edit(content: Any) -> None:
        for entry in content[section]:
            entry["id"] = change(entry["id"])
        for annotation in content["annotations"] if field else ():
            annotation[field] = change(annotation[field])

    return edit


@pytest.mark.parametrize(
    ("edit", "corrections"),
    [
        (ids("annotations", "", lambda i: i - 1), "ids of annotations renumbered (2)"),
        (ids("annotations", "", str), "ids of annotations renumbered (2)"),
        (ids("annotations", "", lambda i: None), "id of annotations missing (2), ids of annotations renumbered (2)"),
        (ids("annotations", "", lambda i: i / 1), ""),
        (ids("images", "image_id", lambda i: f"{i}" if i == 1 else i), "ids of images renumbered (2)"),
        (ids("images", "image_id", lambda i: i + 2**63), "ids of images renumbered (2)"),
        (ids("categories", "category_id", lambda i: 2**64), "ids of categories renumbered (1)"),
        (every("annotations", image_id="1"), ""),
        (every("annotations", image_id=1.0), ""),
        (every("annotations", iscrowd=None), "iscrowd of annotations missing (2)"),
        (every("annotations", iscrowd=False), "iscrowd of annotations converted (2)"),
        (every("annotations", iscrowd=True), "iscrowd of annotations converted (2)"),
        (every("annotations", iscrowd="0"), "iscrowd of annotations converted (2)"),
        (every("annotations", area=None), "area of annotations missing (2)"),
        (every("annotations", area="200"), "area of annotations converted (2)"),
        (every("annotations", bbox=as_text(BOX)), "bbox of annotations converted (2)"),
        (every("annotations", segmentation=as_text([POLYGON])), "segmentation of annotations converted (2)"),
        (every("annotations", segmentation=[POLYGON, [1, 2, 3, 4], []]), "segmentation of annotations converted (2)"),
        (
            every("annotations", segmentation=as_text({"size": SIZE, "counts": RUNS})),
            "segmentation of annotations converted (2)",
        ),
        (every("images", width=40.0, height="30"), "height of images converted (2)"),
        (
            lambda c: [i.update(coco_url=f"http://x/coco/val2017/{i.pop('file_name')}") for i in c["images"]],
            "file_name of images missing (2)",
        ),
        (
            lambda c: c["annotations"].append({**c["annotations"][0], "id": 3, "bbox": [0, 0, 0, 0]}),
            "boxes without width or height left out (1)",
        ),
        (lambda c: c["annotations"][0].update(score=NAN, note={"nested": [None]}), ""),
    ],
)
def test_corrected(edit: Edit, corrections: str) -> None:
    """All values become numbers, and each annotation still belongs to its image."""
    images, categories, annotations, what, _ = check(edited(edit), "x")
    assert what == corrections
    assert [image["file_name"].split("/")[-1] for image in images] == ["1.jpg", "2.jpg"]
    assert all((image["width"], image["height"]) == (WIDTH, HEIGHT) for image in images)
    assert all(type(image["width"]) is type(image["height"]) is int for image in images)
    assert len({image["id"] for image in images}) == 2
    for number, annotation in enumerate(annotations):
        one_image = len({a["image_id"] for a in annotations}) == 1  # where the edit says so
        assert annotation["image_id"] == images[0 if one_image else number]["id"]
        assert annotation["category_id"] == categories[0]["id"]
        assert type(annotation["id"]) is int
        assert annotation["id"] != 0
        assert annotation["iscrowd"] in (0, 1)
        assert annotation["bbox"] == BOX
        assert annotation["area"] == 200
        assert annotation["segmentation"] in ([POLYGON], {"size": SIZE, "counts": RUNS})


def test_ids_of_images_that_are_text_stay() -> None:
    data = edited(ids("images", "image_id", lambda i: f"image {i}"))
    images, _, annotations, corrections, _ = check(data, "x")
    assert [image["id"] for image in images] == [a["image_id"] for a in annotations] == ["image 1", "image 2"]
    assert corrections == ""


@pytest.mark.parametrize(
    ("bom", "encoding"),
    [
        *((b"", encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")),
        *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF32_BE, "utf-32-be")),
    ],
)
def test_encodings(bom: bytes, encoding: str) -> None:
    content = example()
    content["categories"][0]["name"] = "caf\u00e9 \U0001f600"
    checked = check(bom + json.dumps(content, ensure_ascii=False).encode(encoding), "x")
    assert checked.categories == content["categories"]
    assert bool(checked.corrections) == (encoding != "utf-8" or bool(bom))


def test_unused_masks_are_not_checked() -> None:
    data = edited(every("annotations", segmentation="broken"))
    assert all("segmentation" not in annotation for annotation in check(data, "x", masks=False).annotations)


def test_run_lengths_as_text_are_those_of_pycocotools() -> None:
    """For masks of one to half a million pixels, of all densities."""
    mask = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 7), (30, 40), (480, 640), (700, 701)]:
        for density in (0, 0.001, 0.5, 0.999, 1):
            pixels = np.asfortranarray(generator.random((height, width)) < density, dtype=np.uint8)
            encoded = mask.encode(pixels)
            text = encoded["counts"].decode()
            content = example()
            every("images", width=width, height=height)(content)
            every("annotations", bbox=[0, 0, 1, 1], segmentation={"size": [height, width], "counts": text})(content)
            check(encode(content), "x")
            every("annotations", segmentation={"size": [height, width], "counts": text + "1"})(content)
            with pytest.raises(SourceError, match="run lengths"):
                check(encode(content), "x")
