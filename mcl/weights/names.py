"""Maps canonical names of a backbone, an FPN and a region head to their names in other libraries.

The formats that `mcl export` writes are read with the same mappings. Prefixes, such as MoCo's ``encoder_q.`` or the
``backbone.`` of a classifier, need no mapping: :func:`mcl.weights.read.take` finds them.
"""

import re

from mcl.exporters import detectron2
from mcl.exporters.canonical import part
from mcl.exporters.convert import TARGETS
from mcl.exporters.mmdet import RCNN
from mcl.exporters.target import Convention

_CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
_DETECTRON2 = {"backbone": "backbone.bottom_up.", "fpn": "backbone.", "head": "roi_heads."}


def _detectron2_model(name: str) -> str | None:
    """A whole detector with an FPN, whose names are those that `mcl export` writes, with a prefix."""
    theirs = detectron2.rename(name)
    return None if theirs is None else _DETECTRON2[part(name)] + theirs


def _released(name: str) -> str | None:
    """The authors' checkpoints: a sequence of MMDetection's backbone, FPN and convolutions."""
    theirs = RCNN.rename(name)
    for ours, number in (("backbone.", "0."), ("neck.", "1."), ("roi_head.bbox_head.shared_convs.", "2.cls_convs.")):
        theirs = theirs and theirs.replace(ours, number, 1)
    return theirs


def _soco(name: str) -> str | None:
    """SoCo: MMDetection's backbone and FPN, with a different head."""
    if match := re.fullmatch(r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", name):
        return f"head.{('conv', 'bn')[int(match[2])]}{int(match[1]) + 1}.{match[3]}"
    theirs = RCNN.rename(name)
    return theirs and theirs.replace("backbone.", "encoder.", 1)


def _lightly(name: str) -> str:
    """lightly: ``nn.Sequential(*resnet.children())``, whose modules are numbered."""
    return re.sub(r"^backbone\.body\.(\w+)", lambda m: _CHILDREN.get(m[1], m[1]), name)


CONVENTIONS: dict[str, Convention] = {
    # ultralytics' detectors are trained with a different activation, input range and BatchNorm epsilon.
    **{name: target for name, target in TARGETS.items() if name != "ultralytics-rtdetr"},
    "detectron2-model": Convention(rename=_detectron2_model),
    "mcl-released": Convention(rename=_released),
    "soco": Convention(rename=_soco),
    "lightly": Convention(rename=_lightly),
    "mcl": Convention(rename=lambda name: name),
}
"""Conventions, by the prefix that a user may put before the name of a file, such as ``soco:FILE``."""
