"""A COCO-format folder of photographs, small detectors, and weights for them."""

import contextlib
import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dali_pipelines.geometry import Geometry
from mcl.exporters.mmdet import import_mmdet
from mcl.records.metrics import log
from tests.conftest import PHOTOS, ROOT
from tests.mcl.exporters.conftest import make_model, save_model

with contextlib.suppress(ImportError):  # must precede the imports of the tests in this folder
    import_mmdet()

CONFIGS = ROOT / "mcl" / "finetune" / "configs"
MINI = CONFIGS / "mask_rcnn_r18_fpn_mini.py"
CLASSES = ("thing", "part")
TINY = (
    "data.classes=[]",
    "global_batch=2",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "train_dataloader.dataset.dataset.pipeline.2.scales=[[96,64],[96,80]]",
    "val_dataloader.dataset.pipeline.1.scale=[96,64]",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.test_cfg.rpn.max_per_img=10",
    "model.test_cfg.rcnn.max_per_img=5",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.interval=3",
    "custom_hooks.2.batches=2",
)
"""Overrides that make a run of the mini detector short."""


def make_folder(root: Path, train: int = 6, val: int = 2) -> Path:
    """Photographs of the repository at 128 pixels, each with a marked box and triangle."""
    for split, count in (("train", train), ("val", val)):
        folder = root / split
        folder.mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, path in enumerate(sorted((PHOTOS / split).rglob("*.jpg"))[:count], start=1):
            with Image.open(path) as photo:
                image = photo.convert("RGB")
            image.thumbnail((128, 128))
            if number % 3 == 0:
                image = image.rotate(90, expand=True)
            image.save(folder / f"{number}.jpg")
            w, h = image.size
            images.append({"id": number, "file_name": f"{number}.jpg", "width": w, "height": h})
            for category, box in ((1, (0, 0, w // 2, h // 2)), (2, (w // 4, h // 4, w // 2, h // 2))):
                annotations.append(_annotation(len(annotations) + 1, number, category, box))
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _annotation(number: int, image: int, category: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    x, y, w, h = box
    corners = [x, y, x + w, y, x + w, y + h] + ([x, y + h] if category == 1 else [])
    ids = {"id": number, "image_id": image, "category_id": category}
    crowd = {"iscrowd": 0} if category == 1 else {}  # LVIS annotations do not have this field
    return {**ids, **crowd, "bbox": list(box), "area": w * h / category, "segmentation": [corners]}


@pytest.fixture(scope="session", autouse=True)
def _once_what_mmengine_repeats() -> Iterator[None]:
    """MMEngine reads the index of the whole model zoo for every `_base_` of MMDetection, and formats a configuration
    five times per run; here it does both once."""
    if importlib.util.find_spec("mmengine") is None:  # some tests of this folder do not need it
        yield
        return
    from mmengine.config import Config, config

    formatted = functools.cache(lambda text, style, lay_out=config.FormatCode: lay_out(text, style_config=dict(style)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "_get_cfg_path", staticmethod(functools.cache(Config._get_cfg_path)))
        patch.setattr(config, "FormatCode", lambda text, style_config: formatted(text, tuple(style_config.items())))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a pre-training with the widths of the mini detector."""
    geometry = Geometry()
    model = make_model(geometry, backbone="resnet18", width=64, head_convs=2)
    return save_model(model, geometry, tmp_path_factory.mktemp("mini"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Messages of mcl's logger, to which other tests may have added handlers."""
    monkeypatch.setattr(log, "propagate", True)
    return caplog
