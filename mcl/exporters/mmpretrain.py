"""mmpretrain: backbones of its classifiers, which MMDetection's detectors also read."""

import re
from typing import Any

from mcl.config import ModelConfig
from mcl.exporters.files import save_openmmlab
from mcl.exporters.mmdet import BACKBONES, INSTALL, RCNN, backbone, import_mmdet
from mcl.exporters.target import FIRST_SHORTCUT, Target, Twin


def _build(config: ModelConfig) -> Any:
    import_mmdet()
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier

    with DefaultScope.overwrite_default_scope("mmpretrain"):  # a former fine-tuning may have left MMDetection's
        return ImageClassifier({**BACKBONES[config.backbone], "out_indices": [0, 1, 2, 3]})


def _resnet_d(name: str) -> str:
    """Its stem has three modules, and its first stage does not pool before the shortcut's convolution."""
    name = re.sub(r"^stem\.(\d)", lambda m: f"stem.{int(m[1]) // 3}.{('conv', 'bn')[int(m[1]) % 3]}", name)
    return "backbone." + re.sub(r"^(layer1\.0\.downsample)\.(\d)", lambda m: f"{m[1]}.{int(m[2]) - 1}", name)


TARGET = Target(
    name="mmpretrain",
    rename=RCNN.rename,
    parts={"backbone": r"backbone\."},
    saves={".pth": save_openmmlab},
    usage=lambda path, _: f"init_cfg = dict(type='Pretrained', checkpoint={path!r}, prefix='backbone.')",
    twins=[Twin("mmpretrain", INSTALL, _build, {"backbone": backbone})],
    renames={**RCNN.renames, "resnet50vd": _resnet_d, "resnet101vd": _resnet_d},
    adapt=RCNN.adapt,
    restore=RCNN.restore,
    backbones=BACKBONES,
    sizes={"swin_t": (224, 224)},  # maps must not be smaller than a window
    lacks=FIRST_SHORTCUT,
)
