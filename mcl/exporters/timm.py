"""timm: ResNets, whose tensors have torchvision's names, ResNet-D, ConvNeXt and Swin."""

import re
from typing import Any

from torch import Tensor

from mcl.config import ModelConfig
from mcl.exporters import patch_nets
from mcl.exporters.files import save_plain, save_safetensors
from mcl.exporters.target import FIRST_SHORTCUT, RESNETS, Target, Twin
from mcl.exporters.torchvision import resnet_name

MODELS = {
    **{name: name for name in (*RESNETS, "resnext50_32x4d")},
    "resnet50vd": "resnet50d",
    "resnet101vd": "resnet101d",
    "convnext_t": "convnext_tiny",
    "swin_t": "swin_tiny_patch4_window7_224",
}
"""timm's names of our backbones."""


def rename(name: str) -> str:
    """timm's name for a canonical name."""
    name = resnet_name(name).replace("stem.7.", "bn1.")
    return re.sub(r"^stem\.", "conv1.", name)


def _build(config: ModelConfig) -> Any:
    import timm

    return timm.create_model(MODELS[config.backbone], num_classes=0)


def _maps(model: Any, image: Tensor) -> Any:
    return model.forward_intermediates(image, indices=4, norm=True, intermediates_only=True)  # the last four


TARGET = Target(
    name="timm",
    rename=rename,
    parts={"backbone": r"(?!head\.)"},
    saves={".safetensors": save_safetensors, ".pth": save_plain},
    usage=lambda path, backbone: (
        f"import timm\nmodel = timm.create_model({MODELS[backbone]!r}, num_classes=0, checkpoint_path={path!r})"
    ),
    twins=[Twin("timm", "pip install timm", _build, {"backbone": _maps})],
    backbones=MODELS,
    renames=patch_nets.renames("timm"),
    adapt=patch_nets.adapt,
    restore=patch_nets.restored,
    sizes={"swin_t": (224, 224)},  # timm's Swin accepts a single size
    lacks=FIRST_SHORTCUT,
)
