"""Sections ``data`` and ``augment`` of the configuration: location of the images, and augmentation.

The string under a field is its documentation, which ``mcl pretrain --help`` prints.
"""

import os
from enum import Enum
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
"""For every section: unknown keys, infinity and NaN are errors; the strings under fields are their documentation."""


class Trait(Enum):
    """A property of a key, in the annotation of its field or of its section."""

    RESUMABLE = "may have another value when a run is resumed: it does not change what is computed"
    PATH = "names a file or folder; ~ is the home folder"
    OF_A_MACHINE = "may differ between the machines of a run"
    DECIDES_SPEED = "changes how long a step takes"
    AT_START = "is used only when a new run starts"


def can_be_named(name: str) -> bool:
    """Whether `name` is a legal file name or path."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON and YAML can contain
        return False


class ConfigError(ValueError):
    """An illegal configuration; the message names the key and a remedy."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    root: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """Folder of images, list file, or shards (a folder of shards, one shard, or a pattern such as
    train-{0000..0146}.tar); a path, or a URL that fsspec reads, such as s3://bucket/train. Required."""
    source: Literal["auto", "folders", "flat", "list", "coco", "webdataset", "tfrecord"] = "auto"
    """Kind of root. folders: class folders; flat: a folder of images; list: a text file with a path (and class) per
    line; coco: a folder with COCO annotations; webdataset: tar shards; tfrecord: shards of tf.train.Example."""
    annotations: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """COCO annotation file that lists the images of root; its boxes and categories are not used."""
    allow_outside: Annotated[bool, Trait.RESUMABLE] = False
    """Whether a list or annotation file may name files outside its root's folder, by absolute paths or through .. ."""
    index: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE, Trait.RESUMABLE] = ""
    """Folder for the index of image sizes, so that not all headers are read at every start. Empty: mcl/index in
    $XDG_CACHE_HOME or ~/.cache."""
    val_root: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE, Trait.RESUMABLE] = ""
    """Held-out images for evaluations, with the layout of root (for COCO: a folder). Setting data.root removes the
    val_root of the preset or file, unless it is set as well."""
    engine: Literal["auto", "fused", "stock", "torchvision"] = "auto"
    """Library that decodes and augments. fused: mcl's own DALI operator; stock: DALI's operators; torchvision: slow,
    needs no DALI. auto: the first of these that is available."""
    device: Annotated[Literal["auto", "cpu", "gpu"], Trait.RESUMABLE] = "auto"
    """Device that decodes and augments. auto: the fused engine uses the CPU if there are at least 8 loader threads per
    GPU, or no GPU, and the GPU otherwise; the stock engine uses the GPU if there is one."""
    threads: Annotated[int, Trait.OF_A_MACHINE, Trait.RESUMABLE] = Field(default=0, ge=0, le=4096)
    """Loader threads per process. 0: the number of available cores, divided by the processes of this machine."""
    prefetch: Annotated[int, Trait.RESUMABLE] = Field(default=2, ge=1, le=1000)
    """Number of batches that are prepared in advance; also the most steps that the host may be ahead of the GPU."""
    hardware_decoder: Annotated[float, Trait.RESUMABLE] = Field(default=0.65, ge=0, le=1)
    """Share of the JPEGs that the hardware decoder of a GPU decodes, if it has one; its other cores decode the rest."""
    dtype: Literal["auto", "float32", "float16"] = "auto"
    """Data type of the images that the network gets. auto: float16, which halves their memory, in training with
    trainer.precision bf16 or fp16, and float32 otherwise."""
    tile_sampling: Literal["direct", "released"] = "direct"
    """direct: crop and rescale to the size of the tile, and scale the blur. released: augment at canvas size, then take
    every r-th pixel, as in the authors' code."""
    max_bad_fraction: Annotated[float, Trait.RESUMABLE] = Field(default=0.01, ge=0, le=1)
    """Largest fraction of images that may be broken. They are replaced and listed; if there are more, the run ends."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop window as a fraction of the image's, lower and upper bound."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop window, lower and upper bound."""
    shared_crop: bool = False
    """Whether all levels of a view use the crop window of level 0. Otherwise each level has a window of its own, as in
    the authors' code. Flip, colours and blur are drawn per level in either case."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    jitter: float = Field(default=0.8, ge=0, le=1)
    """Probability of colour jitter."""
    brightness: float = Field(default=0.4, ge=0)
    """The brightness factor is drawn from 1 - x to 1 + x."""
    contrast: float = Field(default=0.4, ge=0)
    """The contrast factor is drawn from 1 - x to 1 + x; contrast is relative to the image's mean gray."""
    saturation: float = Field(default=0.2, ge=0)
    """The saturation factor is drawn from 1 - x to 1 + x."""
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """The hue is shifted by -x to x, as a fraction of the colour circle."""
    gray: float = Field(default=0.2, ge=0, le=1)
    """Probability of grayscale."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur, for the query and the key view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Blur sigma in canvas pixels, lower and upper bound; a tile of ratio r gets sigma / r."""
    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability of solarising at threshold 128, for the query and the key view."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the RGB channels (0..1), which is subtracted."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the RGB channels, by which they are then divided."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: {low}, {high} must satisfy 0 < lower <= upper")
        for name in ("blur", "solarize"):
            if not all(0 <= p <= 1 for p in getattr(self, name)):
                raise ValueError(f"{name}: probabilities must be between 0 and 1")
        return self
