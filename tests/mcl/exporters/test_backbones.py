"""Every backbone in the modules of the libraries that support it, and an error for the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.swin_transformer import PatchMerging

from dali_pipelines.geometry import Geometry
from mcl.config import ConfigError
from mcl.exporters import TARGETS, export, mmdet
from mcl.exporters.patch_nets import adapt
from mcl.models import backbones
from tests.mcl.exporters.conftest import make_model, save_model
from tests.mcl.exporters.matrix import CASES, render, written

THIN = {"convnext_t": (32, [1, 1, 2, 1]), "swin_t": (32, [2, 1, 2, 1])}
FAST = {("mmdet", "resnet50vd"), ("timm", "resnet50vd"), ("mmpretrain", "resnext50_32x4d")}


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with that backbone; other parts are small."""
    # Torchvision's detectors require certain sizes.
    small = {} if request.param == "resnet50" else {"width": 8, "head_convs": 1}
    model = make_model(Geometry(), backbone=request.param, **small)
    return save_model(model, Geometry(), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("name", "key"), [("swin_t", "mmdet"), ("convnext_t", "mmpretrain")])
def test_thin_backbones(name: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In OpenMMLab's modules with the same sizes."""
    pytest.importorskip("mmdet", reason="needs MMDetection: make mmdet")
    width, depths = THIN[name]
    widths = [width * 2**i for i in range(4)]
    swin = {"embed_dims": width, "depths": depths, "num_heads": [w // 32 for w in widths]}
    sizes = swin if name == "swin_t" else {"arch": {"depths": depths, "channels": widths}}
    monkeypatch.setitem(mmdet.BACKBONES, name, mmdet.BACKBONES[name] | sizes)
    monkeypatch.setattr(backbones, "_PATCH_NETS", THIN)
    model = make_model(Geometry(), backbone=name, width=8, head_convs=1)
    report = export(save_model(model, Geometry(), tmp_path), key, check=True)
    assert report.verified is not None
    assert report.verified.difference <= 1e-5


@pytest.mark.parametrize(
    ("checkpoint", "to"),
    [pytest.param(name, to, marks=[] if (to, name) in FAST else pytest.mark.soak) for to, name in CASES],
    indirect=["checkpoint"],
)
def test_features_are_the_same_there(checkpoint: Path, to: str, tmp_path: Path) -> None:
    """Verifies the check marks of the table in docs/export.md."""
    pytest.importorskip(TARGETS[to].twins[0].package.replace("-pretrain", ""), reason="make mmdet, make soak")
    output = tmp_path / f"x{next(iter(TARGETS[to].saves), '')}"
    report = export(checkpoint, to, check=True, statistics_of="none", output=output)
    assert report.verified is not None
    assert report.verified.difference <= 1e-5


def test_table_of_the_documentation() -> None:
    """``python -m tests.mcl.exporters.matrix`` writes it again."""
    assert written() == render()


def test_merged_patches_as_mmdetection_has_them() -> None:
    """torchvision's module equals ``nn.Unfold`` with adapted weights."""
    torch.manual_seed(0)
    merge = PatchMerging(5, nn.LayerNorm)
    nn.init.normal_(merge.norm.weight)
    nn.init.normal_(merge.norm.bias)
    x = torch.randn(2, 4, 6, 5)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    names = {f"backbone.stages.0.downsample.{name}": tensor for name, tensor in merge.state_dict().items()}
    norm_bias, norm_weight, reduction = (tensor for _, tensor in sorted(adapt(names).items()))
    found = F.linear(F.layer_norm(unfolded, (20,), norm_weight, norm_bias), reduction)
    torch.testing.assert_close(found, merge(x).flatten(1, 2))


def test_merging_belongs_to_the_previous_stage() -> None:
    rename = TARGETS["mmdet"].renames["swin_t"]
    assert rename("features.4.reduction.weight") == "backbone.stages.1.downsample.reduction.weight"
    assert rename("features.5.3.mlp.3.bias") == "backbone.stages.2.blocks.3.ffn.layers.1.bias"
    assert rename("norms.2.weight") == "backbone.norm2.weight"


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        (
            "torchvision",
            "resnet50vd",
            "torchvision has no ResNet-D; targets that support it: mmdet, .*timm",
        ),
        ("mmdet", "resnet18vd", "resnet18vd"),
        ("detectron2", "swin_t", "model.backbone=swin_t is not supported: detectron2 has no .*; targets .*: mmdet, "),
        ("mmpretrain", "resnet18vd", "only in RT-DETR; targets that support it: transformers-rtdetr, hub"),
        ("torchvision-detection", "convnext_t", "support it: mmdet, .*torchvision, timm"),
        ("torchvision-detection", "resnet152", "have a ResNet-50; targets that support it: mmdet"),
    ],
)
def test_libraries_without_the_backbone(
    to: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shallow: Any = {key: (block, [1, 1, 1, 1]) for key, (block, _) in backbones._RESNETS.items()}
    monkeypatch.setattr(backbones, "_RESNETS", shallow)
    monkeypatch.setattr(backbones, "_PATCH_NETS", THIN)
    path = save_model(make_model(Geometry(), backbone=name, width=8, head_convs=1), Geometry(), tmp_path)
    with pytest.raises(ConfigError, match=f"--to {to}: .*{message}"):
        export(path, to)
