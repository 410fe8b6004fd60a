"""Pre-trained weights arrive in the detector, or are refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope

from mcl import checkpoint as checkpoints
from mcl.checkpoint import CheckpointError
from mcl.export import export
from mcl.finetune import settings, weights
from mcl.finetune.hooks import LoadWeights
from mcl.montage import Geometry
from tests.mcl.export.conftest import make_model, save_model
from tests.mcl.finetune.conftest import MINI


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
    loaded = detector.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in hook.weights.items())
    rest = loaded.keys() - hook.weights.keys()
    assert {name.split(".")[0] for name in rest} == {"rpn_head", "roi_head"}
    assert all(torch.equal(loaded[name], fresh[name]) for name in rest)


def test_backbone_alone(checkpoint: Path) -> None:
    hook = load(checkpoint, r"pretrained.names=['backbone\.']")
    assert {name.split(".")[0] for name in hook.weights} == {"backbone"}


def test_weights_of_another_size(tmp_path: Path) -> None:
    geometry = Geometry()
    narrow = save_model(make_model(geometry, backbone="resnet18", width=16, head_convs=2), geometry, tmp_path)
    with pytest.raises(CheckpointError, match=r"of the 180 tensors .*; \d+ are of another shape, the first: neck\."):
        load(narrow)


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
