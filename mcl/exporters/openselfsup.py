"""The authors' released checkpoint format (an OpenSelfSup training checkpoint) to ours."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dali_pipelines.geometry import Geometry
from mcl.config import Config, DataConfig, ModelConfig, OptimConfig, TrainerConfig, to_dict
from mcl.exporters.files import write
from mcl.objectives import MCL
from mcl.train import checkpoint
from mcl.train.checkpoint import FORMAT, CheckpointError, is_weights
from mcl.weights import files

_FPN_MAPS = 4
_BACKBONES = {(False, 2): "resnet18", (False, 6): "resnet34", (True, 6): "resnet50", (True, 23): "resnet101"}
"""By whether its blocks have three convolutions, and the number of blocks in ``layer3``."""

_RENAMES = (
    (r"^predictors\.(\d)", r"head.predictor.\1.mlp"),
    (r"^online\.", "encoder_q."),
    (r"^target\.", "encoder_k."),
    (r"\.backbone\.", ".0."),
    (r"\.fpn\.laterals\.", ".1.lateral_convs."),
    (r"\.fpn\.outputs\.", ".1.fpn_convs."),
    (r"\.head\.convs\.", ".2.cls_convs."),
    (r"\.head\.projector\.", ".2.mlp."),
    (r"\.norm\.", ".bn."),
)
"""Patterns in our names, and what the authors have there."""


def their_name(name: str) -> str:
    """The authors' name of a tensor of ours.

    Their encoder is a sequence of backbone (0), FPN (1, finest map first) and region head (2); ours names the parts,
    and counts FPN maps from the coarsest.
    """
    for ours, theirs in _RENAMES:
        name = re.sub(ours, theirs, name)
    return re.sub(r"(\.1\.\w+_convs\.)(\d)", lambda m: f"{m[1]}{_FPN_MAPS - 1 - int(m[2])}", name)


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
    """Turns a checkpoint of the authors' code into one of ours, for ``model.init`` and ``mcl export``.

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
    with torch.device("meta"):  # names and shapes alone
        own = MCL(config).state_dict()
    copied = not any(name.startswith("encoder_k.") for name in state)
    names = {name: their_name(name.replace("target.", "online.") if copied else name) for name in own}
    weights = {}
    for name, tensor in own.items():
        theirs = _tensor(state, names[name], source)
        if theirs.shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {names[name]} has shape {list(theirs.shape)}, expected {list(tensor.shape)} in a "
                f"{model_config.backbone} of width {model_config.width} and {model_config.hidden} hidden units; only "
                "the released architecture can be imported"
            )
        weights[name] = theirs.to(tensor.dtype)
    content = {"format": FORMAT, "config": to_dict(config), "step": 0, "model": weights}
    write(output, source, lambda file: checkpoint.write(content, file))

    taken = set(names.values())
    others = [name for name in state if name not in taken]
    unplaced = tuple(name for name in others if not _repeats(name, state))
    repeated = len(others) - len(unplaced)
    return ImportReport(output, model_config, geometry.levels, len(taken), repeated, unplaced, copied)


def _read(source: Path) -> dict[str, Tensor]:
    """The ``state_dict`` in a file, without DDP's prefix."""
    content = files.load(source)
    if isinstance(content, dict) and "model" in content and "format" in content:
        raise CheckpointError(f"{source}: is a checkpoint of mcl already; use it as it is")
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not is_weights(state):
        raise CheckpointError(
            f"{source}: holds no state_dict of tensors; expected a training checkpoint of the authors"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _infer(state: dict[str, Tensor], source: Path) -> tuple[ModelConfig, Geometry]:
    """Model and levels that the shapes tell of; what the two leave open is the released configuration's."""

    def size(name: str) -> int:
        return _tensor(state, name, source).shape[:1].numel()

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in state)

    size("encoder_q.0.conv1.weight")
    blocks = count(r"encoder_q\.0\.layer3\.\d+\.conv1\.weight")
    backbone = _BACKBONES.get(("encoder_q.0.layer1.0.conv3.weight" in state, blocks))
    if backbone is None:
        raise CheckpointError(
            f"{source}: {blocks} blocks under encoder_q.0.layer3 belong to none of {', '.join(_BACKBONES.values())}"
        )
    width = size(f"encoder_q.1.lateral_convs.{_FPN_MAPS - 1}.conv.weight")
    hidden = size("encoder_q.2.mlp.0.weight")
    size("head.predictor.0.mlp.0.weight")
    levels, known = count(r"head\.predictor\.\d+\.mlp\.0\.weight"), Geometry()
    if levels > known.levels:
        raise CheckpointError(f"{source}: {levels} levels under head.predictor, at most {known.levels} can be imported")
    try:
        model = ModelConfig(
            backbone=backbone,  # type: ignore[arg-type]
            width=width,
            head_convs=count(r"encoder_q\.2\.cls_convs\.\d+\.conv\.weight"),
            hidden=hidden,
            compute="released",
            loss_weights=ModelConfig().loss_weights[:levels],
        )
    except ValueError:
        raise CheckpointError(
            f"{source}: width {width} and {hidden} hidden units, as its shapes have it, are no model's; expected a "
            "whole training checkpoint of the authors' MCL"
        ) from None
    return model, Geometry(ratios=known.ratios[:levels], images_per_canvas=known.images_per_canvas[:levels])


def _tensor(state: dict[str, Tensor], name: str, source: Path) -> Tensor:
    if name not in state:
        raise CheckpointError(
            f"{source}: lacks {name}; expected a whole training checkpoint of the authors' MCL, not a backbone, a "
            "detector's weights or another method's"
        )
    return state[name]


def _repeats(name: str, state: dict[str, Tensor]) -> bool:
    """Whether ``backbone.*`` holds the same as ``encoder_q.0.*``."""
    online = name.replace("backbone.", "encoder_q.0.", 1)
    return name.startswith("backbone.") and online in state and torch.equal(state[name], state[online])
