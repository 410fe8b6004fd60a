"""Pre-trained weights arrive in the detector, or are refused."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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


def load(path: Path, *overrides: str) -> LoadWeights:
    config = settings.load(MINI, overrides)
    return weights.load(path, config.model, **config.pretrained)


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
    assert hook.summary == (
        f"{checkpoint}: 180 of the detector's 208 tensors (backbone 120, neck 48, roi_head 12); 28 keep their initial "
        "values"
    )
    loaded = detector.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in hook.weights.items())
    rest = loaded.keys() - hook.weights.keys()
    assert {name.split(".")[0] for name in rest} == {"rpn_head", "roi_head"}
    assert all(torch.equal(loaded[name], fresh[name]) for name in rest)


def test_backbone_alone(checkpoint: Path) -> None:
    hook = load(checkpoint, r"pretrained.names=['backbone\.']")
    assert {name.split(".")[0] for name in hook.weights} == {"backbone"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            r"['encoder\.']",
            r"pretrained\.names: encoder\\\., but no tensor of the detector begins so; they begin with b",
        ),
        (r"['backbone\.','nek\.']", r"pretrained\.names: nek\\\., but no tensor"),
        ("[]", r"pretrained\.names: empty, but no tensor .* Leave weights out to train from scratch"),
    ],
)
def test_names_that_ask_for_nothing(checkpoint: Path, names: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(checkpoint, f"pretrained.names={names}")


def test_what_is_not_asked_for_need_not_be_there(tmp_path: Path) -> None:
    """A model without the region head's convolutions, and one that trained fewer levels."""
    geometry = Geometry()
    headless = save_model(make_model(geometry, backbone="resnet18", width=64, head_convs=0), geometry, tmp_path / "a")
    assert len(load(headless, r"pretrained.names=['backbone\.','neck\.']").weights) == 120 + 48
    with pytest.raises(
        ConfigError, match=r"pretrained\.names: asks .* for its backbone, fpn, head: model\.head_convs=0"
    ):
        load(headless)
    three = Geometry(ratios=(1, 2, 4), images_per_canvas=(1, 4, 16))
    shallow = save_model(
        make_model(three, backbone="resnet18", width=64, head_convs=2, loss_weights=(0.5, 0.25, 0.25)),
        three,
        tmp_path / "b",
    )
    assert len(load(shallow, r"pretrained.names=['backbone\.']").weights) == 120


def test_weights_of_another_size(tmp_path: Path) -> None:
    geometry = Geometry()
    narrow = save_model(make_model(geometry, backbone="resnet18", width=16, head_convs=2), geometry, tmp_path)
    with pytest.raises(CheckpointError, match=r"of the 180 tensors .*; \d+ are of another shape, the first: neck\."):
        load(narrow)


@pytest.mark.parametrize("name", ["mask_rcnn_r50_fpn_1x", "retinanet_r50_fpn_1x"])
def test_loaded_missing_and_others_are_all(name: str, tmp_path: Path) -> None:
    """Of weights with tensors that are missing and tensors of another shape."""
    config = settings.load(CONFIGS / f"{name}.py")
    own = weights.build(config.model).state_dict()
    state = dict(own)
    for i, tensor in enumerate(own):
        if i % 5 == 0:
            del state[tensor]
        elif i % 7 == 0:
            state[tensor] = torch.zeros(1, 2, 3)
    torch.save({key: torch.zeros(value.shape) for key, value in state.items()}, tmp_path / "some.pth")
    with pytest.raises(CheckpointError) as caught:
        weights.load(tmp_path / "some.pth", config.model, **config.pretrained)
    said = re.search(
        r"of the (\d+) tensors .* has (\d+); (\d+) are missing, the first: \S+; (\d+) are of another shape",
        str(caught.value),
    )
    assert said
    every, loaded, missing, other = map(int, said.groups())
    expected = [key for key in own if any(re.match(start, key) for start in config.pretrained.names)]
    assert every == len(expected) == loaded + missing + other
    assert missing == sum(key not in state for key in expected)
    assert loaded == sum(key in state and state[key].shape == own[key].shape for key in expected)


def test_weights_that_lack_something(checkpoint: Path, tmp_path: Path) -> None:
    path = export(checkpoint, "mmdet", parts=["backbone"], output=tmp_path / "backbone.pth").path
    with pytest.raises(CheckpointError, match=r"of the 180 tensors .* has 120; 60 are missing, the first: neck\."):
        load(path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        load(Path("nowhere.pth"))
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"half\.pth is incomplete or holds no weights"):
        load(tmp_path / "half.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth holds no weights; take a checkpoint of mcl"):
        load(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "content", [[1], {"state_dict": [1]}, {"state_dict": 3}, {3: torch.ones(1)}, {"a": 1}, {}, None]
)
def test_what_holds_no_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"weights: .*x\.pth holds no weights"):
        load(tmp_path / "x.pth")
