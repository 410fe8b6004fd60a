"""Verifies an export: the target's own models load it, with no missing tensor, and compute the same features."""

import copy
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from mcl.config import ConfigError, ModelConfig
from mcl.exporters.summary import Verified
from mcl.exporters.target import Target
from mcl.models import Encoder, GlobalEncoder
from mcl.train.checkpoint import CheckpointError

_TOLERANCE = 1e-5


@torch.no_grad()
def verify(
    target: Target,
    weights: Mapping[str, Tensor],
    parts: Sequence[str],
    encoder: Encoder | GlobalEncoder,
    config: ModelConfig,
) -> Verified:
    """Loads weights into the target's own models and compares their features with the encoder's.

    Args:
        weights: the exported tensors, by the target's names.
        parts: the exported parts of the model.
        encoder: the encoder from which the weights come. Norms of maps that the target does not have are removed from a
            copy before the comparison.

    Raises:
        ConfigError: the target's library is not installed, or is on no package index.
        CheckpointError: a tensor is missing, unexpected or of another shape in the target, or features differ.
    """
    if not target.twins:
        raise ConfigError(f"--verify: {target.name} is on no package index, so it is not tested; remove the option")
    encoder = copy.deepcopy(encoder).eval()
    for i in range(4):
        if config.backbone in target.renames and not target.renames[config.backbone](f"norms.{i}.weight"):
            encoder.backbone.set_submodule(f"norms.{i}", nn.Identity(), strict=True)
    inputs, ours = _features(encoder, target.maps, target.sizes.get(config.backbone, (96, 64)))
    difference, models, fresh = 0.0, [], dict[str, None]()
    for twin in target.twins:
        try:
            theirs: nn.Module = twin.build(config).eval()
        except (ImportError, AssertionError) as error:  # AssertionError: unsupported version of mmcv
            raise ConfigError(f"--verify: needs {twin.package} ({error}); install it: {twin.install}") from None
        models.append(type(theirs).__name__)
        fresh |= dict.fromkeys(_load(theirs, weights, [target.parts[part] for part in parts], target.name))
        for part in parts:
            got = twin.forward[part](theirs, inputs[part])
            for mine, other in zip(ours[part], got, strict=True):
                difference = max(difference, float((other - mine).abs().max() / mine.abs().max()))
                if not difference <= _TOLERANCE:  # NaN too
                    raise CheckpointError(
                        f"--verify: features of the {part} differ by {difference:g} in {models[-1]} of {twin.package} "
                        f"{version(twin.package)}; install the version that mcl is tested with: {twin.install}"
                    )
    return Verified(f"{twin.package} {version(twin.package)}", tuple(models), difference, tuple(fresh))


def _load(theirs: nn.Module, weights: Mapping[str, Tensor], names: Sequence[str], target: str) -> list[str]:
    """Loads weights, which must fit; returns the names of the model's other tensors."""
    own = theirs.state_dict()
    claimed = {name for name in own if any(re.match(pattern, name) for pattern in names)}
    wrong = sorted(claimed ^ weights.keys()) + [n for n in claimed & weights.keys() if own[n].shape != weights[n].shape]
    if wrong:
        raise CheckpointError(
            f"--verify: {len(wrong)} tensors are missing, unexpected or of another shape in {target}, the first: "
            f"{wrong[0]}; this version of the library is probably not one that mcl is tested with"
        )
    theirs.load_state_dict({**own, **weights}, strict=True)
    return [name for name in own if name not in claimed]


def _features(
    encoder: Encoder | GlobalEncoder, maps: Sequence[int], size: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Inputs and outputs of all parts for one random image; `maps` are the wanted maps of the FPN, 2 is P2."""
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    backbone = encoder.backbone(image)  # coarsest first
    if isinstance(encoder, GlobalEncoder):
        return {"backbone": image}, {"backbone": backbone[::-1]}
    levels = range(len(encoder.fpn.depths))
    pyramid = {5 - encoder.fpn.depths[i]: p for i, p in zip(levels, encoder.fpn(backbone, levels), strict=True)}
    head = pyramid[5]
    for conv in encoder.head.convs:
        head = conv(head, relu=True)
    fpn = [pyramid[m] for m in maps if m in pyramid]
    inputs = {"backbone": image, "fpn": backbone[::-1], "head": pyramid[5]}
    return inputs, {"backbone": backbone[::-1], "fpn": fpn, "head": [head]}
