"""MMDetection's own functions use the fine-tuned detector, in another process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

import mcl
from mcl.config import DETECTORS
from mcl.finetune import finetune, settings
from mcl.finetune.data import open_folder
from mcl.finetune.training import use
from tests.conftest import ROOT
from tests.mcl.finetune.conftest import CLASSES, MINI
from tests.mcl.finetune.test_run import words

USE = """
import json, sys, torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
torch.set_num_threads(1)
config, weights, image, found = sys.argv[1:]
inferencer = DetInferencer(model=config, weights=weights, device="cpu", show_progress=False)
(said,) = inferencer(image)["predictions"]
detector = init_detector(config, weights, device="cpu")
(same,) = inference_detector(detector, [image])
classes = [detector.dataset_meta["classes"], inferencer.visualizer.dataset_meta["classes"]]
scores = same.pred_instances.scores.tolist(), same.pred_instances.bboxes.tolist()
json.dump({"inferencer": [said["scores"], said["bboxes"]], "detector": scores, "classes": classes}, open(found, "w"))
"""


def test_inferencer_and_detector(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    more = ("train_cfg.max_iters=1", "default_hooks.checkpoint.interval=1")
    finetune(MINI, words(folder, tmp_path, "run", f"weights={checkpoint}", *more))
    run, found = tmp_path / "run", tmp_path / "found.json"
    arguments = [run / MINI.name, run / "iter_1.pth", folder / "val" / "1.jpg", found]
    command = [sys.executable, "-W", "ignore", "-c", USE, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(found.read_text())
    assert said["classes"] == [list(CLASSES)] * 2
    for ours, theirs in zip(said["inferencer"], said["detector"], strict=True):
        assert len(ours) == 5  # model.test_cfg.rcnn.max_per_img
        assert np.allclose(ours, theirs, atol=1e-4)
    (ours,) = mcl.detect(run, folder / "val" / "1.jpg", tmp_path, threshold=0)
    assert ours.objects.scores is not None
    assert np.allclose(ours.objects.scores, said["detector"][0], atol=1e-4)
    assert np.allclose(ours.objects.boxes, said["detector"][1], atol=1e-3)


@pytest.mark.parametrize("path", sorted(DETECTORS.glob("*.py")), ids=lambda path: path.stem)
def test_every_configuration_has_a_test_set(path: Path, folder: Path) -> None:
    """It equals the set of the evaluations, and is loaded like MMDetection loads it."""
    config = settings.load(path, ["data.classes=[]"])
    use(config, open_folder(str(folder)))
    assert config.test_dataloader.dataset.pipeline[0].type == "LoadImageFromFile"
    assert config.test_dataloader.dataset.ann_file == config.val_dataloader.dataset.ann_file
    assert (config.test_evaluator, config.test_cfg.type) == (config.val_evaluator, "TestLoop")
