"""mmpretrain: the backbone of its classifiers, and of MMDetection's detectors."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from mcl.config import ModelConfig
from mcl.export.files import save_openmmlab
from mcl.export.mmdet import INSTALL, depth
from mcl.export.target import Target, Twin, TwinPart


def rename(name: str) -> str | None:
    """Canonical name to mmpretrain's."""
    return name.replace("backbone.body.", "backbone.") if name.startswith("backbone.body.") else None


def _build(config: ModelConfig, channels: Sequence[int]) -> nn.Module:
    from mmpretrain.models import ImageClassifier

    model: nn.Module = ImageClassifier({"type": "ResNet", "depth": depth(config), "out_indices": (0, 1, 2, 3)})
    return model


def _forward(model: Any, images: Any) -> Any:
    return model.backbone(*images)


TARGET = Target(
    name="mmpretrain",
    rename=rename,
    parts=("backbone",),
    saves={".pth": save_openmmlab},
    twin=Twin("mmpretrain", INSTALL, _build, {"backbone": TwinPart(r"backbone\.", _forward)}),
)
