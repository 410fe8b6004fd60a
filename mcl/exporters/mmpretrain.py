"""mmpretrain: the backbone of its classifiers, and of MMDetection's detectors."""

from typing import Any

from mcl.config import ModelConfig
from mcl.exporters.files import save_openmmlab
from mcl.exporters.mmdet import BACKBONES, INSTALL, RCNN, backbone, import_mmdet
from mcl.exporters.target import Target, Twin


def _build(config: ModelConfig) -> Any:
    import_mmdet()
    from mmengine.registry import DefaultScope
    from mmpretrain.models import ImageClassifier

    with DefaultScope.overwrite_default_scope("mmpretrain"):  # a fine-tuning before it leaves MMDetection's
        return ImageClassifier({**BACKBONES[config.backbone], "out_indices": [0, 1, 2, 3]})


TARGET = Target(
    name="mmpretrain",
    rename=RCNN.rename,
    parts={"backbone": r"backbone\."},
    saves={".pth": save_openmmlab},
    usage=lambda path, _: f"init_cfg = dict(type='Pretrained', checkpoint={path!r}, prefix='backbone.')",
    twins=[Twin("mmpretrain", INSTALL, _build, {"backbone": backbone})],
    renames=RCNN.renames,
    adapt=RCNN.adapt,
    backbones=[name for name in BACKBONES if not name.endswith("vd") and name != "swin_t"],
    lacks="mmpretrain numbers the shortcuts of a ResNet-D and the merged patches of a Swin otherwise",
)
