"""The authors' released checkpoint format (an OpenSelfSup training checkpoint) to ours."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry
from mcl.config import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig, to_dict
from mcl.export.files import write
from mcl.models import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import FORMAT, CheckpointError, reason

_PREFIXES = {"encoder_q": "online", "encoder_k": "target"}
_FPN_MAPS = 4
_BACKBONES = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
"""By whether its blocks have three convolutions, and the number of blocks in ``layer3``."""
_CONVERT = (
    "python -c \"import torch; c = torch.load('{}', map_location='cpu', weights_only=False); "
    "torch.save({{'state_dict': c['state_dict']}}, 'plain.pth')\""
)


def our_name(name: str) -> str | None:
    """Our name of a tensor of the authors' ``state_dict``; None if it repeats another (``backbone.*``) or is unknown.

    Their encoder is a sequence of backbone (0), FPN (1, finest map first) and region head (2); ours names the parts,
    and counts FPN maps from the coarsest.
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


def their_name(name: str) -> str:
    """The authors' name of a tensor of ours: the inverse of :func:`our_name`."""
    if name.startswith("predictors."):
        return re.sub(r"^predictors\.(\d+)", r"head.predictor.\1.mlp", name)
    network, part, rest = name.split(".", 2)
    prefix = {ours: theirs for theirs, ours in _PREFIXES.items()}[network]
    if part == "backbone":
        return f"{prefix}.0.{rest}"
    if rest.startswith("projector."):
        return f"{prefix}.2.{rest.replace('projector', 'mlp', 1)}"
    kind, index, module, leaf = rest.split(".")
    module = "bn" if module == "norm" else "conv"
    if part == "head":
        return f"{prefix}.2.cls_convs.{index}.{module}.{leaf}"
    kind = "lateral_convs" if kind == "laterals" else "fpn_convs"
    return f"{prefix}.1.{kind}.{_FPN_MAPS - 1 - int(index)}.{module}.{leaf}"


def to_ours(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames a ``state_dict``.

    Returns:
        Our state dict, and the names that have no place in it.
    """
    names = {name: our_name(name) for name in state}
    renamed = {ours: state[name] for name, ours in names.items() if ours is not None}
    return renamed, [name for name, ours in names.items() if ours is None]


@dataclass(frozen=True)
class ImportReport:
    """What an import did; ``str()`` of it is meant for the console."""

    path: Path
    """The checkpoint written."""
    model: ModelConfig
    """Read off the shapes."""
    levels: int
    mapped: int
    """Tensors taken over."""
    repeated: int
    """Tensors of ``backbone.*`` that repeat the online backbone's."""
    unplaced: tuple[str, ...]
    """The authors' names that have no place in our model."""
    target_copied: bool
    """Whether the file held no momentum encoder, so that the online one was copied."""

    def __str__(self) -> str:
        model = self.model
        source = "copied from the online network: the file holds none" if self.target_copied else "from the file"
        lines = [
            f"wrote     {self.path}",
            f"model     {model.backbone}, {self.levels} levels, width {model.width}, {model.head_convs} head "
            f"convolutions, hidden {model.hidden}",
            f"tensors   {self.mapped} taken over, {self.repeated} repeat the backbone, {len(self.unplaced)} left out",
            *(f"          left out, as it has no place in mcl: {name}" for name in self.unplaced),
            f"target    {source}",
        ]
        return "\n".join(lines)


def import_file(source: Path, output: Path) -> ImportReport:
    """Turns a checkpoint of the authors' code into one of ours, for ``trainer.init_from`` and ``mcl export``.

    The configuration stored with it (step 0) is read off the shapes where they tell, and is the released one elsewhere.

    Args:
        source: what the authors' training wrote, or a plain ``state_dict`` of it.
        output: file to write.

    Raises:
        CheckpointError: `source` cannot be read or is no MCL of the released code, or `output` cannot be written.
    """
    state = _read(source)
    model_config, geometry = _infer(state, source)
    config = Config(
        data=DataConfig(tile_sampling="released"),
        montage=geometry,
        model=model_config,
        optim=OptimConfig(exclude="released"),
        trainer=TrainerConfig(precision="fp16"),
    )
    weights, unknown = to_ours(state)
    copied = not any(name.startswith("target.") for name in weights)
    if copied:
        weights |= {f"target.{n.removeprefix('online.')}": t for n, t in weights.items() if n.startswith("online.")}
    with torch.device("meta"):  # names and shapes alone
        own = MCL(model_config, geometry).state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise CheckpointError(_lacks(source, their_name(name)))
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {their_name(name)} has shape {list(weights[name].shape)}, expected {list(tensor.shape)} in "
                f"a {model_config.backbone} of width {model_config.width} and {model_config.hidden} hidden units; only "
                "the released architecture can be imported"
            )
    placed = {name: weights[name].to(tensor.dtype) for name, tensor in own.items()}
    content = {"format": FORMAT, "config": to_dict(config), "step": 0, "model": placed}
    write(output, source, lambda file: checkpoint.write(content, file))

    repeated = {name for name in unknown if _repeats(name, state)}
    taken = {name for name in state if our_name(name) in own}
    unplaced = tuple(name for name in state if name not in taken | repeated)
    return ImportReport(output, model_config, geometry.levels, len(taken), len(repeated), unplaced, copied)


def _read(source: Path) -> dict[str, Tensor]:
    """The ``state_dict`` in a file, without DDP's prefix."""
    try:
        content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot read ({error.strerror})") from None
    except Exception as error:  # half a file fails in the zip reader, the unpickler or the tensor reader
        if obstacle := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{source}: holds an object of {obstacle[1]} beside its tensors, and loading that could run code. If "
                f"you trust the file, keep its tensors alone with\n    {_CONVERT.format(source)}\nand import plain.pth"
            ) from None
        raise CheckpointError(
            f"{source}: cut short, or not written by torch.save ({reason(error)}); compare its size with the original's"
        ) from error
    if isinstance(content, dict) and "model" in content and "format" in content:
        raise CheckpointError(f"{source}: is a checkpoint of mcl already; use it as it is")
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(
            f"{source}: holds no state_dict of tensors; expected a training checkpoint of the authors"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _infer(state: dict[str, Tensor], source: Path) -> tuple[ModelConfig, Geometry]:
    """Model and levels that the shapes tell of; what the two leave open is the released configuration's."""

    def size(name: str) -> int:
        if name not in state:
            raise CheckpointError(_lacks(source, name))
        return len(state[name])

    def count(pattern: str) -> int:
        """How many of the names with a running index 0, 1, ... there are."""
        index = 0
        while pattern.format(index) in state:
            index += 1
        return index

    size("encoder_q.0.conv1.weight")
    blocks = count("encoder_q.0.layer3.{}.conv1.weight")
    backbone = _BACKBONES.get(("encoder_q.0.layer1.0.conv3.weight" in state, blocks))
    if backbone is None:
        raise CheckpointError(
            f"{source}: {blocks} blocks under encoder_q.0.layer3 belong to none of {', '.join(_BACKBONES.values())}"
        )
    width = size(f"encoder_q.1.lateral_convs.{_FPN_MAPS - 1}.conv.weight")
    hidden = size("encoder_q.2.mlp.0.weight")
    size("head.predictor.0.mlp.0.weight")
    levels, known = count("head.predictor.{}.mlp.0.weight"), Geometry()
    if levels > known.levels:
        raise CheckpointError(f"{source}: {levels} levels under head.predictor, at most {known.levels} can be imported")
    model = ModelConfig(
        backbone=backbone,  # type: ignore[arg-type]
        width=width,
        head_convs=count("encoder_q.2.cls_convs.{}.conv.weight"),
        hidden=hidden,
        compute="released",
        loss_weights=ModelConfig().loss_weights[:levels],
    )
    return model, Geometry(ratios=known.ratios[:levels], images_per_canvas=known.images_per_canvas[:levels])


def _lacks(source: Path, name: str) -> str:
    return (
        f"{source}: lacks {name}; expected a whole training checkpoint of the authors' MCL, not a backbone, "
        "a detector's weights or another method's"
    )


def _repeats(name: str, state: dict[str, Tensor]) -> bool:
    """Whether ``backbone.*`` holds the same as ``encoder_q.0.*``."""
    twin = state.get(name.replace("backbone.", "encoder_q.0.", 1)) if name.startswith("backbone.") else None
    return twin is not None and torch.equal(state[name], twin)
