"""mmpretrain: the backbone of its classifiers, and of MMDetection's detectors."""

from typing import Any

from mcl.config import ModelConfig
from mcl.exporters.files import save_openmmlab
from mcl.exporters.mmdet import INSTALL, RCNN, backbone, depth
from mcl.exporters.target import Target, Twin


def _build(config: ModelConfig) -> Any:
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier

    with DefaultScope.overwrite_default_scope("mmpretrain"):  # a fine-tuning before it leaves MMDetection's
        return ImageClassifier({"type": "ResNet", "depth": depth(config), "out_indices": (0, 1, 2, 3)})


TARGET = Target(
    name="mmpretrain",
    rename=RCNN.rename,
    parts={"backbone": r"backbone\."},
    saves={".pth": save_openmmlab},
    twin=Twin("mmpretrain", INSTALL, _build, {"backbone": backbone}),
)
