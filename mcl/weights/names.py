"""How others name the tensors of a backbone, an FPN and a region head: canonical names to theirs.

Whatever `mcl export` writes is read by the same mapping, backwards. Networks within networks, as ``encoder_q.`` of
MoCo's or ``backbone.`` of a classifier, need none: what stands before a name is found by
:func:`mcl.weights.read.take`.
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
    """A whole detector with an FPN; ours are endings of these names."""
    theirs = detectron2.rename(name)
    return None if theirs is None else _DETECTRON2[part(name)] + theirs


def _released(name: str) -> str | None:
    """The authors' checkpoints: a sequence of MMDetection's backbone, FPN and convolutions."""
    theirs = RCNN.rename(name)
    for ours, number in (("backbone.", "0."), ("neck.", "1."), ("roi_head.bbox_head.shared_convs.", "2.cls_convs.")):
        theirs = theirs and theirs.replace(ours, number, 1)
    return theirs


def _soco(name: str) -> str | None:
    """MMDetection's backbone and FPN, and a head of its own."""
    if match := re.fullmatch(r"roi_heads\.box_head\.(\d+)\.([01])\.(\w+)", name):
        return f"head.{('conv', 'bn')[int(match[2])]}{int(match[1]) + 1}.{match[3]}"
    theirs = RCNN.rename(name)
    return theirs and theirs.replace("backbone.", "encoder.", 1)


def _lightly(name: str) -> str:
    """``nn.Sequential(*resnet.children())``, whose parts are numbered."""
    return re.sub(r"^backbone\.body\.(\w+)", lambda m: _CHILDREN.get(m[1], m[1]), name)


CONVENTIONS: dict[str, Convention] = {
    # ultralytics' detectors were trained with another activation, input and epsilon of BatchNorm.
    **{name: target for name, target in TARGETS.items() if name != "ultralytics-rtdetr"},
    "detectron2-model": Convention(rename=_detectron2_model),
    "mcl-released": Convention(rename=_released),
    "soco": Convention(rename=_soco),
    "lightly": Convention(rename=_lightly),
    "mcl": Convention(rename=lambda name: name),
}
"""By the name that a user may put before that of a file."""
