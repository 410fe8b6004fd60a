"""timm: its ResNets, which name their tensors as torchvision does."""

from typing import Any

from torch import Tensor

from mcl.config import ModelConfig
from mcl.exporters.files import save_plain, save_safetensors
from mcl.exporters.target import Target, Twin
from mcl.exporters.torchvision import resnet_name


def _build(config: ModelConfig) -> Any:
    import timm

    return timm.create_model(config.backbone, num_classes=0)


def _maps(model: Any, image: Tensor) -> Any:
    return model.forward_intermediates(image, indices=(1, 2, 3, 4), intermediates_only=True)  # 0 is the stem


TARGET = Target(
    name="timm",
    rename=resnet_name,
    parts={"backbone": ""},
    saves={".safetensors": save_safetensors, ".pth": save_plain},
    twin=Twin("timm", "pip install timm", _build, {"backbone": _maps}),
)
