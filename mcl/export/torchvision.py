"""The online backbone as a state dict of torchvision's ResNets."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from mcl import checkpoint
from mcl.checkpoint import CheckpointError
from mcl.export.common import Report, default_path, write
from mcl.models import MCL

_CLASSIFIER = ("fc.weight", "fc.bias")
_TOLERANCE = 1e-6


def export(model: MCL) -> dict[str, Tensor]:
    """State dict for ``torchvision.models.<model.backbone>``; only ``fc.weight`` and ``fc.bias`` are missing."""
    return {name: tensor.detach().contiguous().clone() for name, tensor in model.online.backbone.state_dict().items()}


def export_file(checkpoint_file: Path, output: Path | None = None) -> Report:
    """Writes the online backbone of a checkpoint for torchvision, once it is proved to compute the same there.

    Args:
        checkpoint_file: checkpoint of mcl.
        output: file to write; by default ``<run folder>/exports/torchvision.pth``, or ``<stem>.torchvision.pth`` next
            to a checkpoint that lies in no run folder.

    Raises:
        CheckpointError: the checkpoint cannot be read, its features differ there, or `output` cannot be written.
    """
    model, config = checkpoint.load_model(checkpoint_file)
    weights = export(model)
    theirs: nn.Module = getattr(models, config.model.backbone)()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    if set(missing) != set(_CLASSIFIER) or unexpected:
        raise CheckpointError(
            f"{checkpoint_file}: does not fit torchvision's {config.model.backbone}: missing {missing}, unexpected "
            f"{unexpected}; install the torchvision that pairs with your torch (mcl doctor shows it)"
        )
    difference = _difference(model, theirs)
    if not difference <= _TOLERANCE:  # NaN too
        raise CheckpointError(
            f"{checkpoint_file}: features differ by {difference:g} in torchvision; NaN means that the weights are not "
            "finite: export an earlier checkpoint of the run"
        )
    path = output or default_path(checkpoint_file, "torchvision.pth")
    write(weights, path, checkpoint_file)
    parts = {"fpn": model.online.fpn, "head": model.online.head, "predictors": model.predictors, "target": model.target}
    unmapped = {part: len(module.state_dict()) for part, module in parts.items()}
    return Report(path, len(weights), unmapped, tuple(missing), difference)


@torch.no_grad()
def _difference(model: MCL, theirs: nn.Module) -> float:
    """Largest absolute difference between our C5 and torchvision's on a random image, in evaluation mode."""
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    trunk = nn.Sequential(*list(theirs.eval().children())[:-2])  # without average pool and classifier
    c5 = model.online.backbone.eval()(image)[0]
    return float((trunk(image) - c5).abs().max())
