"""Modules of the authors' detectors that MMDetection lacks."""

from typing import Any

from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.shared_heads import ResLayer
from mmdet.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class NormedResLayer(ResLayer):
    """Last stage of a ResNet-50 as a box head, followed by a normalisation, as in MoCo's C4 detectors."""

    def __init__(self, norm_cfg: dict[str, Any], **options: Any) -> None:
        super().__init__(norm_cfg=norm_cfg, **options)
        self.norm = build_norm_layer(norm_cfg, 2048)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 1024, h, w) to (n, 2048, h / 2, w / 2)."""
        y: Tensor = self.norm(super().forward(x))
        return y


@MODELS.register_module()
class RetinaFPN(FPN):
    """An FPN whose convolutions for P6 and P7 have no normalisation, as in detectron2's ``LastLevelP6P7``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for i in range(len(self.lateral_convs), len(self.fpn_convs)):
            conv = self.fpn_convs[i].conv
            self.fpn_convs[i] = ConvModule(conv.in_channels, conv.out_channels, 3, stride=2, padding=1, act_cfg=None)
