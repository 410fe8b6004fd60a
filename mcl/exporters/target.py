"""Description of an export target."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mcl.config import Config, ModelConfig
from mcl.exporters.files import Pack, Save, Weights

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FIRST_SHORTCUT = "a ResNet-D of 18 or 34 layers has a convolution in its first shortcut only in RT-DETR"


@dataclass(frozen=True)
class Twin:
    """One of the target's own models, with which exports are verified."""

    package: str
    """Name of the distribution."""
    install: str
    """Command that installs the package."""
    build: Callable[[ModelConfig], Any]
    """Builds the model from our configuration; imports the package."""
    forward: Mapping[str, Callable[[Any, Any], Sequence[Tensor]]]
    """By part, a function of the model and the part's input. The backbone computes C2 to C5 from the image, the FPN the
    target's maps from C2 to C5, the head the map of its last convolution from P5. Maps are (n, channels, h, w), finest
    first."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Names and order of values of our tensors in a library or in a method's checkpoints, for writing and reading."""

    rename: Callable[[str], str | None]
    """Canonical name to the library's; None if the library has no such tensor."""
    renames: Mapping[str, Callable[[str], str | None]] = field(default_factory=dict)
    """By backbone, a function like `rename` for the backbone's names without ``backbone.body.``."""
    adapt: Callable[[Weights], Weights] = lambda weights: weights
    """Converts tensors, given by the library's names, to the shapes, order and values that its modules need."""
    restore: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    """Undoes `adapt` for one tensor, except for its shape."""

    def name_of(self, canonical: str, backbone: str) -> str | None:
        """The library's name of a tensor of a model with this backbone; None if the library has no such tensor."""
        start = "backbone.body."
        if backbone in self.renames and canonical.startswith(start):
            return self.renames[backbone](canonical.removeprefix(start))
        return self.rename(canonical)


@dataclass(frozen=True, kw_only=True)
class Target(Convention):
    """A library, or a family of its models, that reads exported weights."""

    name: str
    parts: Mapping[str, str]
    """Parts of the model that it reads; by part, a regular expression for the start of its tensors' names in the
    target. A verified export has all tensors of the target's model that match, and no others."""
    saves: Mapping[str, Save] = field(default_factory=dict)
    """Functions that write a file, by the file's ending; the first one is the default."""
    pack: Pack | None = None
    """Replaces `saves` for a target that reads a folder."""
    usage: Callable[[str, str], str]
    """Lines of code or configuration that load an export, given its path and ``model.backbone``."""
    twins: Sequence[Twin] = ()
    """Models of the target that verify exports; empty for a library that is on no package index."""
    backbones: Collection[str] = RESNETS
    """Values of ``model.backbone`` that the target supports."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By backbone, height and width of the image that verifies an export, if the model restricts the size."""
    lacks: str = ""
    """Why other backbones are not supported."""
    describe: Callable[[Config, Path, int], Mapping[str, Any]] = lambda config, path, step: {}
    """Returns more metadata, given the run's configuration, the checkpoint's path and its step."""
    classifies: bool = False
    """Whether exports may have a classifier of region features."""
    freezes: bool = False
    """Whether its detectors freeze BatchNorm's running statistics by default."""
    maps: tuple[int, ...] = (2, 3, 4, 5)
    """Maps of the FPN that it reads; 2 is P2."""
    check: Callable[[ModelConfig, Sequence[str]], None] = lambda config, parts: None
    """Raises ConfigError for a model that cannot be exported to the target, for instance because of other shapes."""
