"""Region probe: boxes are pooled from the map that a detector would use, and known scores are found."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops.poolers import LevelMapper

from mcl import config
from mcl.config import Config, ConfigError
from mcl.evaluation import evaluate
from mcl.evaluation.regions import Pyramid, interval, level_of, open_boxes
from mcl.evaluation.scoring import describe
from mcl.objectives import build
from mcl.records import report
from tests.mcl.ranks import in_ranks
from tests.mcl.tiny import TINY

CPU = torch.device("cpu")


def test_levels_are_those_of_detectors() -> None:
    """As in torchvision, except for missing maps; for boxes of every size, and at the limits between levels."""
    sides = torch.cat([torch.linspace(1, 2000, 500), 224 * 2.0 ** torch.arange(-5, 4)])
    boxes = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), 2 * sides, sides / 2], 1)
    assert level_of(boxes, [32, 16, 8, 4]).tolist() == (3 - LevelMapper(2, 5)([boxes])).tolist()
    assert level_of(boxes, [32, 16]).tolist() == (1 - LevelMapper(4, 5)([boxes])).tolist()


class Ramp(nn.Module):
    """Replaces backbone and FPN: each cell contains the position of its centre, in pixels, and the number of its
    map."""

    def forward(self, x: Any, levels: Sequence[int] = ()) -> list[Tensor]:
        maps = []
        for i, stride in enumerate((32, 16, 8, 4)):
            at = (torch.arange(512 // stride) + 0.5) * stride
            y, x = torch.meshgrid(at, at, indexing="ij")
            maps.append(torch.stack([x, y, torch.full_like(x, i)])[None].repeat(2, 1, 1, 1))
            maps[-1][1] += 1000
        return maps


def test_a_region_is_the_means_over_parts_of_its_box() -> None:
    pyramid = Pyramid.__new__(Pyramid)
    nn.Module.__init__(pyramid)
    pyramid.backbone = pyramid.fpn = Ramp()
    pyramid.strides = [32, 16, 8, 4]
    boxes = [
        torch.tensor([[40.0, 60, 60, 80], [10, 20, 500, 490], [37, 41, 151.5, 160]]),
        torch.tensor([[100.0, 100, 340, 330]]),
    ]
    expected = torch.tensor([[50.0, 70, 3], [255, 255, 0], [94.25, 100.5, 2], [1220, 1215, 1001]])
    found = pyramid.regions(torch.zeros(2, 3, 512, 512), boxes).view(4, 3, 3, 3)  # channels, rows, columns
    torch.testing.assert_close(found.mean((2, 3)), expected)
    sides = torch.tensor([[20.0, 20], [490, 470], [114.5, 119], [240, 230]])
    thirds = torch.tensor([-1 / 3, 0, 1 / 3]) * sides[..., None]
    torch.testing.assert_close(found[:, 0, 1], expected[:, :1] + thirds[:, 0])
    torch.testing.assert_close(found[:, 1, :, 1], expected[:, 1:2] + thirds[:, 1])


def test_intervals() -> None:
    """As wide as the binomial interval, and no narrower if every object is repeated ten times."""
    hits = (torch.arange(400) % 2).float()
    low, high = interval(hits, torch.arange(400))
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.1)
    assert interval(hits.repeat_interleave(10), torch.arange(400).repeat_interleave(10)) == pytest.approx([low, high])
    assert interval(torch.ones(5), torch.tensor([3, 3, 3, 9, 9])) == [1, 1]


COLOURS = {"red": (220, 20, 30), "green": (20, 200, 40), "blue": (30, 40, 220)}


@pytest.fixture(scope="module")
def coco(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with three rectangles each, whose colours are their classes, and with crowds of another class."""
    root = tmp_path_factory.mktemp("coco")
    files = sorted((photos / "train").rglob("*.jpg"))
    for split, count in (("train", 20), ("val", 8)):
        (root / split).mkdir()
        images, objects = [], []
        for i in range(count):
            image = Image.open(files.pop()).convert("RGB").resize((160, 120))
            images.append({"id": f"n{i}", "file_name": f"{i}.jpg", "width": 160, "height": 120})
            for j in range(3):
                category, box = (i + j) % 3, (5 + 52 * j, 10 + i, 40 + j, 60)
                image.paste(list(COLOURS.values())[category], (box[0], box[1], box[0] + box[2], box[1] + box[3]))
                objects.append({"image_id": f"n{i}", "category_id": 7 - category, "bbox": box})
                objects.append({"image_id": f"n{i}", "category_id": 7, "bbox": box, "iscrowd": 1})
            image.save(root / split / f"{i}.jpg")
        categories = [{"id": 7 - i, "name": name} for i, name in enumerate(COLOURS)]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def cfg(coco: Path) -> Config:
    return config.override(config.from_dict(TINY), [f"evaluation.regions={coco}", "evaluation.at_end=[regions]"])


@pytest.mark.usefixtures("thin_backbone")
def test_planted_colours_are_found(cfg: Config, coco: Path, tmp_path: Path) -> None:
    """By a network that passes colours on, compared with a network of zeros; in text, record and report."""
    torch.manual_seed(0)
    model = build(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (record,) = evaluate(["regions"], model, cfg, CPU)
    assert (record["boxes"], record["images"], record["classes"]) == (24, 8, 3)
    assert record["chance"] == pytest.approx(1 / 3)
    assert record["accuracy"] > 0.9
    assert record["linear_accuracy"] > 0.9
    assert record["accuracy_interval"][0] <= record["accuracy"] <= record["accuracy_interval"][1]
    assert record["gain"] == pytest.approx(record["accuracy"] - record["random"], abs=1e-6)
    assert record["target"] == record["accuracy"]  # before the first step
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    (blind,) = evaluate(["regions"], model, cfg, CPU)
    assert blind["accuracy"] == blind["linear_accuracy"] == pytest.approx(1 / 3)
    assert blind["linear_random"] == record["linear_accuracy"] or blind["linear_random"] > 0.9
    assert blind["gain_interval"][1] < -0.3

    text = describe(record)
    assert "24 objects in 8 images" in text
    assert f"knn    top-1 {record['accuracy']:6.1%} (" in text
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**record, "step": 3}) + "\n")
    page = " ".join(report.render(tmp_path).split())
    assert "Objects · held-out images" in page
    low, high = record["accuracy_interval"]
    assert f"{low:.1%} to {high:.1%}" in page


def scores(values: dict[str, Any]) -> list[float]:
    cfg = config.from_dict(values)
    torch.manual_seed(0)
    (record,) = evaluate(["regions"], build(cfg), cfg, CPU)
    return [value for name in sorted(record) for value in np.ravel(record[name]).tolist() if type(value) is float]


@pytest.mark.soak
def test_two_processes_score_what_one_does(cfg: Config) -> None:
    values = config.to_dict(cfg)
    one, two = in_ranks(1, scores, values), in_ranks(2, scores, values)
    assert two == [pytest.approx(one[0], abs=1e-6)] * 2


def test_objects_by_name(cfg: Config, coco: Path) -> None:
    train, val = open_boxes(cfg)
    assert train.classes == val.classes == ("blue", "green", "red")
    assert len(train.numbers) == 20
    i = val.numbers[1]  # image n1
    assert Path(val.source.names[i]).name == "1.jpg"
    assert val.labels[i].tolist() == [1, 0, 2]
    torch.testing.assert_close(val.boxes[i][1], torch.tensor([57 / 160, 11 / 120, 98 / 160, 71 / 120]))


def edited(coco: Path, folder: Path, edit: Callable[[Any], None]) -> Path:
    shutil.copytree(coco, folder / "coco")
    file = folder / "coco" / "instances_val.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return folder / "coco"


def test_images_of_another_size_are_left_out(
    cfg: Config, coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited(coco, tmp_path, lambda c: c["images"][2].update(width=120, height=160))
    with caplog.at_level(logging.WARNING, "mcl"):
        _, val = open_boxes(config.override(cfg, [f"evaluation.regions={folder}"]))
    assert len(val.numbers) == 7
    assert "left out 1 images of other sizes than annotated, e.g. 2.jpg" in caplog.text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["categories"][0].update(name="pink"), "only one of train and val has the category 'pink'"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], "has no object in an image that can be used"),
        (lambda c: c.pop("annotations"), "has no annotations"),
    ],
)
def test_unfit_annotations(cfg: Config, coco: Path, tmp_path: Path, edit: Callable[[Any], None], message: str) -> None:
    folder = edited(coco, tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        open_boxes(config.override(cfg, [f"evaluation.regions={folder}"]))


@pytest.mark.parametrize(("folder", "message"), [("", "not set; set it to a folder"), ("/no/where", "does not exist")])
def test_no_folder(cfg: Config, folder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation\.regions: .*{message}"):
        open_boxes(config.override(cfg, [f"evaluation.regions={folder}"]))
