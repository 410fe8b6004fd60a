"""detectron2. Exported names are suffixes of its own, so that FPN, RetinaNet and C4 models match them
(``matching_heuristics``).

``num_batches_tracked`` is left out: detectron2's frozen BatchNorm does not have it, and PyTorch's starts at 0.
"""

import re

from mcl.exporters.files import save_detectron2
from mcl.exporters.target import RESNETS, Target

_CONVS = {"inner_blocks": "fpn_lateral", "layer_blocks": "fpn_output"}


def rename(name: str) -> str | None:
    """detectron2's name for a canonical name."""
    if name.endswith("num_batches_tracked"):
        return None
    name = re.sub(r"^backbone\.body\.layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"^backbone\.body\.", "stem.", name)
    name = re.sub(r"^backbone\.fpn\.(\w+)\.(\d)", lambda m: f"{_CONVS[m[1]]}{int(m[2]) + 2}", name)
    name = re.sub(r"^roi_heads\.box_head\.(\d+)", lambda m: f"box_head.conv{int(m[1]) + 1}", name)
    name = re.sub(r"\.bn(\d)", r".conv\1.norm", name).replace("downsample", "shortcut")
    name = re.sub(r"\.0(\.\w+)$", r"\1", name)  # .0 is a convolution, .1 its BatchNorm
    return re.sub(r"\.1(\.\w+)$", r".norm\1", name)


TARGET = Target(
    name="detectron2",
    rename=rename,
    parts={"backbone": r"(stem|res\d)\.", "fpn": r"fpn_", "head": r"box_head\."},
    saves={".pkl": save_detectron2},
    usage=lambda path, _: f"MODEL.WEIGHTS: {path}  # other keys of the configuration: docs/export.md",
    freezes=True,
    backbones=(*RESNETS, "resnext50_32x4d"),
    lacks="detectron2 has no ResNet-D, ConvNeXt or Swin",
)
