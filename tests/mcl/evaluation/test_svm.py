"""Support vector machines for images with several classes, read from a COCO annotation file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from dali_pipelines.source import Source, open_source
from mcl import config
from mcl.config import Config, ConfigError
from mcl.evaluation import evaluate, svm
from mcl.evaluation.features import Features
from mcl.objectives import MCL

CPU = torch.device("cpu")


def write(path: Path, source: Source, classes: list[list[int]], **of_last: Any) -> str:
    """Writes the classes of every image; `of_last` is added to the last annotation."""
    names = [name.removeprefix(source.base + "/") for name in source.names]
    annotations = [{"image_id": i, "category_id": 7 * c} for i, own in enumerate(classes) for c in own]
    annotations[-1] |= of_last
    content = {
        "images": [{"id": i, "file_name": names[i]} for i in range(len(classes))],
        "categories": [{"id": 7 * c, "name": f"class {c}"} for c in (1, 0)],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content))
    return str(path)


def test_classes_of_images(few_photos: Path, tmp_path: Path) -> None:
    source = open_source(str(few_photos))
    path = write(tmp_path / "a.json", source, [[0], [0, 1, 1], [], [0], [1]], iscrowd=1)
    numbers, labels, names = svm.annotated(path, source, "train")
    assert (numbers.tolist(), names) == ([0, 1, 2, 3, 4], ["class 0", "class 1"])
    assert labels[:6].tolist() == [[1, -1], [1, 1], [-1, -1], [1, -1], [-1, 0], [-1, -1]]


def test_scores_are_those_of_scikit_learn() -> None:
    """For a single class, and costs between which cross-validation need not choose."""
    torch.manual_seed(0)
    labels = torch.arange(80) % 2 * 2 - 1
    values = torch.randn(80, 8) + 0.5 * labels[:, None]
    everything = Features(values, torch.arange(80), labels)
    train, test = everything.select(slice(50)), everything.select(slice(50, 80))
    truth = labels[:, None].numpy().astype(np.int8)
    score, chance = svm.mean_average_precision(train, truth, test, truth, lambda: None)
    x = torch.nn.functional.normalize(values, dim=1).numpy()
    found = []
    for cost in svm.COSTS:
        machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
        decided = machine.fit(x[:50], truth[:50, 0]).decision_function(x[50:])
        found.append(average_precision_score(truth[50:, 0] == 1, decided))
    assert min(abs(score - own) for own in found) < 1e-6
    assert (chance, score > 0.8) == (0.5, True)


@pytest.mark.usefixtures("thin_backbone")
def test_from_the_command(tiny: Config, few_photos: Path, tmp_path: Path) -> None:
    source = open_source(str(few_photos))
    path = write(tmp_path / "a.json", source, [[i % 2, 1] if i % 3 else [] for i in range(30)])
    cfg = config.override(tiny, [f"data.val_root={few_photos}", f"evaluation.annotations={path}"])
    cfg = config.override(cfg, [f"evaluation.val_annotations={path}", "data.engine=torchvision"])
    (record,) = evaluate(["svm"], MCL(cfg), cfg, CPU)
    assert (record["name"], record["split"], record["classes"], record["images"]) == ("svm", "val", 2, 30)
    assert record["accuracy"] > record["chance"] == pytest.approx((10 + 20) / 2 / 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.val_root="], r"data\.val_root: svm needs held-out images"),
        (["evaluation.annotations="], r"evaluation\.annotations: svm needs the classes of images"),
        (["evaluation.val_annotations=nowhere.json"], r"evaluation\.val_annotations: cannot read nowhere\.json"),
        (["evaluation.annotations={list}"], r"evaluation\.annotations: .* is not a COCO annotation file"),
        (["evaluation.annotations={other}"], r"evaluation\.annotations: .* lists none of the images in"),
    ],
)
def test_annotations_that_do_not_serve(
    tiny: Config, few_photos: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "list.json").write_text("[]")
    other = {"images": [{"id": 0, "file_name": "no.jpg"}], "categories": [], "annotations": []}
    (tmp_path / "other.json").write_text(json.dumps(other))
    path = write(tmp_path / "a.json", open_source(str(few_photos)), [[0], [1]])
    base = [f"data.val_root={few_photos}", f"evaluation.annotations={path}", f"evaluation.val_annotations={path}"]
    words = [
        w.replace("{list}", str(tmp_path / "list.json")).replace("{other}", str(tmp_path / "other.json")) for w in words
    ]
    cfg = config.override(tiny, [*base, *words])
    with pytest.raises(ConfigError, match=message):
        evaluate(["svm"], MCL(cfg), cfg, CPU)
