"""Pre-trained weights: read, renamed, and held against the detector that is to get them."""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from torch import Tensor

from mcl.config import ConfigError
from mcl.exporters import export
from mcl.exporters.convert import TARGETS
from mcl.finetune.hooks import LoadWeights
from mcl.train.checkpoint import CheckpointError, is_weights, reason


def load(
    path: Path, model: Mapping[str, Any], target: str, renames: Sequence[Any], names: Sequence[str]
) -> LoadWeights:
    """Reads weights and selects those that a detector is to start from.

    Args:
        path: checkpoint of mcl, or a file that ``mcl export`` made of one; any other state dict whose names fit will
            do, too.
        model: configuration of the detector.
        target: of ``mcl export`` that names tensors as the detector does.
        renames: (regular expression, replacement) for names.
        names: regular expressions of the beginnings of the detector's tensors that must all be there.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing or of another shape.
        ConfigError: `names` are not of this detector, or ask for parts that the checkpoint does not have.
    """
    own = build(model).state_dict()
    expected = _expected(own, names)
    weights = _read(path, target, expected)
    for pattern, replacement in renames:
        weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
    missing = [name for name in expected if name not in weights]
    other = [name for name in expected if name in weights and weights[name].shape != own[name].shape]
    if missing or other:
        what = [f"{len(missing)} are missing, the first: {missing[0]}"] if missing else []
        if other:
            shapes = f"{list(weights[other[0]].shape)} instead of {list(own[other[0]].shape)}"
            what.append(f"{len(other)} are of another shape, the first: {other[0]}, {shapes}")
        raise CheckpointError(
            f"weights: of the {len(expected)} tensors that the detector takes, {path} has "
            f"{len(expected) - len(missing) - len(other)}; {'; '.join(what)}. Take weights of this backbone, width and "
            f"head, exported --to {target}, or set pretrained.names to what is to be loaded"
        )
    parts = Counter(name.partition(".")[0] for name in expected)
    summary = (
        f"{path}: {len(expected)} of the detector's {len(own)} tensors "
        f"({', '.join(f'{part} {count}' for part, count in parts.items())}); {len(own) - len(expected)} keep their "
        "initial values"
    )
    return LoadWeights({name: weights[name] for name in expected}, summary)


def _expected(own: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """The detector's tensors that are to be loaded."""
    for pattern in names or [""]:
        if not pattern or not any(re.match(pattern, name) for name in own):
            begins = ", ".join(dict.fromkeys(rf"{name.partition('.')[0]}\." for name in own))
            raise ConfigError(
                f"pretrained.names: {pattern or 'empty'}, but no tensor of the detector begins so; they begin with "
                f"{begins}. Leave weights out to train from scratch"
            )
    return [name for name in own if any(re.match(pattern, name) for pattern in names)]


def _read(path: Path, target: str, expected: Sequence[str]) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"weights: {path} does not exist") from None
    except Exception as error:  # half a file fails in the zip reader, the unpickler or the tensor reader
        raise CheckpointError(f"weights: {path} is incomplete or holds no weights ({reason(error)})") from error
    if isinstance(state, dict) and {"format", "config", "model"} <= state.keys():
        takes = TARGETS[target].parts
        parts = [part for part in takes if any(re.match(takes[part], name) for name in expected)]
        try:
            with tempfile.TemporaryDirectory() as folder:
                return dict(export(path, target, parts=parts, output=Path(folder) / "weights.pth").weights)
        except ConfigError as error:
            cause = str(error).removeprefix("--parts: ")
            raise ConfigError(f"pretrained.names: asks {path} for its {', '.join(parts)}: {cause}") from None
    weights = state.get("state_dict", state) if isinstance(state, dict) else None
    if not is_weights(weights):
        raise CheckpointError(f"weights: {path} holds no weights; take a checkpoint of mcl or an export --to {target}")
    return dict(weights)


def build(model: Mapping[str, Any]) -> Any:
    """A detector without memory, where it can be made so, of which names and shapes can be asked."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        try:
            with torch.device("meta"):
                return MODELS.build(model)
        except RuntimeError:  # Swin and ConvNeXt read what they compute
            return MODELS.build(model)
