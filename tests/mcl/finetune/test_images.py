"""The check of images against their annotations: sizes, EXIF orientations, broken files."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from dali_pipelines.loader import BadDataError
from dali_pipelines.source import SourceError
from mcl.finetune import finetune, images, settings
from mcl.finetune.data import open_folder
from mcl.finetune.decoding import LoadCheckedImage
from mcl.finetune.training import use
from tests.conftest import ROOT
from tests.mcl.finetune.conftest import MINI, TINY, make_folder
from tests.mcl.finetune.test_run import words


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A folder that tests may damage."""
    return make_folder(tmp_path / "coco", train=5, val=1)


def change(fresh: Path, split: str, edit: Callable[[Any], object]) -> None:
    path = fresh / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def encode(image: Image.Image, kind: str, orientation: int) -> bytes:
    file = io.BytesIO()
    if kind == "TIFF":
        image.save(file, kind, tiffinfo={0x0112: orientation})
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(file, kind, exif=exif, lossless=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_one_rule_for_exif(kind: str, orientation: int, photos: Path, tmp_path: Path) -> None:
    """MMDetection loads the rotated image, like Pillow, and annotations must have the size of that image."""
    with Image.open(next(photos.rglob("*.jpg"))) as photo:
        data = encode(photo.convert("RGB").resize((48, 32)), kind, orientation)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(data)
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    width, height = turned.size
    assert ((width, height) == (32, 48)) == (orientation >= 5)
    loaded = LoadCheckedImage().transform({"img_path": str(path), "height": height, "width": width})["img"]
    assert np.abs(loaded[..., ::-1].astype(int) - np.asarray(turned)).mean() < 1
    images.check(tmp_path, [path.name], [(width, height)], tmp_path / "a.json")
    with pytest.raises(SourceError, match=rf"image\.{kind.lower()} has {width} x {height} pixels, but .*a\.json says"):
        images.check(tmp_path, [path.name], [(height, width)], tmp_path / "a.json")


def turn(path: Path, orientation: int) -> None:
    with Image.open(path) as image:
        path.write_bytes(encode(image, "JPEG", orientation))


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_of_the_image_as_stored_are_refused(fresh: Path, split: str) -> None:
    turn(fresh / split / "1.jpg", 6)
    with pytest.raises(
        SourceError,
        match=rf"{split}/1\.jpg has \d+ x \d+ pixels, but .*instances_{split}\.json says .* and 0 more .*"
        r"EXIF orientation 6 exchanges .*remove the orientation.*\(fine-tuning turns images .*, pre-training does not",
    ):
        open_folder(str(fresh))


def test_boxes_of_the_turned_image_are_taken(fresh: Path, said: pytest.LogCaptureFixture) -> None:
    """A message says so, also if width and height are the same before and after rotation."""
    turn(fresh / "train" / "1.jpg", 6)
    change(fresh, "train", lambda c: c["images"][0].update(width=c["images"][0]["height"], height=128))
    change(fresh, "train", lambda c: [a.update(bbox=[0, 0, 40, 40]) for a in c["annotations"][:2]])
    turn(fresh / "train" / "2.jpg", 3)
    open_folder(str(fresh))
    assert "2 images have an EXIF orientation, e.g. " in said.text
    assert "train/1.jpg; boxes must be those of the turned image (fine-tuning turns images" in said.text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i.update(width=i["height"], height=i["width"]), r"Width and height are exchanged"),
        (lambda i: i.update(width=i["width"] + 1), r"Correct width and height, or use the images that were annotated"),
    ],
)
def test_sizes_that_are_not_the_images(fresh: Path, edit: Callable[[Any], object], message: str) -> None:
    change(fresh, "train", lambda c: edit(c["images"][1]))
    with pytest.raises(SourceError, match=rf"train/2\.jpg has .* boxes would not fit the images\. {message}"):
        open_folder(str(fresh))


EMPTY, TEXT, HEAD, CUT = b"", b"<html>not found</html>", slice(0, 100), slice(0, -500)


def damage(path: Path, how: bytes | slice) -> None:
    path.write_bytes(path.read_bytes()[how] if isinstance(how, slice) else how)


def damage_unnoticed(path: Path, data: bytes) -> None:
    """Changes a file without changing its size and time."""
    before = path.stat()
    path.write_bytes(data.ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", [EMPTY, TEXT, HEAD], ids=["empty", "text", "head"])
def test_what_is_no_image_is_named_at_the_start(
    fresh: Path, how: bytes | slice, said: pytest.LogCaptureFixture
) -> None:
    damage(fresh / "train" / "2.jpg", how)
    reason = "not an image" if how else "the file is empty"
    with pytest.raises(SourceError, match=rf"1 of the 5 images cannot be used, the first: .*train/2\.jpg: {reason}"):
        open_folder(str(fresh), max_bad_fraction=0.1)
    open_folder(str(fresh), max_bad_fraction=0.2)
    assert f"train/2.jpg: {reason}" in said.text


def test_what_cannot_be_read_is_named_at_the_start(fresh: Path) -> None:
    """A pipe, from which reading would block forever, and a folder."""
    for make in (os.mkfifo, os.mkdir):
        path = fresh / "train" / "2.jpg"
        path.unlink()
        make(path)
        with pytest.raises(SourceError, match=r"1 of the 5 images cannot be used, the first: .*train/2\.jpg: "):
            open_folder(str(fresh))


@pytest.mark.parametrize("how", [EMPTY, TEXT, CUT], ids=["empty", "text", "cut"])
def test_images_to_evaluate_on_must_all_be_good(fresh: Path, how: bytes | slice) -> None:
    damage(fresh / "val" / "1.jpg", how)
    with pytest.raises(SourceError, match=r"instances_val\.json: 1 of the 1 images cannot be used, .*val/1\.jpg: "):
        open_folder(str(fresh), max_bad_fraction=1.0)


def test_headers_are_read_once(fresh: Path) -> None:
    """Headers are read again if the time of a file has changed."""
    path = fresh / "train" / "4.jpg"
    open_folder(str(fresh))
    damage_unnoticed(path, TEXT)
    open_folder(str(fresh))
    path.touch()
    with pytest.raises(SourceError, match=r"train/4\.jpg: not an image"):
        open_folder(str(fresh))


def batches(fresh: Path, run: Path, workers: int, fraction: float) -> list[Any]:
    """Batches of two epochs."""
    config = settings.load(MINI, [*TINY, f"output={run.parent}", f"name={run.name}", "global_batch=1"])
    config.data.max_bad_fraction = fraction
    config.train_dataloader.num_workers = workers
    run.mkdir(exist_ok=True)
    use(config, open_folder(str(fresh), max_bad_fraction=fraction))
    with DefaultScope.overwrite_default_scope("mmdet"):
        loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    found = [batch for batch, _ in zip(loader, range(10), strict=False)]
    return [(batch["data_samples"][0].img_id, batch["inputs"][0]) for batch in found]


def same(samples: list[Any], others: list[Any]) -> list[bool]:
    return [a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(samples, others, strict=True)]


@pytest.mark.parametrize("how", [EMPTY, CUT], ids=["empty", "cut"])
def test_broken_images_are_replaced_and_listed(fresh: Path, tmp_path: Path, how: bytes | slice) -> None:
    """Substitutes do not depend on the number of workers, and all other samples are the same."""
    whole = batches(fresh, tmp_path / "whole", 0, 0.5)
    path = fresh / "train" / "4.jpg"
    damage(path, how)
    found = batches(fresh, tmp_path / "run", 0, 0.5)
    assert not (tmp_path / "whole" / "bad_files.jsonl").exists()
    assert [image for image, _ in whole].count(4) == 2
    assert same(found, whole) == [image != 4 for image, _ in whole]
    assert 4 not in [image for image, _ in found]
    assert all(same(found, batches(fresh, tmp_path / "twice", 2, 0.5)))
    for run in ("run", "twice"):
        (record,) = map(json.loads, (tmp_path / run / "bad_files.jsonl").read_text().splitlines())
        assert record["path"] == str(path)
        assert record["reason"] == "cannot be decoded"


def test_an_image_that_changed_is_not_trained_on(fresh: Path, tmp_path: Path) -> None:
    """The image changed after its header was read, and the index does not notice."""
    path = fresh / "train" / "4.jpg"
    with Image.open(path) as image:
        smaller = encode(image.resize((64, 48)), "JPEG", 1)
    open_folder(str(fresh))
    damage_unnoticed(path, smaller)
    assert 4 not in [image for image, _ in batches(fresh, tmp_path / "run", 0, 0.5)]
    assert "64 x 48 pixels, the annotations say 128 x " in (tmp_path / "run" / "bad_files.jsonl").read_text()


def test_formats_that_only_opencv_reads_are_used(fresh: Path) -> None:
    """Pre-training refuses such formats."""
    for split in ("train", "val"):
        path = next((fresh / split).glob("*.jpg"))
        with Image.open(path) as image:
            path.write_bytes(encode(image, "GIF", 1))
    open_folder(str(fresh))


@pytest.mark.soak
def test_too_many_broken_images_end_the_run(fresh: Path, tmp_path: Path) -> None:
    """The error has one line, also if it comes from a loading process."""
    damage(fresh / "train" / "1.jpg", CUT)
    damage(fresh / "train" / "4.jpg", CUT)
    said = r"2 of the 5 training images are broken, the last: .*train/[14]\.jpg: cannot be decoded; repair them, or "
    with pytest.raises(BadDataError, match=rf"^{said}raise data\.max_bad_fraction=0\.2$"):
        batches(fresh, tmp_path / "run", 0, 0.2)
    arguments = words(fresh, tmp_path, "run", "data.max_bad_fraction=0.2", "train_dataloader.num_workers=2")
    command = [sys.executable, "-W", "ignore", "-m", "mcl", "finetune", str(MINI), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(rf"mcl finetune: error: {said}raise data\.max_bad_fraction=0\.2", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


def test_broken_images_that_moved_are_counted_once(fresh: Path, tmp_path: Path) -> None:
    damage(fresh / "train" / "4.jpg", CUT)
    batches(fresh, tmp_path / "run", 0, 0.2)
    batches(fresh.rename(tmp_path / "moved"), tmp_path / "run", 0, 0.2)
    (record,) = map(json.loads, (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines())
    assert record["path"] == str(fresh / "train" / "4.jpg")


def test_a_run_with_a_broken_image(fresh: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage(fresh / "train" / "4.jpg", CUT)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bad_files.jsonl").write_text('{"index": 3, "path": "other", "reason": "of a run before"}\n')
    finetune(MINI, words(fresh, tmp_path, "run", "data.max_bad_fraction=0.5", "train_dataloader.num_workers=1"))
    said = [line for line in capfd.readouterr().out.splitlines() if "bad file" in line]
    assert said == [f"bad file, replaced: {fresh / 'train' / '4.jpg'}: cannot be decoded"]


@pytest.mark.soak
def test_an_image_to_evaluate_on_that_breaks_meanwhile(fresh: Path, tmp_path: Path) -> None:
    """The image was decoded at the start; the error that ends the run names it."""
    path = fresh / "val" / "1.jpg"
    open_folder(str(fresh))
    damage_unnoticed(path, path.read_bytes()[:-500])
    with pytest.raises(SourceError, match=r"^[^\n]*val/1\.jpg: cannot be decoded; [^\n]*$"):
        finetune(MINI, words(fresh, tmp_path, "run", "train_cfg.max_iters=1"))
