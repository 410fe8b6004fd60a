"""A tree of frozen dataclasses that defines type, default and documentation of every key.

A configuration is read from a YAML preset and changed by ``key=value`` words, e.g. ``optim.base_lr=0.5``. Values of
text keys are used as typed; all other values are YAML. The string under each field is its documentation, which
``mcl pretrain --help`` prints.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

import yaml
from annotated_types import Len
from pydantic import (
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from dali_pipelines.geometry import Geometry, nearest_legal
from dali_pipelines.plan import Plan
from dali_pipelines.settings import STRICT, AugmentConfig, ConfigError, DataConfig, Trait, can_be_named
from mcl.plain_yaml import parse_yaml

__all__ = [
    "DETECTORS",
    "PRESETS",
    "AugmentConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "Key",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainerConfig",
    "Trait",
    "all_keys",
    "changed_keys",
    "from_dict",
    "load",
    "override",
    "schema",
    "to_dict",
    "value",
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    backbone: Literal[
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnet18vd",
        "resnet34vd",
        "resnet50vd",
        "resnet101vd",
        "convnext_t",
        "swin_t",
    ] = "resnet50"
    """Backbone, named as in torchvision; names with vd are the ResNet-D of RT-DETR. ConvNeXt and Swin are trained
    without stochastic depth, and need optim.name=adamw, as in their presets."""
    init: Annotated[str, Trait.PATH, Trait.AT_START] = ""
    """Initial weights of a new run: a checkpoint of mcl, a file of another library (docs/weights.md lists them), or a
    model that a library downloads, such as torchvision:resnet50 or timm:resnet50.a1_in1k. The file must contain the
    whole backbone; FPN and region head are loaded if it contains them, and everything from a checkpoint of mcl with the
    same model. Empty: random weights."""
    width: int = Field(default=256, ge=1, le=2**16)
    """Channels of FPN, region head and embedding."""
    head_convs: int = Field(default=4, ge=0, le=100)
    """Number of 3x3 convolutions in the region head."""
    hidden: int = Field(default=2048, ge=1, le=2**20)
    """Hidden units of projector and predictors."""
    assembly: Literal["montage", "stack"] = "montage"
    """montage: tiles go through backbone and FPN together, on their canvases. stack: every tile goes through them as an
    image of its own size, so that it has no neighbours. Crops, pixels, targets and loss are the same."""
    compute: Literal["matched", "released"] = "matched"
    """matched: FPN and head process only the canvases that enter each level's loss. released: they process every tile
    on every map, as the authors' code does, with the same loss terms and other BatchNorm statistics; for ResNet-50 at
    224 px this takes 3.9 times the FLOPs."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature T of contrastive losses. The loss of objective=mcl is multiplied by 2 T."""
    loss_weights: tuple[float, ...] = (0.5, 0.25, 0.125, 0.125)
    """Weight of the loss of each level."""
    targets: Literal["top", "same_level", "adjacent", "all"] = "top"
    """Levels of the other view that a tile is compared with. Each of them has a loss of its own; these are averaged.
    top: level 0, as in the authors' code; same_level: the level of the tile; adjacent: that level and its neighbours;
    all: every level. The momentum network computes only these levels."""
    loss: Literal["infonce", "cosine"] = "infonce"
    """infonce: cross-entropy of selecting the target of the tile's own image among the targets of all images. cosine:
    2 - 2 cos with the target of the tile's own image, without negatives and temperature, as in BYOL."""
    queue: int = Field(default=0, ge=0, le=2**22)
    """Number of targets of previous steps that are kept as negatives, per view and level. 0: none."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """objective=supervised: label smoothing of the cross-entropy."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    name: Annotated[Literal["lars", "sgd", "adamw"], Trait.DECIDES_SPEED] = "lars"
    """Optimiser."""
    base_lr: float = Field(default=1.0, gt=0)
    """Learning rate per 256 images: lr = base_lr * trainer.global_batch / 256."""
    final_lr: float = Field(default=1e-4, ge=0)
    """Learning rate at the end of the cosine schedule; not scaled by the batch."""
    warmup_epochs: float = Field(default=10.0225, ge=0, le=1e6)
    """Epochs of linear warm-up, rounded to whole steps (3,127 for ImageNet with a global batch of 4,096). Its factor
    multiplies the cosine schedule. Change it with trainer.epochs; most presets warm up during a tenth of the run."""
    warmup_start: float = Field(default=1e-4, ge=0, le=1)
    """Factor of the warm-up at the first step."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of LARS and SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay rates of AdamW."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Weight decay."""
    trust_coefficient: float = Field(default=1e-3, gt=0)
    """LARS trust coefficient."""
    exclude: Literal["ndim<=1", "released"] = "ndim<=1"
    """Parameters without weight decay and trust ratio. ndim<=1: biases and normalisation parameters, the layer scales
    of ConvNeXt and the relative position tables of Swin. released: those that the regular expression of the authors'
    code matches, which misses the BatchNorm scales of downsampling branches and MLPs."""
    clip_norm: float = Field(default=500.0, ge=0)
    """Largest global L2 norm of the gradients; larger gradients are scaled down. 0 disables clipping."""
    ema: float = Field(default=0.99, ge=0, le=1)
    """Momentum of the momentum network at the first step: its weights are this times their old value, plus the rest
    times those of the online network. It increases to optim.final_ema along a half cosine."""
    final_ema: float = Field(default=1.0, ge=0, le=1)
    """Momentum of the momentum network at the end of the run."""


Devices = Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] | Annotated[tuple[NonNegativeInt, ...], Len(1)]


def _auto_is_0(n: Any, check: ValidatorFunctionWrapHandler) -> int:
    try:
        return 0 if n == "auto" else check(n)
    except ValidationError:
        raise PydanticCustomError("auto_or_int", "Input should be auto or a whole number, 0 or more") from None


_AUTO_IS_0 = WrapValidator(_auto_is_0, json_schema_input_type=Literal["auto"] | int)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainerConfig:
    epochs: int = Field(default=100, ge=1)
    """Epochs of the run, and of all schedules but the warm-up."""
    global_batch: Annotated[int, Trait.DECIDES_SPEED] = Field(default=4096, ge=1, le=2**20)
    """Images per step, over all processes."""
    precision: Annotated[Literal["fp32", "bf16", "fp16", "fp64"], Trait.DECIDES_SPEED] = "bf16"
    """Precision of the networks. bf16 and fp16 use autocast, fp16 with loss scaling. The loss is computed in fp32, with
    fp64 in fp64."""
    tf32: Annotated[bool, Trait.DECIDES_SPEED] = True
    """With precision fp32, GPUs round the inputs of convolutions to TF32 (10 bits of mantissa), as is PyTorch's
    default. Linear layers and the loss use full fp32."""
    deterministic: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Runs on the same GPUs, and resumed runs, have bit-identical weights. Only deterministic algorithms are used, and
    gradients of processes are added in the order of ranks, which is slower. Images must be decoded on the CPU
    (data.device=cpu). Without it, runs are bit-identical only on CPUs with one or two processes."""
    accumulate: Annotated[int, Trait.DECIDES_SPEED, _AUTO_IS_0] = Field(default=1, ge=0)
    """Number of micro-batches that a process splits its images of a step into, which saves memory for activations. Each
    tile is still compared with the targets of the whole batch. BatchNorm statistics are those of a micro-batch. auto
    (or 0): the smallest number that fits into the free memory of every GPU, 1 on CPUs. The number is stored with the
    run and kept when the run is resumed."""
    recompute: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Activation checkpointing: activations inside backbone blocks are not stored for the backward pass but
    recomputed. It saves memory, costs one more forward pass of the backbone, and does not change results."""
    compile: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Compile backbones and heads with torch.compile, which generates Triton kernels for CUDA. Each new shape is
    compiled once."""
    cuda_graph: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Record forward and backward as one CUDA graph, and again when montage.schedule changes the canvas. One process
    only: NCCL's timeouts do not cover collectives in a graph."""
    max_loss_scale: float = Field(default=2.0**14, ge=1)
    """Upper bound of the fp16 loss scale."""
    on_nonfinite: Annotated[Literal["stop", "skip"], Trait.RESUMABLE] = "stop"
    """Action for a step with an infinite or NaN gradient. stop: the run ends before the next checkpoint and reports the
    step; with fp16, which lowers the loss scale first, after 100 such steps in a row. skip: weights, optimiser,
    momentum network and running statistics keep their values, the step is counted in metrics.jsonl, and the run ends
    after 100 such steps in a row."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Trait.RESUMABLE] = "auto"
    """Device of the networks."""
    devices: Annotated[Devices, Trait.OF_A_MACHINE, Trait.RESUMABLE] = "auto"
    """Processes that mcl pretrain starts on this machine, unless a launcher such as torchrun started it. A number: that
    many processes, one per GPU, or on the CPU, over gloo. A list, such as [0,2]: one process on each of these GPUs.
    auto: one per GPU, on as many GPUs as global_batch can be divided among."""
    threads: Annotated[int, Trait.OF_A_MACHINE, Trait.RESUMABLE] = Field(default=0, ge=0, le=4096)
    """CPU threads of PyTorch. 0: PyTorch's default."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, order, crops, augmentations and montages."""
    log_every: Annotated[int, Trait.RESUMABLE] = Field(default=10, ge=1)
    """Steps between two records in metrics.jsonl."""
    profile: Annotated[int, Trait.RESUMABLE] = Field(default=0, ge=0, le=100)
    """Number of steps that the first process profiles, starting with the sixth. Writes profile/trace.json.gz, for
    chrome://tracing, and the time of every operator and kernel to profile/table.txt in the run folder. 0: none."""
    checkpoint_epochs: Annotated[float, Trait.RESUMABLE] = Field(default=4.0, gt=0)
    """Epochs between two checkpoints."""
    keep: Annotated[int, Trait.RESUMABLE] = Field(default=3, ge=1)
    """Number of checkpoints to keep. Older checkpoints are deleted."""
    keep_best: Annotated[Literal["none", "retrieval", "knn", "linear", "svm"], Trait.RESUMABLE] = "none"
    """Evaluation whose best checkpoint is kept as best.pt. The score is top-1 accuracy (retrieval: the mean over
    levels) on held-out images, if there are any. Needs evaluation.every."""
    resume: Annotated[Literal["auto", "never"], Trait.RESUMABLE] = "auto"
    """auto: continue the run in the run folder, if there is one. never: report an error if there is one."""
    init_from: Annotated[str, Trait.PATH] = ""
    """Old name of model.init."""
    timeout: Annotated[float, Trait.RESUMABLE] = Field(default=600.0, gt=0, le=1e8)
    """Seconds without progress after which a run of several processes ends with an error that names the process that
    hangs. It must be longer than loading and computing a step, and than saving a checkpoint."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    at_end: tuple[Literal["retrieval", "knn", "linear", "svm", "regions"], ...] = ()
    """Evaluations at the end of a run."""
    every: float = Field(default=0.0, ge=0, le=1e6)
    """Epochs between two evaluations during the run. The first one is before the first step, the others follow a
    checkpoint. They do not change the weights of the run. 0: none."""
    during: tuple[Literal["retrieval", "knn", "linear", "svm", "regions"], ...] = ("retrieval",)
    """Evaluations during the run, on the images of data.val_root, or without it on the training images."""
    gallery: int = Field(default=32, ge=2)
    """Retrieval: number of images among which a tile has to find its own, a gallery."""
    galleries: int = Field(default=32, ge=2)
    """Retrieval: number of galleries, each with new crops and montages. Scores are averaged."""
    k: int = Field(default=10, ge=1)
    """kNN: number of neighbours."""
    features: Literal["c2", "c3", "c4", "c5", "p2", "p3", "p4", "p5"] = "c5"
    """Features of kNN, linear probe and SVM: a stage of the backbone or a level of the FPN, averaged over space."""
    labels: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the images of every class whose labels kNN and linear probe use, such as 0.01; drawn with
    trainer.seed."""
    annotations: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """SVM: COCO-format file with the classes of the images of data.root, such as VOC 2007's trainval set. Images that
    it does not list are not used."""
    val_annotations: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """SVM: the same for data.val_root."""
    regions: Annotated[str, Trait.PATH] = ""
    """COCO-format folder, with the layout that mcl finetune needs, whose objects mcl evaluate regions classifies."""
    region_cells: int = Field(default=0, ge=0, le=64)
    """Images of evaluation.regions are resized to squares of 32 * region_cells pixels. 0: twice montage.cells, or twice
    the last cells of montage.schedule."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str = ""
    """Weights & Biases project. Empty: no logging to Weights & Biases."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    preview: bool = True
    """Draw the first montages, and at the end feature maps, into preview/ of the run folder."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    name: str = "mcl"
    """Name of the run; its folder is output/name."""
    output: Annotated[str, Trait.PATH, Trait.RESUMABLE] = "runs"
    """Folder of all runs."""
    objective: Annotated[
        Literal["mcl", "supervised", "supervised_contrastive", "moco_v2", "byol"], Trait.DECIDES_SPEED
    ] = "mcl"
    """Pre-training objective. mcl: tiles of every level are matched to their own image among the targets of a momentum
    network. supervised: tiles of every level are classified. supervised_contrastive: tiles of a class are contrasted
    with tiles of other classes. These two need the class of every image. moco_v2 and byol: other methods, on whole
    images, with the same trainer, loader and backbone; they need montage.ratios=[1] and the keys of their presets."""
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    montage: Annotated[Geometry, Trait.DECIDES_SPEED] = Geometry()
    model: Annotated[ModelConfig, Trait.DECIDES_SPEED] = ModelConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: Annotated[EvaluationConfig, Trait.RESUMABLE] = EvaluationConfig()
    log: Annotated[LogConfig, Trait.RESUMABLE] = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels, weights = len(self.montage.ratios), len(self.model.loss_weights)
        if levels != weights:
            raise ValueError(f"model.loss_weights: {weights} weights for the {levels} levels of montage.ratios")
        if self.model.assembly == "stack":
            self._check_stack()
        if self.trainer.compile and self.trainer.recompute:
            raise ValueError("trainer.recompute: not supported by torch.compile; set it or trainer.compile to false")
        if self.trainer.compile and self.trainer.deterministic:
            raise ValueError(
                "trainer.deterministic: torch.compile chooses kernels by timing; set it or trainer.compile to false"
            )
        if self.model.init and self.trainer.init_from:
            raise ValueError("trainer.init_from: the old name of model.init, which is set as well; remove it")
        best, evaluation = self.trainer.keep_best, self.evaluation
        if best != "none" and (not evaluation.every or best not in evaluation.during):
            raise ValueError(
                f"trainer.keep_best: {best} is not evaluated during the run; set evaluation.every=1, for instance, and "
                f"evaluation.during=[{best}]"
            )
        if not is_folder_name(self.name):
            raise ValueError(f"name: {self.name!r} is not a plain folder name")
        return self

    def _check_stack(self) -> None:
        if self.model.compute == "released":
            raise ValueError(
                "model.assembly: stack computes only the map that an image's level needs, but model.compute=released "
                "needs all maps; set model.compute=matched"
            )
        if self.model.backbone != "convnext_t":
            return
        for key, cells in ("cells", self.montage.cells), *(("schedule", cells) for _, cells in self.montage.schedule):
            if cells % self.montage.ratios[-1]:
                raise ValueError(
                    "model.assembly: with stack the sides of some tiles are no multiples of 32 px, and "
                    "model.backbone=convnext_t would drop a part of them; set "
                    f"montage.{key} to multiples of {self.montage.ratios[-1]} cells, not {cells}"
                )

    def doubts(self) -> list[str]:
        """Warnings about legal values that are probably mistakes, one line each, with a suggestion."""
        optim, epochs = self.optim, self.trainer.epochs
        peak = optim.base_lr * self.trainer.global_batch / 256
        lines = []
        if optim.warmup_epochs >= epochs:
            # Of the cosine times the warm-up; x (1 + cos(pi x)) / 2 is at most 0.26 between 0 and 1.
            highest = 0.26 * epochs / optim.warmup_epochs * peak
            lines.append(
                f"optim.warmup_epochs: a warm-up of {optim.warmup_epochs:g} epochs is as long as the run "
                f"(trainer.epochs={epochs}) or longer: the learning rate stays below {highest:.2g} instead of reaching "
                f"{peak:.2g}; "
                f"set optim.warmup_epochs={epochs / 10:g}, for instance"
            )
        if optim.name != "lars" and optim.base_lr >= OptimConfig.base_lr:
            usual = 0.05 if optim.name == "sgd" else 1e-3
            lines.append(
                f"optim.base_lr: {optim.base_lr:g} is a rate for lars, which scales it down; {optim.name} hardly "
                f"converges with it; set optim.base_lr={usual:g}, for instance"
            )
        if optim.name == "lars" and optim.base_lr <= 0.02:
            lines.append(
                f"optim.base_lr: {optim.base_lr:g} is a rate for adamw or sgd; lars scales it down, so weights "
                f"hardly change; set optim.base_lr={OptimConfig.base_lr:g}, for instance"
            )
        if optim.final_lr > peak:
            lines.append(
                f"optim.final_lr: {optim.final_lr:g} is above the highest learning rate of the run, {peak:.2g} "
                "(optim.base_lr * trainer.global_batch / 256), so the rate increases until the end; set it lower"
            )
        if late := [epoch for epoch, _ in self.montage.schedule if epoch >= epochs]:
            lines.append(
                f"montage.schedule: the canvases from epoch {', '.join(map(str, late))} on are never used, since "
                f"trainer.epochs={epochs}; shorten the schedule as well"
            )
        return lines

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def loading(self) -> DataConfig:
        """``data`` for training, with ``data.dtype`` resolved."""
        half = self.trainer.precision in ("bf16", "fp16")
        dtype: Any = ("float16" if half else "float32") if self.data.dtype == "auto" else self.data.dtype
        return dataclasses.replace(self.data, dtype=dtype)

    def plan(
        self,
        size: int,
        images: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        geometry: Geometry | None = None,
        seed: int | None = None,
    ) -> Plan:
        """The plan that determines the images, crops and montages of a process in every step.

        Args:
            size: number of images in the data set.
            images: number of images per process and step.
            rank: rank of the process.
            world_size: number of processes.
            geometry: replaces ``montage``.
            seed: replaces ``trainer.seed``.

        Raises:
            ConfigError: the images of a process and step fill no whole number of canvases.
        """
        if not (geometry or self.montage).legal(images):
            near = ", ".join(map(str, nearest_legal(geometry or self.montage, images)))
            raise ConfigError(f"montage: {images} images fill no whole number of canvases; nearest legal: {near}")
        return Plan(
            seed=self.trainer.seed if seed is None else seed,
            size=size,
            images=images,
            geometry=geometry or self.montage,
            augment=self.augment,
            tile_sampling=self.data.tile_sampling,
            rank=rank,
            world_size=world_size,
        )

    def images_per_rank(self, world_size: int) -> int:
        """Images per step and process.

        Raises:
            ConfigError: trainer.global_batch is not divisible by the number of processes or makes no legal montage, or
                montage.queries do not divide its canvases.
        """
        batch = self.trainer.global_batch
        if batch % world_size:
            raise ConfigError(f"trainer.global_batch: {batch} is not divisible by {world_size} processes")
        images = batch // world_size
        geometry = self.montage
        if not geometry.legal(images):
            near = ", ".join(str(n * world_size) for n in nearest_legal(geometry, images))
            raise ConfigError(
                f"trainer.global_batch: {batch} gives {images} images per process, which fill no whole number of "
                f"canvases at montage.images_per_canvas={list(geometry.images_per_canvas)}; nearest legal: {near}"
            )
        self._check_queries(images)
        self._check_accumulate(images)
        parts = self.trainer.accumulate or 1  # auto is not resolved before the GPUs are known
        online = [canvases // parts for canvases in geometry.query_canvases(images)]
        if world_size * online[0] < 2:  # a canvas of level 0 is a single tile
            raise ConfigError(
                "montage.queries: with one query of level 0 per micro-batch, the projector's BatchNorm has a single "
                "row; use more queries, a larger trainer.global_batch or a smaller trainer.accumulate"
            )
        if min(online) * geometry.fewest_cells**2 < 2:
            key = "montage.cells" if geometry.cells == 1 else "montage.schedule"
            raise ConfigError(
                f"trainer.global_batch: with {images // parts} images per process and micro-batch and 1 "
                f"cell ({key}), BatchNorm has one value per channel; double the batch or use 2 cells"
            )
        return images

    def parts(self, images: int) -> list[int]:
        """Numbers of micro-batches that divide the canvases and the online queries of every level."""
        largest = math.gcd(*self.montage.query_canvases(images), *self.montage.canvases(images))
        return [n for n in range(1, largest + 1) if largest % n == 0]

    def _check_accumulate(self, images: int) -> None:
        online, canvases = self.montage.query_canvases(images), self.montage.canvases(images)
        legal = self.parts(images)
        if self.trainer.accumulate not in (0, *legal):
            raise ConfigError(
                f"trainer.accumulate: {images} images per process make {list(canvases)} canvases, of which "
                f"{list(online)} are online queries; these are divisible by {', '.join(map(str, legal))}, not by "
                f"{self.trainer.accumulate}"
            )

    def _check_queries(self, images: int) -> None:
        for level, every in enumerate(self.montage.queries):
            canvases = self.montage.canvases(images)[level]
            if canvases % every:
                divisors = [n for n in range(1, canvases + 1) if canvases % n == 0]
                near = [n for n in divisors if n < every][-1:] + [n for n in divisors if n > every][:1]
                raise ConfigError(
                    f"montage.queries: one in {every} of the {canvases} canvases of level {level} ({images} images per "
                    f"process) is no whole number; nearest legal: {', '.join(map(str, near))}"
                )


def is_folder_name(name: str) -> bool:
    """Whether `name` is a folder name without separators, and without control characters, which would break lines."""
    return Path(name).name == name != ".." and min(name, default="") >= " "


PRESETS = Path(__file__).parent / "presets"
"""Folder of the presets of ``mcl pretrain``."""

DETECTORS = Path(__file__).parent / "finetune" / "configs"
"""Folder of the presets of ``mcl finetune``."""

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration: a leaf of the tree."""

    name: str
    """Dotted name, such as data.root."""
    kind: Any
    """Type of its values as they are written."""
    default: Any
    documentation: str
    traits: frozenset[Trait]

    @property
    def is_text(self) -> bool:
        """Whether its value is text or one of several words."""
        return self.kind is str or get_origin(self.kind) is Literal


def all_keys(section: type = Config, prefix: str = "", traits: frozenset[Trait] = frozenset()) -> Iterator[Key]:
    """Yields every key, in the order of declaration; `traits` are those of the section."""
    for name, field in section.__pydantic_fields__.items():  # type: ignore[attr-defined]
        own = traits | {trait for trait in field.metadata if isinstance(trait, Trait)}
        if dataclasses.is_dataclass(field.annotation):
            yield from all_keys(field.annotation, f"{prefix}{name}.", own)  # type: ignore[arg-type]
        else:
            documentation = " ".join((field.description or "").split())
            kind = next(
                (v.json_schema_input_type for v in field.metadata if isinstance(v, WrapValidator)), field.annotation
            )
            yield Key(f"{prefix}{name}", kind, field.default, documentation, own)


def value(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    section: Any = config
    for part in key.split("."):
        section = getattr(section, part)
    return section


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys that have different values and change what a run computes."""
    return [
        key.name
        for key in all_keys()
        if Trait.RESUMABLE not in key.traits and value(before, key.name) != value(now, key.name)
    ]


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists), as in ``config.yaml`` of a run."""
    plain: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return plain


def schema() -> dict[str, Any]:
    """JSON schema of a configuration, with which editors complete and check YAML files."""
    return _ADAPTER.json_schema()


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a configuration.

    Raises:
        ConfigError: unknown key (the nearest one is named), wrong type or illegal value.
    """
    known = {key.name: key for key in all_keys()}
    for key in _leaves(values):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise ConfigError(f"{key}: no such key; {_nearest(key, list(known))}")
    try:
        return _ADAPTER.validate_python(_texts(values, known))
    except ValidationError as error:
        first, *others = error.errors()
        parts = [str(part) for part in first["loc"]]
        key = next((k for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in known), ".".join(parts))
        if first["type"] == "value_error":  # our own checks: `loc` is the section, the message starts with its key
            message = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{key}.{message}" if key else message) from None
        # A key of several types has one error per type.
        same = [first, *(other for other in others if ".".join(map(str, other["loc"])).startswith(f"{key}."))]
        wanted = list(
            dict.fromkeys(one["msg"].removeprefix("Input should be ").partition(", unable")[0] for one in same)
        )
        message = first["msg"] if len(wanted) == 1 else f"Input should be {' or '.join(wanted)}"
        message = message.replace("a valid tuple", "a list, such as [1, 2]")
        got = "nothing" if first["input"] is None else repr(first["input"])
        raise ConfigError(f"{key}: {message} (got {got})") from None


def load(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Reads a YAML file or a preset and applies changes to it (see :func:`override`).

    A change of data.root removes the file's data.val_root, unless that is changed as well.

    Raises:
        ConfigError: no such file or preset, not YAML, or see :func:`from_dict`.
    """
    presets = {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}
    if not Path(path).is_file():
        path = presets.get(str(path), path)
    try:
        values = parse_yaml(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({error.strerror}); presets are {', '.join(presets)}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(values).__name__}")
    changes = _changes(overrides)
    if "data.root" in changes and isinstance(values.get("data"), dict):
        values["data"].pop("val_root", None)
    return from_dict(_apply(values, changes))


def override(config: Config, overrides: Iterable[str] | Mapping[str, Any]) -> Config:
    """Applies ``key=value`` words, or values by dotted keys, to a configuration. ``key=`` sets the empty text.

    Raises:
        ConfigError: see :func:`from_dict`.
    """
    return from_dict(_apply(to_dict(config), _changes(overrides)))


def _changes(overrides: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys."""
    if isinstance(overrides, Mapping):
        return dict(overrides)
    texts = {key.name for key in all_keys() if key.is_text}
    values = {}
    for word in overrides:
        key, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"{word!r}: expected key=value")
        try:
            values[key] = text if key in texts else parse_yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: cannot read the value {text!r}") from None
    return values


def _apply(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} is not a section")
        node[leaf] = value
    return values


def _texts(values: Mapping[str, Any], keys: Mapping[str, Key], prefix: str = "") -> dict[str, Any]:
    """Replaces None by the empty text for text keys, and ~ by the home folder in paths.

    Raises:
        ConfigError: there is no home folder.
    """
    result = dict(values)
    for name, value in values.items():
        key = keys.get(f"{prefix}{name}")
        if isinstance(value, Mapping):
            result[name] = _texts(value, keys, f"{prefix}{name}.")
        elif key and key.kind is str and value is None:
            result[name] = ""
        elif key and isinstance(value, str):
            if not can_be_named(value):
                raise ConfigError(f"{key.name}: no file can be called {value!r}; remove what is written with \\")
            result[name] = at_home(key.name, value) if Trait.PATH in key.traits else value
    return result


def at_home(key: str, path: str) -> str:
    """A path with ~ replaced by the home folder, which the shell does not do in data.root=~/images.

    Raises:
        ConfigError: there is no home folder; the message names the key.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and path.split("/")[0] == "~":
        raise ConfigError(f"{key}: {path}: ~ needs a home folder; set HOME, or write the whole path")
    return expanded


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _nearest(key: str, known: list[str]) -> str:
    """Suggests the known key with the same last word or a similar spelling."""
    leaf = key.rsplit(".", 1)[-1]
    close = [k for k in difflib.get_close_matches(key, known, n=1, cutoff=0.5) if _alike(leaf, k.rsplit(".", 1)[-1])]
    same = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    same = difflib.get_close_matches(key, same, n=1, cutoff=0)  # of several, the one in the most similar section
    leaves = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.6)
    similar = [k for k in known if leaves and k.rsplit(".", 1)[-1] == leaves[0]]
    candidates = same or close or similar
    return f"did you mean {candidates[0]}?" if candidates else "see `mcl pretrain --help` for all keys"


def _alike(one: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, one, other).ratio() > 0.4
