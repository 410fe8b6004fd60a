"""timm: its ResNets, which name their tensors as torchvision does, and ResNets-D."""

import re
from typing import Any

from torch import Tensor

from mcl.config import ModelConfig
from mcl.exporters.files import save_plain, save_safetensors
from mcl.exporters.target import FIRST_SHORTCUT, RESNETS, Target, Twin
from mcl.exporters.torchvision import resnet_name

MODELS = {
    **{name: name for name in (*RESNETS, "resnext50_32x4d")},
    "resnet50vd": "resnet50d",
    "resnet101vd": "resnet101d",
}
"""Its names of our backbones."""


def rename(name: str) -> str:
    """Canonical name to timm's."""
    name = resnet_name(name).replace("stem.7.", "bn1.")
    return re.sub(r"^stem\.", "conv1.", name)


def _build(config: ModelConfig) -> Any:
    import timm

    return timm.create_model(MODELS[config.backbone], num_classes=0)


def _maps(model: Any, image: Tensor) -> Any:
    return model.forward_intermediates(image, indices=(1, 2, 3, 4), intermediates_only=True)  # 0 is the stem


TARGET = Target(
    name="timm",
    rename=rename,
    parts={"backbone": ""},
    saves={".safetensors": save_safetensors, ".pth": save_plain},
    usage=lambda path, backbone: (
        f"import timm\nmodel = timm.create_model({MODELS[backbone]!r}, num_classes=0, checkpoint_path={path!r})"
    ),
    twins=[Twin("timm", "pip install timm", _build, {"backbone": _maps})],
    backbones=MODELS,
    lacks=FIRST_SHORTCUT,
)
