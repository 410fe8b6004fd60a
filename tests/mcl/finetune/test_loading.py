"""Batches and augmentations are functions of seed and step."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from dali_pipelines.source import SourceError
from mcl.finetune import settings
from mcl.finetune.data import open_folder
from mcl.finetune.labels import choose
from mcl.finetune.training import use
from tests.mcl.finetune.conftest import MINI, TINY


def loader(folder: Path, *overrides: str) -> Any:
    config = settings.load(MINI, [*TINY, *overrides])
    use(config, open_folder(str(folder), masks=True))
    with DefaultScope.overwrite_default_scope("mmdet"):
        return Runner.build_dataloader(config.train_dataloader, seed=config.randomness.seed)


def take(loader: Any, start: int, count: int) -> list[Any]:
    loader.batch_sampler.start = start
    return list(itertools.islice(loader, count))


def test_batches_can_be_continued_anywhere(folder: Path) -> None:
    """Over two epochs, with another loader and another number of workers."""
    batches = take(loader(folder), 0, 6)
    np.random.seed(99)  # noqa: NPY002  # whatever was drawn in between
    torch.manual_seed(99)
    again = take(loader(folder, "train_dataloader.num_workers=2"), 4, 2)
    for batch, other in zip(batches[4:], again, strict=True):
        for image, same, sample, twin in zip(
            batch["inputs"], other["inputs"], batch["data_samples"], other["data_samples"], strict=True
        ):
            assert torch.equal(image, same)
            assert torch.equal(sample.gt_instances.bboxes.tensor, twin.gt_instances.bboxes.tensor)


def test_epochs(folder: Path) -> None:
    """Every image once per epoch, in batches of one orientation; the next epoch has another order and other crops."""
    batches = take(loader(folder), 0, 6)
    samples = [sample for batch in batches for sample in batch["data_samples"]]
    for batch in batches:
        heights_widths = [sample.ori_shape for sample in batch["data_samples"]]
        assert len({height > width for height, width in heights_widths}) == 1
    counts = np.unique([sample.img_id for sample in samples], return_counts=True)[1]
    assert sorted(counts) == [2] * 6
    shapes = [(sample.img_id, sample.flip, sample.img_shape) for sample in samples]
    assert shapes[:6] != shapes[6:]
    assert len({sample.flip for sample in samples}) == 2


def test_corrections_of_annotations_reach_the_loader(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    for path in copied.glob("*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation.update(id=annotation["id"] - 1, iscrowd=None, area=None)
            annotation["bbox"] = list(map(str, annotation["bbox"]))
        path.write_text(json.dumps(content), encoding="utf-16")
    for batch, same in zip(take(loader(folder), 0, 3), take(loader(copied), 0, 3), strict=True):
        for sample, twin in zip(batch["data_samples"], same["data_samples"], strict=True):
            assert torch.equal(sample.gt_instances.bboxes.tensor, twin.gt_instances.bboxes.tensor)
            assert (sample.gt_instances.masks.masks == twin.gt_instances.masks.masks).all()


def test_seeds_differ(folder: Path) -> None:
    first, second = (take(loader(folder, f"randomness.seed={seed}"), 0, 3) for seed in (0, 1))
    ids = [[[s.img_id for s in batch["data_samples"]] for batch in batches] for batches in (first, second)]
    assert ids[0] != ids[1]


def test_few_labels(folder: Path) -> None:
    """Three of the six images are trained on, and no others; training does not start if these have no objects."""
    batches = take(loader(folder, "data.fraction=0.5", "data.fraction_seed=1"), 0, 6)
    found = {sample.img_id for batch in batches for sample in batch["data_samples"]}
    assert found == {*open_folder(str(folder), fraction=0.5, seed=1).chosen} == {*choose(range(1, 7), 0.5, 1)}


def test_few_labels_without_objects(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copied / "instances_train.json").read_text())
    (first,) = choose(range(1, 7), 0.1, 0)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]
    (copied / "instances_train.json").write_text(json.dumps(content))
    with pytest.raises(
        SourceError, match=r"nothing to train on: .*, among the 1 training images; change .* or data\.fraction"
    ):
        open_folder(str(copied), fraction=0.1)
