"""detectron2: names that end its own, so that FPN, RetinaNet and C4 models find them (``matching_heuristics``).

Counts of BatchNorm's batches are left out: detectron2's frozen BatchNorm has none, and PyTorch's starts at 0.
"""

import re

from mcl.export.files import save_detectron2
from mcl.export.target import Target

_CONVS = {"inner_blocks": "fpn_lateral", "layer_blocks": "fpn_output"}
_NORM = {"0": "", "1": ".norm"}


def rename(name: str) -> str | None:
    """Canonical name to detectron2's."""
    *_, leaf = name.split(".")
    if leaf == "num_batches_tracked":
        return None
    if match := re.fullmatch(r"backbone\.body\.(conv|bn)1\.\w+", name):
        return f"stem.conv1{'.norm' if match[1] == 'bn' else ''}.{leaf}"
    if match := re.fullmatch(r"backbone\.body\.layer(\d)\.(\d+)\.(conv|bn)(\d)\.\w+", name):
        norm = ".norm" if match[3] == "bn" else ""
        return f"res{int(match[1]) + 1}.{match[2]}.conv{match[4]}{norm}.{leaf}"
    if match := re.fullmatch(r"backbone\.body\.layer(\d)\.0\.downsample\.([01])\.\w+", name):
        return f"res{int(match[1]) + 1}.0.shortcut{_NORM[match[2]]}.{leaf}"
    if match := re.fullmatch(r"backbone\.fpn\.(\w+)\.(\d)\.([01])\.\w+", name):
        return f"{_CONVS[match[1]]}{int(match[2]) + 2}{_NORM[match[3]]}.{leaf}"
    if match := re.fullmatch(r"roi_heads\.box_head\.(\d+)\.([01])\.\w+", name):
        return f"box_head.conv{int(match[1]) + 1}{_NORM[match[2]]}.{leaf}"
    return None


TARGET = Target(
    name="detectron2",
    rename=rename,
    parts=("backbone", "fpn", "head"),
    saves={".pkl": save_detectron2},
    twin=None,
)
