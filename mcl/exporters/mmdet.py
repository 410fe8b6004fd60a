"""MMDetection: Faster R-CNN and similar detectors, whose FPN starts at C2, and RetinaNet, whose FPN starts at C3."""

import contextlib
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcl.config import ModelConfig
from mcl.exporters import patch_nets
from mcl.exporters.files import save_openmmlab
from mcl.exporters.target import FIRST_SHORTCUT, RESNETS, Target, Twin
from mcl.models.backbones import Backbone

INSTALL = "mcl install-mmdet"
_CONVS = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}
_MODULES = {"0": "conv", "1": "bn"}
_BATCH_NORM = {"type": "BN"}
BACKBONES: dict[str, dict[str, Any]] = {
    **{name: {"type": "ResNet", "depth": int(name.removeprefix("resnet"))} for name in RESNETS},
    "resnext50_32x4d": {"type": "ResNeXt", "depth": 50, "groups": 32},
    "resnet50vd": {"type": "ResNetV1d", "depth": 50},
    "resnet101vd": {"type": "ResNetV1d", "depth": 101},
    "convnext_t": {"type": "mmpretrain.ConvNeXt", "out_indices": [0, 1, 2, 3], "gap_before_final_norm": False},
    "swin_t": {"type": "SwinTransformer"},
}
"""Configurations of the corresponding modules of MMDetection and mmpretrain, by ``model.backbone``."""


def import_mmdet() -> None:
    """Imports MMDetection and mmpretrain with transformers hidden, since their imports fail with its version 5.

    Raises:
        ImportError, AssertionError: the packages are not installed, or their versions do not fit each other.
    """
    before = sys.modules.pop("transformers", None)
    sys.modules["transformers"] = None  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):  # MMDetection does not need mmpretrain
            from mmpretrain.utils import dependency

            dependency.WITH_MULTIMODAL = False
        import mmdet.apis
        import mmdet.models  # noqa: F401  # also imports mmcv and mmengine
    finally:
        del sys.modules["transformers"]
        if before is not None:
            sys.modules["transformers"] = before


def rename(name: str, first_map: int) -> str | None:
    """MMDetection's name for a canonical name; None for maps that its FPN does not have.

    Args:
        first_map: finest map of the FPN: 0 for C2, 1 for C3.
    """
    if match := re.fullmatch(r"backbone\.fpn\.(\w+)\.(\d)\.([01])\.(\w+)", name):
        number = int(match[2]) - first_map
        return None if number < 0 else f"neck.{_CONVS[match[1]]}.{number}.{_MODULES[match[3]]}.{match[4]}"
    if match := re.fullmatch(r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", name):
        return f"roi_head.bbox_head.shared_convs.{match[1]}.{_MODULES[match[2]]}.{match[3]}"
    return name.replace("backbone.body.", "backbone.")


def _build(file: str, config: ModelConfig, heads: Mapping[str, Any]) -> Any:
    """A model that MMDetection ships, with our backbone, an FPN with BatchNorm, and changed settings of its heads."""
    import_mmdet()
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    shipped = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / file)
    with torch.device("meta"):
        channels = list(Backbone(config.backbone).channels[::-1])
    neck = {"in_channels": channels, "out_channels": config.width, "norm_cfg": _BATCH_NORM}
    shipped.model.backbone = {**BACKBONES[config.backbone], "init_cfg": None}
    shipped.merge_from_dict({"model": {"neck": neck, **heads}})
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(shipped.model)


def _build_rcnn(config: ModelConfig) -> Any:
    box_head = {
        "type": "ConvFCBBoxHead",
        "num_shared_convs": config.head_convs,
        "num_shared_fcs": 1,
        "in_channels": config.width,
        "conv_out_channels": config.width,
        "norm_cfg": _BATCH_NORM,
    }
    heads = {
        "rpn_head": {"in_channels": config.width, "feat_channels": config.width},
        "roi_head": {"bbox_roi_extractor": {"out_channels": config.width}, "bbox_head": box_head},
    }
    return _build("faster-rcnn_r50_fpn.py", config, heads)


def _build_retinanet(config: ModelConfig) -> Any:
    heads = {"bbox_head": {"in_channels": config.width, "feat_channels": config.width}}
    return _build("retinanet_r50_fpn.py", config, heads)


def _usage(path: str, backbone: str) -> str:
    return f"load_from = {path!r}  # in the configuration; its other keys: docs/export.md"


def backbone(model: Any, image: Tensor) -> Any:
    """C2 to C5."""
    return model.backbone(image)


_detector = partial(
    Target,
    saves={".pth": save_openmmlab},
    backbones=BACKBONES,
    renames=patch_nets.renames("OpenMMLab", "backbone."),
    adapt=patch_nets.adapt,
    restore=patch_nets.restored,
    sizes={"swin_t": (256, 288)},  # it shifts windows even in maps of a single window (7 x 7)
    lacks=FIRST_SHORTCUT,
    usage=_usage,
)

RCNN = _detector(
    name="mmdet",
    rename=partial(rename, first_map=0),
    parts={"backbone": r"backbone\.", "fpn": r"neck\.", "head": r"roi_head\.bbox_head\.shared_convs\."},
    twins=[
        Twin(
            "mmdet",
            INSTALL,
            _build_rcnn,
            {
                "backbone": backbone,
                "fpn": lambda model, maps: model.neck(maps)[:4],  # without P6
                "head": lambda model, p5: [nn.Sequential(*model.roi_head.bbox_head.shared_convs)(p5)],
            },
        )
    ],
)

RETINANET = _detector(
    name="mmdet-retinanet",
    rename=partial(rename, first_map=1),
    parts={"backbone": r"backbone\.", "fpn": r"neck\.(lateral_convs|fpn_convs\.[012])\."},
    twins=[
        Twin(
            "mmdet", INSTALL, _build_retinanet, {"backbone": backbone, "fpn": lambda model, maps: model.neck(maps)[:3]}
        )
    ],
    maps=(3, 4, 5),
)
