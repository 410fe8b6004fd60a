"""What the loader takes from a run's configuration: where the images are, and what is done to them.

The string under a field is its documentation; ``mcl pretrain --help`` prints exactly these.
"""

import os
from enum import Enum
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)
"""Of every section: unknown keys, infinity and NaN are errors, and the strings under fields are their documentation."""


class Trait(Enum):
    """What a key is, whatever its value; stands in the annotation of its field, or of the section around it."""

    RESUMABLE = "may have another value when a run is resumed: it does not change what is computed"
    PATH = "names a file or folder; ~ is the home folder"
    OF_A_MACHINE = "may differ between the machines of a run"
    DECIDES_SPEED = "changes how long a step takes"
    AT_START = "is used when a new run starts, and then no more"


def can_be_named(name: str) -> bool:
    """Whether a file can have this name, or path."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character, as JSON and YAML can write it
        return False


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what would be right."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    root: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """Folder of images, list file, or shards (a folder of them, one, or a pattern such as train-{0000..0146}.tar); on a
    disk, or a URL that fsspec reads, such as s3://bucket/train. Required."""
    source: Literal["auto", "folders", "flat", "list", "coco", "webdataset", "tfrecord"] = "auto"
    """What root is: a folder of class folders, a flat folder, a text file with a path (and class) per line, a folder
    with COCO annotations, tar shards as WebDataset makes them, or TFRecord shards of tf.train.Example."""
    annotations: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """COCO annotation file that names the images of root; boxes and categories in it are not used."""
    allow_outside: Annotated[bool, Trait.RESUMABLE] = False
    """Whether a list or annotation file may name files outside its root's folder, by absolute paths or through .. ."""
    index: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE, Trait.RESUMABLE] = ""
    """Folder of the indices of image sizes, which save reading all headers at every start; empty: mcl/index in
    $XDG_CACHE_HOME or ~/.cache."""
    val_root: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE, Trait.RESUMABLE] = ""
    """Held-out images, same layout (for COCO: a folder); the end-of-run evaluation uses them when given.
    Setting data.root leaves out the val_root of the preset or file, unless it is set as well."""
    engine: Literal["auto", "fused", "stock", "torchvision"] = "auto"
    """What carries the augmentation plan out: mcl's own DALI operator, stock DALI operators, or torchvision (slow,
    needs no DALI). auto takes the first that is there, on a CPU or a GPU."""
    device: Annotated[Literal["auto", "cpu", "gpu"], Trait.RESUMABLE] = "auto"
    """Where images are decoded and augmented. auto: the fused engine runs on the CPU where there are at least 8 loader
    threads per GPU, or no GPU, and else on the GPU; the stock engine on the GPU, if there is one."""
    threads: Annotated[int, Trait.OF_A_MACHINE, Trait.RESUMABLE] = Field(default=0, ge=0, le=4096)
    """Loader threads per process; 0 takes the cores available, divided by the processes of this machine."""
    prefetch: Annotated[int, Trait.RESUMABLE] = Field(default=2, ge=1, le=1000)
    """Batches that are prepared in advance; also the most steps that the host may be ahead of the GPU."""
    hardware_decoder: Annotated[float, Trait.RESUMABLE] = Field(default=0.65, ge=0, le=1)
    """Share of the JPEGs that a GPU's decoding engine takes, where it has one; its other cores take the rest."""
    dtype: Literal["auto", "float32", "float16"] = "auto"
    """Element type of the images handed to the network; auto takes float16, half the memory, in training where
    trainer.precision is bf16 or fp16, and float32 elsewhere."""
    tile_sampling: Literal["direct", "released"] = "direct"
    """direct: crop and rescale straight to the tile's size, blur scaled with it. released: augment at canvas size, then
    take every r-th pixel, as the authors' code does."""
    max_bad_fraction: Annotated[float, Trait.RESUMABLE] = Field(default=0.01, ge=0, le=1)
    """Stop when more than this fraction of the images cannot be decoded; below it they are replaced and listed."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the crop window as a fraction of the image's, lower and upper bound."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop window, lower and upper bound."""
    shared_crop: bool = False
    """All levels of a view see the same crop window of an image, that of level 0. Off, each level has its own, as
    released. Flip, colours and blur are drawn per level all the same."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    jitter: float = Field(default=0.8, ge=0, le=1)
    """Probability of colour jitter."""
    brightness: float = Field(default=0.4, ge=0)
    """Brightness factor is drawn from 1 - x to 1 + x."""
    contrast: float = Field(default=0.4, ge=0)
    """Contrast factor is drawn from 1 - x to 1 + x; the pivot is the image's mean gray."""
    saturation: float = Field(default=0.2, ge=0)
    """Saturation factor is drawn from 1 - x to 1 + x."""
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """Hue is shifted by -x to x turns."""
    gray: float = Field(default=0.2, ge=0, le=1)
    """Probability of grayscale."""
    blur: tuple[float, float] = (1.0, 0.1)
    """Probability of Gaussian blur, for the query and the key view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Blur sigma in canvas pixels, lower and upper bound; a tile of ratio r gets sigma / r."""
    solarize: tuple[float, float] = (0.0, 0.2)
    """Probability of solarising at threshold 128, for the query and the key view."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the RGB channels (0..1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Then divides them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("crop_scale", "crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: {low}, {high} must satisfy 0 < lower <= upper")
        for name in ("blur", "solarize"):
            if not all(0 <= p <= 1 for p in getattr(self, name)):
                raise ValueError(f"{name}: probabilities lie between 0 and 1")
        return self
