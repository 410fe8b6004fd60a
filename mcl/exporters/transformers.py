"""transformers (5): DETR and its kin, with a backbone of timm's; RT-DETR 1 and 2, with a ResNet-D of their own.

All of them freeze BatchNorm. A folder serves every class of a family: ``from_pretrained`` takes its config.json, or
another class's configuration. Counts of BatchNorm's batches are left out, as frozen BatchNorm has none.
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
_SHALLOW = {"encoder_layers": 1, "decoder_layers": 2}
"""Of a detector whose backbone alone is looked at."""
_RT_DETRS: Mapping[str, tuple[str, list[int], dict[str, Any]]] = {
    "resnet18vd": ("basic", [2, 2, 2, 2], {"hidden_expansion": 0.5, "decoder_layers": 3}),
    "resnet34vd": ("basic", [3, 4, 6, 3], {"hidden_expansion": 0.5, "decoder_layers": 4}),
    "resnet50vd": ("bottleneck", [3, 4, 6, 3], {}),
    "resnet101vd": (
        "bottleneck",
        [3, 4, 23, 3],
        {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384, 384, 384]},
    ),
}
"""Kind of blocks, their numbers, and the sizes that the authors gave the detector with that backbone."""


def detr_name(name: str) -> str | None:
    """Canonical name to that in detectors with a backbone of timm's."""
    return None if name.endswith("num_batches_tracked") else _PREFIX + timm.rename(name)


def rt_detr_name(name: str) -> str | None:
    """Canonical name to that in RT-DETR, whose first stage does not pool before its shortcut's convolution."""
    if name.endswith("num_batches_tracked"):
        return None
    name = re.sub(r"^backbone\.body\.layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
    name = re.sub(r"^backbone\.body\.stem\.(\d)", lambda m: f"embedder.embedder.{int(m[1]) // 3}.{int(m[1]) % 3}", name)
    name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{m[1]}.", name)
    name = re.sub(r"\.downsample\.(\d)", lambda m: f".shortcut.1.{int(m[1]) - 1}", name)
    name = re.sub(r"(stages\.0\..*shortcut)\.1", r"\1", name)
    name = re.sub(r"\.(0|conv)(\.\w+)$", r".convolution\2", name)
    return _PREFIX + re.sub(r"\.(1|bn)(\.\w+)$", r".normalization\2", name)


def _detr(backbone: str) -> dict[str, Any]:
    """Keys of a detector's configuration, as transformers fills them in for a backbone of timm's."""
    timms = {
        "model_type": "timm_backbone",
        "backbone": timm.MODELS[backbone],
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [1, 2, 3, 4],
    }
    return {"backbone_config": timms}


def _rt_detr(backbone: str) -> dict[str, Any]:
    """Keys of a detector's configuration."""
    kind, depths, sizes = _RT_DETRS[backbone]
    channels = [(256 if kind == "bottleneck" else 64) << i for i in range(4)]
    resnet = {
        "model_type": "rt_detr_resnet",
        "layer_type": kind,
        "depths": depths,
        "hidden_sizes": channels,
        "out_features": ["stage2", "stage3", "stage4"],
    }
    return {"backbone_config": resnet, "encoder_in_channels": channels[1:], **sizes}


def _pack(keys: Any, kind: str, name: str, weights: Weights, metadata: Metadata) -> dict[str, bytes]:
    config = {"model_type": kind, "architectures": [f"{name}ForObjectDetection"], **keys(metadata["backbone"])}
    processor = {
        "image_processor_type": f"{name}ImageProcessor",
        "do_normalize": True,  # that of RT-DETR does not, unless it is told to
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
    twins=[_twin(_detr, name, _detr_maps) for name in ("Detr", "ConditionalDetr", "DeformableDetr")],
    backbones=[name for name in timm.MODELS if name.startswith("res")],
    lacks="DETR takes ResNets of timm's, which has no ResNet-D of 18 or 34 layers as RT-DETR has it",
    freezes=True,
)

RT_DETR = Target(
    name="transformers-rtdetr",
    rename=rt_detr_name,
    parts={"backbone": re.escape(_PREFIX)},
    pack=partial(_pack, _rt_detr, "rt_detr", "RTDetr"),
    usage=partial(_usage, "RTDetr", "RTDetrV2"),
    twins=[_twin(_rt_detr, name, _rt_detr_maps) for name in ("RTDetr", "RTDetrV2")],
    backbones=_RT_DETRS,
    lacks="RT-DETR needs a ResNet-D",
    freezes=True,
)
