"""The canonical names of an encoder's tensors, which are those of torchvision's detectors.

``backbone.body.*`` is the backbone. ``backbone.fpn.inner_blocks.<map>`` and ``backbone.fpn.layer_blocks.<map>`` are the
lateral and output convolutions of the FPN (map 0 is C2 and P2). ``roi_heads.box_head.<i>`` are the convolutions of the
region head. ``.0`` is a convolution, ``.1`` its BatchNorm. Each target maps its own names to these.
"""

from collections import Counter
from collections.abc import Iterable

from mcl.models import Encoder

PARTS = ("backbone", "fpn", "head")
"""First components of mcl's own names."""
_BEGINNINGS = 6  # of names, in a line
_KINDS = {"laterals": "inner_blocks", "outputs": "layer_blocks"}
_MODULES = {"conv": "0", "norm": "1"}


def canonical_names(encoder: Encoder) -> dict[str, str]:
    """Canonical names of an encoder's tensors, by mcl's own names; the projector has none."""
    names = {}
    for name in encoder.state_dict():
        match name.split("."):
            case ["backbone", *rest]:
                names[name] = ".".join(["backbone.body", *rest])
            case ["fpn", kind, index, module, leaf]:
                depth = encoder.fpn.depths[int(index)] if kind == "outputs" else int(index)  # 0 is C5 and P5
                names[name] = f"backbone.fpn.{_KINDS[kind]}.{3 - depth}.{_MODULES[module]}.{leaf}"
            case ["head", "convs", index, module, leaf]:
                names[name] = f"roi_heads.box_head.{index}.{_MODULES[module]}.{leaf}"
    return names


def part(name: str) -> str:
    """The one of ``PARTS`` that a canonical name belongs to."""
    return "head" if name.startswith("roi_heads.") else "fpn" if name.startswith("backbone.fpn.") else "backbone"


def beginnings(names: Iterable[str]) -> str:
    """How many of the names begin with the same two words; for messages."""
    words = [[word for word in name.split(".") if not word.isdigit()] for name in names]
    counts = Counter(".".join(own[:-1][:2] or own) for own in words).most_common()
    more = [f"{len(counts) - _BEGINNINGS} others"] * (len(counts) > _BEGINNINGS)
    return ", ".join([*(f"{name} ({n})" for name, n in counts[:_BEGINNINGS]), *more]) or "nothing"
