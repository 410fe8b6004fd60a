"""Backbones against the modules of the libraries that also have them."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from mcl.budget import count
from mcl.exporters.timm import rename
from mcl.models.backbones import Backbone
from mcl.models.norm import BatchNorm

SHALLOW = ["resnet18vd", "resnext50_32x4d"]


def image() -> Tensor:
    """(2, 3, 64, 96) noise."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def make(name: str) -> Backbone:
    """In evaluation mode; statistics are not the initial ones."""
    torch.manual_seed(0)
    backbone = Backbone(name).eval()
    for module in backbone.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return backbone


@torch.no_grad()
def same(backbone: Backbone, maps: list[Tensor]) -> None:
    """C2 to C5 of :func:`image` are these to 1e-5 of the largest feature, and as large as the backbone says."""
    ours = backbone(image())[::-1]
    assert [tuple(x.shape) for x in ours] == [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels[::-1], (4, 8, 16, 32), strict=True)
    ]
    for mine, other in zip(ours, maps, strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=1e-5 * float(mine.abs().max()))


@pytest.mark.parametrize("name", ["resnext50_32x4d", pytest.param("resnet152", marks=pytest.mark.soak)])
def test_torchvisions(name: str) -> None:
    backbone = make(name)
    theirs: nn.Module = torchvision.models.get_model(name).eval()
    missing, unexpected = theirs.load_state_dict(backbone.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    with torch.no_grad():
        same(backbone, list(create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)])(image()).values()))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("resnet18vd", "resnet18d"),
        ("resnet50vd", "resnet50d"),
        *(pytest.param(f"resnet{n}vd", f"resnet{n}d", marks=pytest.mark.soak) for n in (34, 101)),
    ],
)
def test_resnet_d(name: str, theirs: str) -> None:
    """timm's, with RT-DETR's shortcut of the first stage where that has none."""
    backbone = make(name)
    model = timm.create_model(theirs, num_classes=0)
    if model.layer1[0].downsample is None:
        model.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64))
        model.layer1[0].downsample.insert(0, nn.Identity())
    model.load_state_dict({rename(name): tensor for name, tensor in backbone.state_dict().items()})
    with torch.no_grad():
        same(backbone, model.eval().forward_intermediates(image(), indices=(1, 2, 3, 4), intermediates_only=True))


@pytest.mark.parametrize(
    ("name", "giga"),
    [
        *(
            (name, torchvision.models.get_model_weights(name).DEFAULT.meta["_ops"])
            for name in ("resnet152", "resnext50_32x4d")
        ),
        *(("resnet18vd", 2.06), ("resnet34vd", 3.91), ("resnet50vd", 4.35), ("resnet101vd", 8.08)),
    ],
)
def test_flops_are_the_published_ones(name: str, giga: float) -> None:
    """Multiply-adds of an image of 224 px, of torchvision or of timm; a step takes three times as many, but for the
    first convolution, which has no gradient of its input."""
    assert count.supervised(name) / 6e9 == pytest.approx(giga, rel=0.02)
