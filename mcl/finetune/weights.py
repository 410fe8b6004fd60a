"""Reads pre-trained weights for a detector, renames them, and compares them with the detector."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from torch import Tensor

from mcl import distributed
from mcl.config import ConfigError, ModelConfig
from mcl.exporters.canonical import canonical_names, part
from mcl.exporters.mmdet import RCNN, RETINANET
from mcl.exporters.target import Target
from mcl.finetune.hooks import LoadWeights
from mcl.models import Encoder
from mcl.weights.read import BACKBONES, backbone_tensors, read, take

_HEAD_CONVS = 16
"""Upper bound of the number of convolutions in a box head."""


def load(source: str, model: Mapping[str, Any], parts: Sequence[str] = ()) -> LoadWeights:
    """Reads weights and selects those that a detector can use.

    Args:
        source: see :func:`mcl.weights.read.read`.
        model: configuration of the detector.
        parts: see :func:`mcl.weights.read.take`.

    Raises:
        CheckpointError: the weights cannot be read, or do not fit the detector's backbone or `parts`.
        ConfigError: the detector has a backbone that mcl does not support, or lacks one of `parts`.
    """
    own = build(model).state_dict()
    target = _target(model)
    backbone, places = _places(own, target)
    for name in parts:
        if name not in map(part, places):
            has = ", ".join(dict.fromkeys(map(part, places)))
            raise ConfigError(f"parts: this detector has no {name!r} that can be loaded; it has {has}")
    wanted = {name: own[place] for name, place in places.items()} | backbone_tensors(backbone)
    contents = distributed.local_rank_zero_first(lambda: read(source, "weights"))
    taken = take(contents, wanted, backbone, parts)
    rest = len(own) - len(taken.weights)
    summary = f"{taken}; {rest} of the detector's {len(own)} tensors keep their initial values"
    return LoadWeights(target.adapt({places[name]: tensor for name, tensor in taken.weights.items()}), summary)


def _target(model: Mapping[str, Any]) -> Target:
    """The naming of the detector, which depends on whether its FPN starts at C2 or C3."""
    neck = model.get("neck")
    return RETINANET if isinstance(neck, Mapping) and neck.get("start_level") == 1 else RCNN


def _places(own: Mapping[str, Tensor], target: Target) -> tuple[str, dict[str, str]]:
    """The detector's backbone (a value of ``model.backbone``), and the detector's names by canonical names.

    In a C4 detector, the last stage of the backbone is the box head. An FPN or head of a different form is ignored.
    """

    def place(name: str, backbone: str) -> str:
        theirs = target.name_of(name, backbone) or ""
        stage = theirs.replace("backbone.layer4.", "roi_head.shared_head.layer4.")
        return stage if stage in own else theirs

    claimed = {name for name in own if name.startswith(("backbone.", "roi_head.shared_head.layer4."))}
    for backbone in BACKBONES:
        tensors = backbone_tensors(backbone)
        places = {name: place(name, backbone) for name in tensors}
        theirs = target.adapt({places[name]: tensor for name, tensor in tensors.items()})
        if theirs.keys() == claimed and all(own[name].shape == tensor.shape for name, tensor in theirs.items()):
            break
    else:
        raise ConfigError(f"weights: the detector's backbone is none of {', '.join(BACKBONES)}; leave weights out")
    with torch.device("meta"):
        encoder = Encoder(ModelConfig(backbone=backbone, width=1, head_convs=_HEAD_CONVS), (1, 2, 4, 8))  # type: ignore[arg-type]
    others = {name: place(name, backbone) for name in canonical_names(encoder).values() if name not in places}
    for of in ("fpn", "head"):
        inside = {name: theirs for name, theirs in others.items() if part(name) == of and theirs in own}
        if of in target.parts and set(inside.values()) == {n for n in own if re.match(target.parts[of], n)}:
            places |= inside
    return backbone, places


def build(model: Mapping[str, Any]) -> Any:
    """Builds a detector for its names and shapes, on the device meta if its class supports that."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        try:
            with torch.device("meta"):
                return MODELS.build(model)
        except RuntimeError:  # Swin and ConvNeXt read values of tensors when they are built
            return MODELS.build(model)
