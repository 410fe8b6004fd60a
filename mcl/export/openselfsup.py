"""The authors' released checkpoint format (an OpenSelfSup training checkpoint) to ours."""

import re

from torch import Tensor

_PREFIXES = {"encoder_q": "online", "encoder_k": "target"}
_FPN_MAPS = 4


def our_name(name: str) -> str | None:
    """Our name of a tensor of the authors' ``state_dict``; None where it repeats another (``backbone.*``) or is unknown.

    Their encoder is a sequence of backbone (0), FPN (1, finest map first) and region head (2); ours names the parts, and
    counts FPN maps from the coarsest.
    """
    if match := re.fullmatch(r"head\.predictor\.(\d+)\.mlp\.(.+)", name):
        return f"predictors.{match[1]}.{match[2]}"
    match = re.fullmatch(r"(encoder_[qk])\.(\d)\.(.+)", name)
    if match is None:
        return None
    prefix, part, rest = _PREFIXES[match[1]], match[2], match[3]
    if part == "0":
        return f"{prefix}.backbone.{rest}"
    if part == "1" and (fpn := re.fullmatch(r"(lateral|fpn)_convs\.(\d)\.(conv|bn)\.(.+)", rest)):
        kind = "laterals" if fpn[1] == "lateral" else "outputs"
        module = "norm" if fpn[3] == "bn" else "conv"
        return f"{prefix}.fpn.{kind}.{_FPN_MAPS - 1 - int(fpn[2])}.{module}.{fpn[4]}"
    if part == "2" and (conv := re.fullmatch(r"cls_convs\.(\d+)\.(conv|bn)\.(.+)", rest)):
        return f"{prefix}.head.convs.{conv[1]}.{'norm' if conv[2] == 'bn' else 'conv'}.{conv[3]}"
    if part == "2" and (mlp := re.fullmatch(r"mlp\.(.+)", rest)):
        return f"{prefix}.head.projector.{mlp[1]}"
    return None


def to_ours(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames a ``state_dict``.

    Returns:
        Our state dict, and the names that have no place in it.
    """
    names = {name: our_name(name) for name in state}
    renamed = {ours: state[name] for name, ours in names.items() if ours is not None}
    return renamed, [name for name, ours in names.items() if ours is None]
