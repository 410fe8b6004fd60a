"""torchvision: backbones, and Faster and Mask R-CNN ``resnet50_fpn_v2``."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from mcl.config import ConfigError, ModelConfig
from mcl.exporters.files import save_plain, save_safetensors
from mcl.exporters.target import RESNETS, Target, Twin

_SAVES = {".pth": save_plain, ".safetensors": save_safetensors}
_INSTALL = "pip install torchvision"
_SIZES: dict[str, dict[str, Any]] = {
    "fpn": {"width": 256},
    "head": {"width": 256, "head_convs": 4},
}
"""Keys of ``model`` that torchvision's detectors require, by part."""

MODELS = {
    **{name: name for name in (*RESNETS, "resnext50_32x4d", "swin_t")},
    "convnext_t": "convnext_tiny",
}
"""torchvision's names of our backbones."""


def _build(config: ModelConfig) -> Any:
    return models.get_model(MODELS[config.backbone])


def resnet_name(name: str) -> str:
    """Name in a ResNet classifier for a canonical name."""
    return name.removeprefix("backbone.body.")


def _load(path: str) -> str:
    read = "safetensors.torch.load_file" if path.endswith(".safetensors") else "torch.load"
    return f"model.load_state_dict({read}({path!r}), strict=False)"


def _maps(model: nn.Module, image: Tensor) -> list[Tensor]:
    if hasattr(model, "layer4"):
        nodes = ["layer1", "layer2", "layer3", "layer4"]
    else:
        nodes = [f"features.{i}" for i in (1, 3, 5)] + ["permute" if hasattr(model, "permute") else "features.7"]
    maps = list(create_feature_extractor(model, nodes)(image).values())
    if hasattr(model, "permute"):  # Swin's maps are (n, h, w, channels), except the last one
        maps[:3] = [x.permute(0, 3, 1, 2) for x in maps[:3]]
    return maps


def _without_norms(name: str) -> str | None:
    """torchvision's ConvNeXt has no norms of maps; its Swin has one, of the last map."""
    return name if name.startswith("features.") else None


def _with_last_norm(name: str) -> str | None:
    return _without_norms(name) or (name.replace("norms.3", "norm") if name.startswith("norms.3.") else None)


RESNET = Target(
    name="torchvision",
    rename=resnet_name,
    parts={"backbone": r"(?!fc\.|head\.|classifier\.)"},
    saves=_SAVES,
    usage=lambda path, backbone: f"model = torchvision.models.{MODELS[backbone]}()\n{_load(path)}",
    twins=[Twin("torchvision", _INSTALL, _build, {"backbone": _maps})],
    renames={"convnext_t": _without_norms, "swin_t": _with_last_norm},
    backbones=MODELS,
    lacks="torchvision has no ResNet-D",
)


def _check_detection(config: ModelConfig, parts: Sequence[str]) -> None:
    wanted = {key: size for part in parts for key, size in _SIZES.get(part, {}).items()}
    other = [f"model.{key}={size}" for key, size in wanted.items() if getattr(config, key) != size]
    if other:
        raise ConfigError(
            f"--to torchvision-detection: torchvision's detectors are for runs with {' '.join(other)}; this one has "
            f"model.backbone={config.backbone} model.width={config.width} model.head_convs={config.head_convs}; export "
            "the backbone --to torchvision, or all parts --to mmdet or detectron2"
        )


DETECTION = Target(
    name="torchvision-detection",
    rename=lambda name: name,
    parts={
        "backbone": r"backbone\.body\.",
        "fpn": r"backbone\.fpn\.",
        "head": r"roi_heads\.box_head\.\d\.[01]\.",
    },
    saves=_SAVES,
    usage=lambda path, _: (
        f"model = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(weights_backbone=None)\n{_load(path)}"
    ),
    twins=[
        Twin(
            "torchvision",
            _INSTALL,
            lambda config: models.detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None),
            {
                "backbone": lambda model, image: list(model.backbone.body(image).values()),
                "fpn": lambda model, maps: list(model.backbone.fpn(dict(enumerate(maps))).values())[:4],
                "head": lambda model, p5: [nn.Sequential(*list(model.roi_heads.box_head)[:4])(p5)],
            },
        )
    ],
    backbones=("resnet50",),
    lacks="torchvision's detectors with BatchNorm in the FPN have a ResNet-50",
    check=_check_detection,
)
