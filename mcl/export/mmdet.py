"""MMDetection: Faster R-CNN and its kin, whose FPN starts at C2; RetinaNet, whose FPN starts at C3."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mcl.config import ModelConfig
from mcl.export.files import save_openmmlab
from mcl.export.target import Target, Twin, TwinPart

INSTALL = "make mmdet, in a checkout of mcl"
_CONVS = {"inner_blocks": "lateral_convs", "layer_blocks": "fpn_convs"}
_MODULES = {"0": "conv", "1": "bn"}
_BATCH_NORM = {"type": "BN"}


def rename(name: str, first_map: int) -> str | None:
    """Canonical name to MMDetection's.

    Args:
        first_map: finest map of the FPN: 0 for C2, 1 for C3. A finer one has no place.
    """
    if match := re.fullmatch(r"backbone\.fpn\.(\w+)\.(\d)\.([01])\.(\w+)", name):
        number = int(match[2]) - first_map
        return None if number < 0 else f"neck.{_CONVS[match[1]]}.{number}.{_MODULES[match[3]]}.{match[4]}"
    if match := re.fullmatch(r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", name):
        return f"roi_head.bbox_head.shared_convs.{match[1]}.{_MODULES[match[2]]}.{match[3]}"
    return name.replace("backbone.body.", "backbone.")


def depth(config: ModelConfig) -> int:
    """Number of layers, by which OpenMMLab's ResNets are told apart."""
    return int(config.backbone.removeprefix("resnet"))


def _detector(file: str, config: ModelConfig, channels: Sequence[int]) -> Any:
    """A model's configuration as MMDetection ships it, with our backbone and an FPN with BatchNorm."""
    import mmdet
    from mmengine.config import Config

    model = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models" / file).model
    model.backbone.update(depth=depth(config), init_cfg=None)
    model.neck.update(in_channels=list(channels), out_channels=config.width, norm_cfg=_BATCH_NORM)
    return model


def _build(model: Any) -> nn.Module:
    from mmdet.models import detectors
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmdet"):
        detector: nn.Module = getattr(detectors, model.pop("type"))(**model)
    return detector


def _build_rcnn(config: ModelConfig, channels: Sequence[int]) -> nn.Module:
    model = _detector("faster-rcnn_r50_fpn.py", config, channels)
    model.rpn_head.update(in_channels=config.width, feat_channels=config.width)
    model.roi_head.bbox_roi_extractor.update(out_channels=config.width)
    model.roi_head.bbox_head.update(
        type="ConvFCBBoxHead",
        num_shared_convs=config.head_convs,
        num_shared_fcs=1,
        in_channels=config.width,
        conv_out_channels=config.width,
        norm_cfg=_BATCH_NORM,
    )
    return _build(model)


def _build_retinanet(config: ModelConfig, channels: Sequence[int]) -> nn.Module:
    model = _detector("retinanet_r50_fpn.py", config, channels)
    model.bbox_head.update(in_channels=config.width, feat_channels=config.width)
    return _build(model)


def _backbone(model: Any, images: Sequence[Tensor]) -> Sequence[Tensor]:
    maps: Sequence[Tensor] = model.backbone(*images)
    return maps


def _fpn(count: int) -> Callable[[Any, Sequence[Tensor]], Sequence[Tensor]]:
    return lambda model, maps: model.neck(maps)[:count]  # what follows is P6, P7


def _head(model: Any, maps: Sequence[Tensor]) -> list[Tensor]:
    (x,) = maps
    for conv in model.roi_head.bbox_head.shared_convs:
        x = conv(x)
    return [x]


RCNN = Target(
    name="mmdet",
    rename=partial(rename, first_map=0),
    parts=("backbone", "fpn", "head"),
    saves={".pth": save_openmmlab},
    twin=Twin(
        "mmdet",
        INSTALL,
        _build_rcnn,
        {
            "backbone": TwinPart(r"backbone\.", _backbone),
            "fpn": TwinPart(r"neck\.", _fpn(4)),
            "head": TwinPart(r"roi_head\.bbox_head\.shared_convs\.", _head),
        },
    ),
)

RETINANET = Target(
    name="mmdet-retinanet",
    rename=partial(rename, first_map=1),
    parts=("backbone", "fpn"),
    saves={".pth": save_openmmlab},
    maps=(1, 2, 3),
    twin=Twin(
        "mmdet",
        INSTALL,
        _build_retinanet,
        {
            "backbone": TwinPart(r"backbone\.", _backbone),
            "fpn": TwinPart(r"neck\.(lateral_convs|fpn_convs\.[012])\.", _fpn(3)),
        },
    ),
)
