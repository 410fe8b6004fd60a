"""Pictures of detections show what a detector finds, at the right positions, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData

import mcl
from mcl import cli
from mcl.config import ConfigError
from mcl.finetune import pictures
from mcl.finetune.loading import COCOFolder
from tests.conftest import ROOT
from tests.mcl.finetune.conftest import CLASSES

GRAY = 128
LARGE, SMALL = (600, 400), (60, 40)  # pixels; the small one is drawn at 8 times its size
BOXES = {LARGE: [(100, 50, 300, 250), (320, 200, 520, 380)], SMALL: [(5, 10, 25, 30)]}  # x1, y1, x2, y2
BLUE, ORANGE = pictures.COLORS[:2]  # of things and parts


@MODELS.register_module(force=True)
class PerfectDetector(BaseModel):
    """Finds the annotations of the image of that size with a score of 0.9, and the whole image with a score of 0.2."""

    def __init__(self, annotations: str, backbone: Any, data_preprocessor: Any = None) -> None:
        super().__init__(data_preprocessor)
        load = {"type": "mmdet.LoadAnnotations", "with_mask": True}
        where = {"ann_file": annotations, "data_prefix": {"img": ""}}
        dataset = COCOFolder([load], **where, metainfo={"classes": CLASSES}, test_mode=True)
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        self.infos = {(info["height"], info["width"]): info for info in infos}

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        for sample in data_samples:
            height, width = sample.ori_shape
            info = self.infos[height, width]
            loaded = LoadAnnotations(with_mask=True, box_type=None)({**info, "ori_shape": sample.ori_shape})
            boxes = [*loaded["gt_bboxes"].tolist(), [0, 0, width, height]]
            masks = torch.from_numpy(loaded["gt_masks"].to_ndarray() > 0)
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor(boxes),
                labels=torch.tensor([*loaded["gt_bboxes_labels"].tolist(), 1]),
                scores=torch.tensor([0.9] * len(masks) + [0.2]),
                masks=torch.cat([masks, torch.ones(1, height, width, dtype=torch.bool)]),
            )
        return data_samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a perfect detector, and gray images beside it."""
    folder = tmp_path_factory.mktemp("perfect")
    (folder / "images" / "more").mkdir(parents=True)
    images, annotations = [], []
    for number, (name, size) in enumerate((("large.png", LARGE), ("more/small.png", SMALL)), start=1):
        Image.new("RGB", size, (GRAY,) * 3).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for category, (x1, y1, x2, y2) in enumerate(BOXES[size], start=1):
            left = [x1, y1, (x1 + x2) / 2, y1, (x1 + x2) / 2, y2, x1, y2]  # the left half of the box
            what = {"image_id": number, "category_id": category, "segmentation": [left], "iscrowd": 0}
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({"id": len(annotations) + 1, "bbox": box, "area": box[2] * box[3], **what})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "PackDetInputs", "meta_keys": ("img_id", "ori_shape", "img_shape")},
    ]
    dataset = {"type": "COCOFolder", "pipeline": pipeline, "metainfo": {"classes": CLASSES}}
    model = {"type": "PerfectDetector", "annotations": str(folder / "annotations.json"), "backbone": {}}
    preprocessor = {"type": "DetDataPreprocessor"}
    config = {"model": {**model, "data_preprocessor": preprocessor}, "test_dataloader": {"dataset": dataset}}
    (folder / "run").mkdir()
    Config({**config, "default_scope": "mmdet"}).dump(folder / "run" / "perfect.py")
    for step in (3, 12):
        meta = {"dataset_meta": {"classes": CLASSES}, "iter": step}
        torch.save({"state_dict": {}, "meta": meta}, folder / "run" / f"iter_{step}.pth")
    return folder / "run"


def tinted(color: tuple[int, ...]) -> list[int]:
    return [int(GRAY * (1 - pictures.MASK) + c * pictures.MASK) for c in color]


def check_object(pixels: Any, box: tuple[int, ...], color: tuple[int, ...], scale: int) -> None:
    """Its outline is two pixels wide, and its left half is tinted; the right half and the surroundings are not."""
    x1, y1, x2, y2 = (scale * side for side in box)
    middle, row = (x1 + x2) // 2, (y1 + y2) // 2
    for x in (x1, x1 + 1, x2, x2 - 1):
        assert pixels[row, x].tolist() == list(color)
    assert np.abs(pixels[row, x1 + 10].astype(int) - tinted(color)).max() <= 1
    assert np.abs(pixels[row, middle - 2 * scale].astype(int) - tinted(color)).max() <= 1
    for x in (x1 - 2, middle + 2 * scale, x2 + 2):
        assert pixels[row, x].tolist() == [GRAY] * 3
    name = pixels[y1 + 4 : y1 + 16, x1 + 4 : x1 + 40]  # black on the category's colour
    assert (name == color).all(-1).any()
    assert (name == 0).all(-1).any()


def test_detections_are_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["detect", str(run), str(run.parent / "images")])
    drawn = run / "detections"
    assert capsys.readouterr().out.splitlines() == [
        f"{drawn}/large.png: thing 0.90, part 0.90",
        f"{drawn}/more/small.png: thing 0.90",
    ]
    large, small = (np.asarray(Image.open(drawn / name)) for name in ("large.png", "more/small.png"))
    assert (large.shape, small.shape) == ((400, 600, 3), (320, 480, 3))
    check_object(large, BOXES[LARGE][0], BLUE, 1)
    check_object(large, BOXES[LARGE][1], ORANGE, 1)
    check_object(small, BOXES[SMALL][0], BLUE, 8)


def test_python_threshold_and_broken_images(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no picture")
    images = [run.parent / "images" / "large.png", tmp_path]
    with pytest.warns(match="left out") as warned:
        (found,) = mcl.detect(run / "iter_3.pth", images, tmp_path / "out", threshold=0.1)
    said = [str(warning.message) for warning in warned]
    assert f"{tmp_path}/empty.jpg: cannot be read (empty); left out" in said
    assert f"{tmp_path}/text.png: cannot be decoded; left out" in said
    assert found.names == ["thing", "part", "part"]
    assert found.objects.boxes.tolist() == [list(map(float, box)) for box in (*BOXES[LARGE], (0, 0, *LARGE))]
    assert found.picture == tmp_path / "out" / "large.png"
    pixels = np.asarray(Image.open(found.picture))
    # The detection of the whole image.
    assert np.abs(pixels[399 - 10, 599 - 10].astype(int) - tinted(ORANGE)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/where", "x.jpg"], r"^/no/where: neither the folder of a run of mcl finetune nor a checkpoint in one$"),
        (["{run}", "/no/where.jpg"], r"^/no/where\.jpg: no such file$"),
        (["{run}", str(ROOT / "mcl")], r"mcl: no image in it$"),
        (["{run}", "{run}/perfect.py"], r"^none of the 1 images could be read$"),
        (["{run}/iter_5.pth", "{run}"], r"iter_5\.pth: neither the folder of a run"),
        (["{run}", "{run}", "--threshold", "2"], r"^--threshold: 2\.0 must be from 0 to 1$"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_errors(arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["detect", *(word.format(run=run) for word in arguments)])
    error = capsys.readouterr().err.splitlines()[-1].removeprefix("mcl detect: error: ")
    assert re.search(message, error)


def test_names_that_collide_and_repeats(run: Path, tmp_path: Path) -> None:
    images = [run.parent / "images" / "large.png", tmp_path / "large.jpg"]
    images[1].touch()
    with pytest.raises(ValueError, match=r"large\.jpg: both would be drawn as .*large\.png"):
        mcl.detect(run, images)
    (tmp_path / "seed-0").mkdir()
    with pytest.raises(ConfigError, match=r"nor a checkpoint in one; it holds seed-0 and others"):
        mcl.detect(tmp_path, images)
