"""Layers of PyTorch that compute the same in another way where that is faster: all on CPUs."""

from torch import nn

from mcl.models.conv import Conv2d
from mcl.models.linear import Linear
from mcl.models.norm import BatchNorm1d, BatchNorm2d

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.Linear: Linear,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def use(model: nn.Module, ours: bool = True, *kinds: type[nn.Module]) -> None:
    """Makes the layers of `model` ours, or PyTorch's, in place; torchvision's ResNet creates its own.

    Convolutions must be such as :class:`~mcl.models.conv.Conv2d` computes.

    Args:
        kinds: PyTorch's classes of the layers to change; without them all are.
    """
    for module in model.modules():
        theirs = _THEIRS.get(type(module), type(module))
        if theirs in _OURS and (not kinds or theirs in kinds):
            module.__class__ = _OURS[theirs] if ours else theirs
