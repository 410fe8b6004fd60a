"""Imports the authors' released checkpoints, which are training checkpoints of OpenSelfSup."""

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
"""Backbones by whether blocks have three convolutions, and by the number of blocks in ``layer3``."""

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
"""Patterns in mcl's names, and the authors' replacements."""


def their_name(name: str) -> str:
    """The authors' name of one of mcl's tensors.

    Their encoder is a sequence of backbone (0), FPN (1, finest map first) and region head (2). mcl's encoder names its
    parts, and numbers FPN maps from the coarsest.
    """
    for ours, theirs in _RENAMES:
        name = re.sub(ours, theirs, name)
    return re.sub(r"(\.1\.\w+_convs\.)(\d)", lambda m: f"{m[1]}{_FPN_MAPS - 1 - int(m[2])}", name)


@dataclass(frozen=True)
class ImportReport:
    """Summary of an import; ``str()`` formats it for the console."""

    path: Path
    """The checkpoint written."""
    model: ModelConfig
    """Inferred from the shapes of tensors."""
    levels: int
    mapped: int
    """Number of tensors imported."""
    repeated: int
    """Number of tensors of ``backbone.*`` that are copies of the online backbone's."""
    unplaced: tuple[str, ...]
    """The authors' names of tensors that mcl's model does not have."""
    target_copied: bool
    """Whether the online encoder was copied because the file has no momentum encoder."""

    def __str__(self) -> str:
        model = self.model
        source = "copied from the online network, as the file has none" if self.target_copied else "from the file"
        lines = [
            f"wrote     {self.path}",
            f"model     {model.backbone}, {self.levels} levels, width {model.width}, {model.head_convs} head "
            f"convolutions, hidden {model.hidden}",
            f"tensors   {self.mapped} imported, {self.repeated} copies of the backbone, {len(self.unplaced)} left out",
            *(f"          left out, since mcl has no such tensor: {name}" for name in self.unplaced),
            f"target    {source}",
        ]
        return "\n".join(lines)


def import_file(source: Path, output: Path) -> ImportReport:
    """Converts a checkpoint of the authors' code to one of mcl, for ``model.init`` and ``mcl export``.

    The new checkpoint has step 0. Its configuration is inferred from shapes as far as possible; all other keys have the
    values of the released code.

    Args:
        source: a training checkpoint of the authors' code, or only its ``state_dict``.
        output: file to write.

    Raises:
        CheckpointError: `source` cannot be read or is not MCL of the released code, or `output` cannot be written.
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
    with torch.device("meta"):  # only names and shapes are needed
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
        raise CheckpointError(f"{source}: is already a checkpoint of mcl; it needs no import")
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not is_weights(state):
        raise CheckpointError(
            f"{source}: has no state_dict of tensors; a training checkpoint of the authors' code is needed"
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _infer(state: dict[str, Tensor], source: Path) -> tuple[ModelConfig, Geometry]:
    """Infers model and levels from shapes; keys that shapes do not determine have the values of the released code."""

    def size(name: str) -> int:
        return _tensor(state, name, source).shape[:1].numel()

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in state)

    size("encoder_q.0.conv1.weight")
    blocks = count(r"encoder_q\.0\.layer3\.\d+\.conv1\.weight")
    backbone = _BACKBONES.get(("encoder_q.0.layer1.0.conv3.weight" in state, blocks))
    if backbone is None:
        raise CheckpointError(
            f"{source}: encoder_q.0.layer3 has {blocks} blocks, as in none of {', '.join(_BACKBONES.values())}"
        )
    width = size(f"encoder_q.1.lateral_convs.{_FPN_MAPS - 1}.conv.weight")
    hidden = size("encoder_q.2.mlp.0.weight")
    size("head.predictor.0.mlp.0.weight")
    levels, known = count(r"head\.predictor\.\d+\.mlp\.0\.weight"), Geometry()
    if levels > known.levels:
        raise CheckpointError(f"{source}: head.predictor has {levels} levels; at most {known.levels} can be imported")
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
            f"{source}: its shapes give a width of {width} and {hidden} hidden units, which is not a valid model; a "
            "complete training checkpoint of the authors' MCL is needed"
        ) from None
    return model, Geometry(ratios=known.ratios[:levels], images_per_canvas=known.images_per_canvas[:levels])


def _tensor(state: dict[str, Tensor], name: str, source: Path) -> Tensor:
    if name not in state:
        raise CheckpointError(
            f"{source}: has no {name}; a complete training checkpoint of the authors' MCL is needed, not a backbone, a "
            "detector or another method's checkpoint"
        )
    return state[name]


def _repeats(name: str, state: dict[str, Tensor]) -> bool:
    """Whether a tensor of ``backbone.*`` is a copy of that in ``encoder_q.0.*``."""
    online = name.replace("backbone.", "encoder_q.0.", 1)
    return name.startswith("backbone.") and online in state and torch.equal(state[name], state[online])
