"""transformers (5): DETR and similar detectors, with timm's ResNets or its own; RT-DETR 1 and 2, with its ResNet-D.

All of them freeze BatchNorm, so ``num_batches_tracked`` is left out. A folder can be loaded by every class of a family:
``from_pretrained`` uses the folder's config.json or the configuration of another class.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mcl.config import ModelConfig
from mcl.exporters import timm
from mcl.exporters.files import Metadata, Weights, json_bytes, safetensors_bytes
from mcl.exporters.target import Target, Twin

_PREFIX = "model.backbone.model."
_INSTALL = "pip install 'transformers>=5' timm"
_DETRS = ("Detr", "ConditionalDetr", "DeformableDetr")
_SHALLOW = {"encoder_layers": 1, "decoder_layers": 2}
"""Number of layers of a detector of which only the backbone is tested."""
_RESNETS = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
"""Type of blocks, and number of blocks per stage."""
_RT_DETRS: Mapping[str, dict[str, Any]] = {
    "resnet18vd": {"hidden_expansion": 0.5, "decoder_layers": 3},
    "resnet34vd": {"hidden_expansion": 0.5, "decoder_layers": 4},
    "resnet50vd": {},
    "resnet101vd": {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384, 384, 384]},
}
"""Sizes of the detector that its authors use with each backbone."""


def detr_name(name: str) -> str | None:
    """Name in detectors with a backbone of timm, for a canonical name; None if they have no such tensor."""
    return None if name.endswith("num_batches_tracked") else _PREFIX + timm.rename(name)


def own_name(name: str, deep: bool) -> str | None:
    """Name in detectors with one of transformers' own ResNets, for a canonical name; None if they have no such tensor.

    Args:
        deep: whether the ResNet is that of RT-DETR: a ResNet-D whose first stage does not pool before the shortcut's
            convolution.
    """
    if name.endswith("num_batches_tracked"):
        return None
    name = re.sub(r"^backbone\.body\.layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
    name = re.sub(r"^backbone\.body\.(conv|bn)1\.", r"embedder.embedder.\1.", name)
    name = re.sub(r"^backbone\.body\.stem\.(\d)", lambda m: f"embedder.embedder.{int(m[1]) // 3}.{int(m[1]) % 3}", name)
    name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{m[1]}.", name)
    if deep:
        name = re.sub(r"\.downsample\.(\d)", lambda m: f".shortcut.1.{int(m[1]) - 1}", name)
        name = re.sub(r"(stages\.0\..*shortcut)\.1", r"\1", name)
    name = name.replace("downsample", "shortcut")
    name = re.sub(r"\.(0|conv)(\.\w+)$", r".convolution\2", name)
    return _PREFIX + re.sub(r"\.(1|bn)(\.\w+)$", r".normalization\2", name)


def _detr(backbone: str) -> dict[str, Any]:
    """Keys of a detector's configuration, with the values that transformers uses for a backbone of timm."""
    timms = {
        "model_type": "timm_backbone",
        "backbone": timm.MODELS[backbone],
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [1, 2, 3, 4],
    }
    return {"backbone_config": timms}


def _resnet(backbone: str, kind: str, first_map: int) -> dict[str, Any]:
    """Configuration of one of transformers' own ResNets."""
    blocks, depths = _RESNETS[backbone.removesuffix("vd")]
    return {
        "model_type": kind,
        "layer_type": blocks,
        "depths": depths,
        "hidden_sizes": [(256 if blocks == "bottleneck" else 64) << i for i in range(4)],
        "out_features": [f"stage{i}" for i in range(first_map, 5)],
    }


def _detr_resnet(backbone: str) -> dict[str, Any]:
    """Keys of a detector's configuration with one of transformers' own ResNets."""
    return {"backbone_config": _resnet(backbone, "resnet", 1)}


def _rt_detr(backbone: str) -> dict[str, Any]:
    """Keys of RT-DETR's configuration."""
    resnet = _resnet(backbone, "rt_detr_resnet", 2)
    return {"backbone_config": resnet, "encoder_in_channels": resnet["hidden_sizes"][1:], **_RT_DETRS[backbone]}


def _pack(keys: Any, kind: str, name: str, weights: Weights, metadata: Metadata) -> dict[str, bytes]:
    config = {"model_type": kind, "architectures": [f"{name}ForObjectDetection"], **keys(metadata["backbone"])}
    processor = {
        "image_processor_type": f"{name}ImageProcessor",
        "do_normalize": True,  # RT-DETR's does not by default
        "image_mean": metadata["mean"],
        "image_std": metadata["std"],
    }
    return {
        "config.json": json_bytes(config),
        "preprocessor_config.json": json_bytes(processor),
        "model.safetensors": safetensors_bytes(weights, metadata),
    }


def _usage(name: str, others: str, path: str, backbone: str) -> str:
    return (
        f"from transformers import {name}ForObjectDetection  # {others}: see docs/export.md\n"
        f"model = {name}ForObjectDetection.from_pretrained({path!r}, num_labels=80)"
    )


def _build(keys: Any, name: str, config: ModelConfig) -> Any:
    import transformers

    configured = getattr(transformers, f"{name}Config")(**{**keys(config.backbone), **_SHALLOW})
    return getattr(transformers, f"{name}ForObjectDetection")(configured)


def _detr_maps(model: Any, image: Tensor) -> list[Tensor]:
    everywhere = torch.ones(len(image), *image.shape[2:])
    return [pixels for pixels, _ in model.model.backbone(image, everywhere)]


def _rt_detr_maps(model: Any, image: Tensor) -> Any:
    return model.model.backbone.model(image, output_hidden_states=True).hidden_states[1:]  # 0 is the stem


def _twin(keys: Any, name: str, maps: Any) -> Twin:
    return Twin("transformers", _INSTALL, partial(_build, keys, name), {"backbone": maps})


DETR = Target(
    name="transformers-detr",
    rename=detr_name,
    parts={"backbone": re.escape(_PREFIX)},
    pack=partial(_pack, _detr, "detr", "Detr"),
    usage=partial(_usage, "Detr", "ConditionalDetr and DeformableDetr"),
    twins=[_twin(_detr, name, _detr_maps) for name in _DETRS],
    backbones=[name for name in timm.MODELS if name.startswith("res")],
    lacks="DETR takes ResNets of timm, which has no ResNet-D of 18 or 34 layers like those of RT-DETR",
    freezes=True,
)

DETR_RESNET = Target(
    name="transformers-detr-resnet",
    rename=partial(own_name, deep=False),
    parts=DETR.parts,
    pack=partial(_pack, _detr_resnet, "detr", "Detr"),
    usage=DETR.usage,
    twins=[_twin(_detr_resnet, name, _detr_maps) for name in _DETRS],
    backbones=_RESNETS,
    lacks="transformers' own ResNet has 18 to 152 layers, and is neither a ResNeXt nor a ResNet-D",
    freezes=True,
)

RT_DETR = Target(
    name="transformers-rtdetr",
    rename=partial(own_name, deep=True),
    parts={"backbone": re.escape(_PREFIX)},
    pack=partial(_pack, _rt_detr, "rt_detr", "RTDetr"),
    usage=partial(_usage, "RTDetr", "RTDetrV2"),
    twins=[_twin(_rt_detr, name, _rt_detr_maps) for name in ("RTDetr", "RTDetrV2")],
    backbones=_RT_DETRS,
    lacks="RT-DETR needs a ResNet-D",
    freezes=True,
)
