"""What an export target is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mcl.config import Config, ModelConfig
from mcl.exporters.files import Pack, Save, Weights

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
FIRST_SHORTCUT = "a ResNet-D of 18 or 34 layers has a convolution in its first shortcut in RT-DETR alone"


@dataclass(frozen=True)
class Twin:
    """A model of the target's own, which proves an export."""

    package: str
    """Name of the distribution."""
    install: str
    """Command that installs it."""
    build: Callable[[ModelConfig], Any]
    """Makes the model from our configuration; imports the package."""
    forward: Mapping[str, Callable[[Any, Any], Sequence[Tensor]]]
    """What each part of a model computes: the backbone C2 to C5 from the image, the FPN the target's maps from C2 to
    C5, the head the last convolution's map from P5. Maps are (n, channels, h, w), finest first."""


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a library, or a method's checkpoints, name and order our tensors; for writing as well as for reading."""

    rename: Callable[[str], str | None]
    """Canonical name to theirs; None where they have no place for it."""
    renames: Mapping[str, Callable[[str], str | None]] = field(default_factory=dict)
    """By backbone: as `rename`, for the names that its tensors have without ``backbone.body.``."""
    adapt: Callable[[Weights], Weights] = lambda weights: weights
    """Values, by their names, for modules that compute otherwise than ours."""
    restore: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    """Undoes `adapt` for one tensor, but for its shape."""

    def name_of(self, canonical: str, backbone: str) -> str | None:
        """Their name of a tensor of a model with that backbone; None where they have no place for it."""
        start = "backbone.body."
        if backbone in self.renames and canonical.startswith(start):
            return self.renames[backbone](canonical.removeprefix(start))
        return self.rename(canonical)


@dataclass(frozen=True, kw_only=True)
class Target(Convention):
    """A library, or a family of its models, as a reader of our weights."""

    name: str
    parts: Mapping[str, str]
    """Parts of the model that it takes, and regular expressions of the beginnings of their tensors' names there: all
    that match must be in the file."""
    saves: Mapping[str, Save] = field(default_factory=dict)
    """By the ending of a file; the first one is the default."""
    pack: Pack | None = None
    """In place of `saves`, for a target that reads a folder."""
    usage: Callable[[str, str], str]
    """Lines that load an export there, from its path and ``model.backbone``."""
    twins: Sequence[Twin] = ()
    """Models that read the same names; none for a library that no package index has."""
    backbones: Collection[str] = RESNETS
    """Those of ``model.backbone`` that it has a module for."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By backbone: height and width of the image that proves an export, where not any will do."""
    lacks: str = ""
    """Why it has none for the others."""
    describe: Callable[[Config, Path, int], Mapping[str, Any]] = lambda config, path, step: {}
    """More metadata, from the run's configuration, the checkpoint's path, and its step."""
    classifies: bool = False
    """Whether it has a place for a classifier of region features."""
    freezes: bool = False
    """Whether its detectors freeze BatchNorm's running statistics by default."""
    maps: tuple[int, ...] = (2, 3, 4, 5)
    """Maps of the FPN that it takes, 2 is P2."""
    check: Callable[[ModelConfig, Sequence[str]], None] = lambda config, parts: None
    """Raises ConfigError for a model whose parts have other shapes than the target's."""
