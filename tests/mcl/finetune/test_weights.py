"""Pre-trained weights are loaded into the detector, or refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")

from mmdet.registry import MODELS
from mmengine.registry import DefaultScope

from dali_pipelines.geometry import Geometry
from mcl.config import ConfigError
from mcl.exporters import export
from mcl.finetune import settings, weights
from mcl.finetune.hooks import LoadWeights
from mcl.train import checkpoint as checkpoints
from mcl.train.checkpoint import CheckpointError
from tests.mcl.exporters.conftest import make_model, save_model
from tests.mcl.finetune.conftest import CONFIGS, MINI


def load(source: str | Path, *overrides: str) -> LoadWeights:
    config = settings.load(MINI, overrides)
    return weights.load(str(source), config.model, config.parts)


def test_checkpoint_and_export_give_the_same(checkpoint: Path, tmp_path: Path) -> None:
    ours = checkpoints.load(checkpoint)["model"]
    hook = load(checkpoint)
    exported = load(export(checkpoint, "mmdet", output=tmp_path / "mmdet.pth").path)
    assert hook.weights.keys() == exported.weights.keys()
    assert all(torch.equal(tensor, exported.weights[name]) for name, tensor in hook.weights.items())
    assert torch.equal(hook.weights["backbone.conv1.weight"], ours["online.backbone.conv1.weight"])


def test_they_replace_initial_values_of_a_run_that_starts(checkpoint: Path) -> None:
    hook = load(checkpoint)
    config = settings.load(MINI)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(config.model)
    fresh = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    hook.before_train(SimpleNamespace(model=detector))
    assert hook.summary.startswith(
        f"{checkpoint}: backbone 120, fpn 48, head 12 tensors, names as in mcl under online;"
    )
    assert hook.summary.endswith("; 28 of the detector's 208 tensors keep their initial values")
    loaded = detector.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in hook.weights.items())
    rest = loaded.keys() - hook.weights.keys()
    assert {name.split(".")[0] for name in rest} == {"rpn_head", "roi_head"}
    assert all(torch.equal(loaded[name], fresh[name]) for name in rest)


def test_backbone_alone(checkpoint: Path) -> None:
    hook = load(checkpoint, "parts=[backbone]")
    assert {name.split(".")[0] for name in hook.weights} == {"backbone"}


def test_parts_that_the_detector_has_not(checkpoint: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"parts: this detector has no 'neck' that can be loaded; it has backbone, fpn"
    ):
        load(checkpoint, "parts=[backbone,neck]")
    standard = settings.load(CONFIGS / "mask_rcnn_r50_fpn_2fc_1x.py", ["parts=[head]"])
    with pytest.raises(ConfigError, match=r"parts: this detector has no 'head' .*; it has backbone, fpn$"):
        weights.load(str(checkpoint), standard.model, standard.parts)


def test_supervised_weights(tmp_path: Path) -> None:
    """torchvision's weights, unchanged; also from the folder of its downloads."""
    state = torchvision.models.resnet18().state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    hook = load(tmp_path / "resnet18.pth")
    assert hook.weights.keys() == {f"backbone.{name}" for name in state if not name.startswith("fc.")}
    assert all(torch.equal(tensor, state[name.removeprefix("backbone.")]) for name, tensor in hook.weights.items())
    assert "no fpn: none of its tensors found" in hook.summary


def test_what_is_not_asked_for_need_not_be_there(tmp_path: Path) -> None:
    """For a model without convolutions in the region head, and one with fewer levels."""
    geometry = Geometry()
    headless = save_model(make_model(geometry, backbone="resnet18", width=64, head_convs=0), geometry, tmp_path / "a")
    assert len(load(headless).weights) == len(load(headless, "parts=[backbone,fpn]").weights) == 120 + 48
    with pytest.raises(
        CheckpointError, match="has no complete head, names as in mcl under online: none of its tensors"
    ):
        load(headless, "parts=[head]")
    three = Geometry(ratios=(1, 2, 4), images_per_canvas=(1, 4, 16))
    shallow = save_model(
        make_model(three, backbone="resnet18", width=64, head_convs=2, loss_weights=(0.5, 0.25, 0.25)),
        three,
        tmp_path / "b",
    )
    assert len(load(shallow).weights) == 120 + 12


def test_weights_of_another_width(tmp_path: Path) -> None:
    """The backbone's weights fit. Why others do not is logged, or is an error if they were requested."""
    geometry = Geometry()
    narrow = save_model(make_model(geometry, backbone="resnet18", width=16, head_convs=2), geometry, tmp_path)
    hook = load(narrow)
    assert len(hook.weights) == 120
    assert "no fpn: 40 of its 40 tensors are of another shape" in hook.summary
    with pytest.raises(
        CheckpointError, match=r"has no complete fpn, .*: 40 of its 40 tensors are of another shape, .*"
    ):
        load(narrow, "parts=[backbone,fpn]")


def test_another_backbone(tmp_path: Path) -> None:
    geometry = Geometry()
    deeper = save_model(make_model(geometry, backbone="resnet34", width=8, head_convs=0), geometry, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"has no complete resnet18, .*: \d+ unexpected tensors, .* It is a resnet34"
    ):
        load(deeper)
    thin = settings.load(MINI).model
    thin.backbone.base_channels, thin.neck.in_channels = 32, [32, 64, 128, 256]
    with pytest.raises(
        ConfigError, match=r"weights: the detector's backbone is none of resnet18, .*; leave weights out"
    ):
        weights.load(str(deeper), thin)


def test_a_detector_of_mmdetection(tmp_path: Path) -> None:
    """Saved whole by MMEngine. The pre-trained parts are read, also for an FPN that starts at C3."""
    for name, tensors in (("mask_rcnn_r18_fpn_mini", 180), ("retinanet_r50_fpn_1x", 318 + 36)):
        config = settings.load(CONFIGS / f"{name}.py")
        own = weights.build(config.model).state_dict()
        state = {key: torch.full((), i % 99.0).to(t.dtype).expand(t.shape) for i, (key, t) in enumerate(own.items())}
        torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "x.pth")
        hook = weights.load(str(tmp_path / "x.pth"), config.model)
        assert len(hook.weights) == tensors
        assert all(torch.equal(tensor, state[key]) for key, tensor in hook.weights.items())


def test_a_neck_of_another_form_is_left_out(checkpoint: Path) -> None:
    hook = load(checkpoint, "model.neck.norm_cfg=null")
    assert {name.split(".")[0] for name in hook.weights} == {"backbone", "roi_head"}


def test_the_old_keys(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(f'_base_ = "{MINI}"\npretrained = dict(names=["backbone"])\n')
    with pytest.raises(ConfigError, match=r"x\.py: pretrained is no longer a key: .* parts selects what to load"):
        settings.load(tmp_path / "x.py")
