"""torchvision: its ResNets, and its Faster and Mask R-CNN ``resnet50_fpn_v2``."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision import models

from mcl.config import ConfigError, ModelConfig
from mcl.export.files import save_plain, save_safetensors
from mcl.export.target import Target, Twin, TwinPart

_SAVES = {".pth": save_plain, ".safetensors": save_safetensors}
_INSTALL = "pip install torchvision"


def resnet_name(name: str) -> str | None:
    """Canonical name to that of a ResNet on its own."""
    return name.removeprefix("backbone.body.") if name.startswith("backbone.body.") else None


def _build_resnet(config: ModelConfig, channels: Sequence[int]) -> nn.Module:
    model: nn.Module = getattr(models, config.backbone)()
    return model


def _resnet_forward(model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
    (x,) = images
    maps = []
    for name, module in model.named_children():
        if name == "avgpool":
            break
        x = module(x)
        if name.startswith("layer"):
            maps.append(x)
    return maps


RESNET = Target(
    name="torchvision",
    rename=resnet_name,
    parts=("backbone",),
    saves=_SAVES,
    twin=Twin("torchvision", _INSTALL, _build_resnet, {"backbone": TwinPart(r"(?!fc\.)", _resnet_forward)}),
)


def _check_detection(config: ModelConfig, parts: Sequence[str]) -> None:
    wanted = {"backbone": "resnet50"}
    if "fpn" in parts or "head" in parts:
        wanted["width"] = "256"
    if "head" in parts:
        wanted["head_convs"] = "4"
    other = [f"model.{key}={value}" for key, value in wanted.items() if str(getattr(config, key)) != value]
    if other:
        raise ConfigError(
            f"--to torchvision-detection: torchvision's detectors are for runs with {' '.join(other)}; this one has "
            f"model.backbone={config.backbone} model.width={config.width} model.head_convs={config.head_convs}. Its "
            "backbone goes --to torchvision, all of it --to mmdet or detectron2"
        )


def _build_detector(config: ModelConfig, channels: Sequence[int]) -> nn.Module:
    model: nn.Module = models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
    return model


def _fpn_forward(model: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    pyramid = model.backbone.fpn(dict(enumerate(maps)))  # type: ignore[operator, union-attr]
    return list(pyramid.values())[: len(maps)]  # what follows is P6


def _head_forward(model: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    (x,) = maps
    for module in model.roi_heads.box_head:  # type: ignore[union-attr]
        if isinstance(module, nn.Flatten):
            break
        x = module(x)
    return [x]


DETECTION = Target(
    name="torchvision-detection",
    rename=lambda name: name,
    parts=("backbone", "fpn", "head"),
    saves=_SAVES,
    twin=Twin(
        "torchvision",
        _INSTALL,
        _build_detector,
        {
            "backbone": TwinPart(
                r"backbone\.body\.",
                lambda model, images: list(model.backbone.body(*images).values()),  # type: ignore[operator, union-attr]
            ),
            "fpn": TwinPart(r"backbone\.fpn\.", _fpn_forward),
            "head": TwinPart(r"roi_heads\.box_head\.\d\.[01]\.", _head_forward),
        },
    ),
    check=_check_detection,
)
