"""One training and one validation step of every configuration with its real network, on small images; and detection
with the result."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmdet.apis import inference_detector, init_detector

from mcl.finetune import metric, settings, training
from tests.mcl.finetune.conftest import CONFIGS, make_folder

REGIONS = 64


@pytest.mark.soak
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_a_step_of_every_configuration(path: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "coco", train=2, val=1)
    if path.stem.endswith("lvis"):
        _as_lvis(folder)
    config = settings.load(path, [f"data.root={folder}", f"output={tmp_path}", "data.classes=[]", "global_batch=1"])
    config.train_cfg.update(max_iters=1, val_interval=1)
    config.train_dataloader.num_workers = config.val_dataloader.num_workers = 0
    settings.innermost(config.train_dataloader).pipeline[2].scales = [(426, 256)]
    settings.innermost(config.val_dataloader).pipeline[1].scale = (426, 256)
    settings.replace(config.model.train_cfg, "max_per_img", ..., REGIONS)
    settings.replace(config.model.test_cfg, "max_per_img", ..., REGIONS)
    if "rcnn" in config.model.train_cfg:
        config.model.train_cfg.rcnn.sampler.num = REGIONS
    config.custom_hooks[2].batches = 1
    table = training.finetune(config)
    (record,) = metric.read(tmp_path / path.stem)
    assert record["step"] == 1
    assert ("mask" in record) == (config.model.type == "MaskRCNN")
    assert ("box (11 points)" in record) == path.stem.endswith("voc")
    assert table == metric.table([record])
    state = torch.load(tmp_path / path.stem / "iter_1.pth", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    run = tmp_path / path.stem
    detector = init_detector(str(run / path.name), str(run / "iter_1.pth"), device="cpu")
    found = inference_detector(detector, str(folder / "val" / "1.jpg")).pred_instances
    assert ("masks" in found) == (config.model.type == "MaskRCNN")


def _as_lvis(folder: Path) -> None:
    """Adds the fields that LVIS annotations have in addition to COCO's."""
    for path in folder.glob("instances_*.json"):
        content = json.loads(path.read_text())
        for image in content["images"]:
            image.update(neg_category_ids=[1], not_exhaustive_category_ids=[2])
        for category in content["categories"]:
            category["frequency"] = "f"
        path.write_text(json.dumps(content))
