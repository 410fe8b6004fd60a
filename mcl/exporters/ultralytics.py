"""ultralytics: RT-DETR with a ResNet, as a configuration and a checkpoint.

The licence of ultralytics is AGPL-3.0, so this file contains none of its code: the configuration is read from the
user's installation, whose classes also pickle the weights.

Two settings differ from PyTorch's ResNet. The activation is SiLU, so the configuration sets ReLU. BatchNorm adds 1e-3
to the variance instead of 1e-5, which the scales of BatchNorm compensate; running statistics do not change.
"""

import io
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mcl.config import ConfigError, ModelConfig
from mcl.exporters.files import Metadata, Weights
from mcl.exporters.target import Target, Twin
from mcl.models.norm import BatchNorm

_INSTALL = "pip install ultralytics"
_DEPTHS = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3], "resnet152": [3, 8, 36, 3]}
_EPS = 1e-3
_MODULES = {"conv": "conv", "bn": "bn", "0": "conv", "1": "bn"}


def rename(name: str) -> str:
    """ultralytics' name for a canonical name."""
    stem = re.fullmatch(r"backbone\.body\.(conv|bn)1\.(\w+)", name)
    if stem:
        return f"model.0.layer.0.{stem[1]}.{stem[2]}"
    name = re.sub(r"^backbone\.body\.layer(\d)", r"model.\1.layer", name)
    name = re.sub(r"\.(conv|bn)(\d)\.", r".cv\2.\1.", name)
    return re.sub(r"\.downsample\.([01])", lambda m: f".shortcut.0.{_MODULES[m[1]]}", name)


def adapt(weights: Weights) -> Weights:
    """Changes the scales of BatchNorm for the value that ultralytics adds to the variance."""
    adapted = dict(weights)
    ours = BatchNorm(1).eps
    for name in weights:
        if name.endswith(".running_var"):
            variance, scale = weights[name].double(), name.replace("running_var", "weight")
            factor = ((variance + _EPS) / (variance + ours)).sqrt()
            adapted[scale] = (weights[scale].double() * factor).to(weights[scale].dtype)
    return adapted


def _yaml(backbone: str) -> dict[str, Any]:
    """The installed configuration of RT-DETR with a ResNet-50, changed to this depth and to ReLU."""
    os.environ.setdefault("YOLO_OFFLINE", "true")  # otherwise its import tries to reach the network
    from ultralytics.nn.tasks import yaml_model_load

    content: dict[str, Any] = yaml_model_load("rtdetr-resnet50.yaml")
    for (_, _, _, arguments), blocks in zip(content["backbone"][1:], _DEPTHS[backbone], strict=True):
        arguments[-1] = blocks
    del content["yaml_file"]
    return {**content, "activation": "torch.nn.ReLU()"}


def _build(backbone: str) -> Any:
    content = _yaml(backbone)
    from ultralytics.nn.tasks import RTDETRDetectionModel

    return RTDETRDetectionModel(content, verbose=False)


def _pack(weights: Weights, metadata: Metadata) -> dict[str, bytes]:
    """The configuration and a complete detector, which ultralytics requires; only its backbone is trained."""
    model: nn.Module = _build(metadata["backbone"])
    model.load_state_dict({**model.state_dict(), **weights})
    checkpoint = io.BytesIO()
    torch.save({"model": model, "mcl": dict(metadata)}, checkpoint)
    content = yaml.safe_dump(_yaml(metadata["backbone"]), sort_keys=False)
    return {"rtdetr.yaml": content.encode(), "rtdetr.pt": checkpoint.getvalue()}


def _check(config: ModelConfig, parts: Sequence[str]) -> None:
    try:
        _yaml(config.backbone)
    except ImportError as error:
        raise ConfigError(
            f"--to ultralytics-rtdetr: needs ultralytics ({error}), whose files are part of the export; install it if "
            f"its licence, AGPL-3.0, suits you: {_INSTALL}"
        ) from None


def _maps(model: Any, image: Tensor) -> list[Tensor]:
    maps = []
    for layer in model.model[:5]:
        image = layer(image)
        maps.append(image)
    return maps[1:]


TARGET = Target(
    name="ultralytics-rtdetr",
    rename=rename,
    adapt=adapt,
    parts={"backbone": r"model\.[0-4]\."},
    pack=_pack,
    usage=lambda path, _: (
        f"from ultralytics import RTDETR\nmodel = RTDETR({path + '/rtdetr.yaml'!r}).load({path + '/rtdetr.pt'!r})"
    ),
    twins=[Twin("ultralytics", _INSTALL, lambda config: _build(config.backbone), {"backbone": _maps})],
    backbones=_DEPTHS,
    lacks="ultralytics' RT-DETR takes only ResNets with three convolutions per block",
    check=_check,
)
