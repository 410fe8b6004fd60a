"""One tree of frozen dataclasses: every key of a run, its type, its default and its meaning, each said once.

A configuration is read from a YAML preset and refined by ``key=value`` words, e.g. ``optim.base_lr=0.5``. A word for a
key that is text is taken as it was typed; all others are YAML. The string under each field is its documentation;
``mcl pretrain --help`` prints exactly these.
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
    """Backbone, named as in torchvision. Those with vd are the ResNet-D of RT-DETR. ConvNeXt and Swin drop no paths
    (stochastic depth 0) and want optim.name=adamw, as in their presets."""
    init: Annotated[str, Trait.PATH, Trait.AT_START] = ""
    """Weights that a new run starts from: a file of ours or of another library (docs/weights.md says which), or what a
    library downloads, as torchvision:resnet50 or timm:resnet50.a1_in1k. The backbone must be whole; FPN and region head
    are taken where they are there, and everything of a checkpoint of the same model. Empty: random ones."""
    width: int = Field(default=256, ge=1, le=2**16)
    """Channels of the FPN, of the region head and of the embedding."""
    head_convs: int = Field(default=4, ge=0, le=100)
    """3x3 convolutions of the region head."""
    hidden: int = Field(default=2048, ge=1, le=2**20)
    """Hidden units of projector and predictors."""
    compute: Literal["matched", "released"] = "matched"
    """matched: FPN and head process only the canvases that enter each level's loss. released: they process every tile
    on every map, as the authors' code does: 3.9 times the FLOPs, the same loss terms, other BatchNorm statistics."""
    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature T of contrastive losses; that of objective=mcl is multiplied by 2 T."""
    loss_weights: tuple[float, ...] = (0.5, 0.25, 0.125, 0.125)
    """Weight of each level's loss."""
    targets: Literal["top", "same_level", "adjacent", "all"] = "top"
    """Levels of the other view whose targets a tile is compared with, each by a loss of its own; the mean is taken.
    top: level 0, as released; same_level: its own; adjacent: its own and those next to it; all. The momentum network
    runs on no more than it must."""
    loss: Literal["infonce", "cosine"] = "infonce"
    """infonce: cross-entropy of picking the own image's target among all images'. cosine: 2 - 2 cos with the own
    image's target, without negatives and temperature, as in BYOL."""
    queue: int = Field(default=0, ge=0, le=2**22)
    """Targets of former steps, per view and level, that are further negatives; 0: none."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """objective=supervised: share of the target distribution that all classes have in equal parts."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    name: Annotated[Literal["lars", "sgd", "adamw"], Trait.DECIDES_SPEED] = "lars"
    """Optimiser."""
    base_lr: float = Field(default=1.0, gt=0)
    """Learning rate per 256 images: lr = base_lr * trainer.global_batch / 256."""
    final_lr: float = Field(default=1e-4, ge=0)
    """Learning rate at the end of the cosine, absolute."""
    warmup_epochs: float = Field(default=10.0225, ge=0, le=1e6)
    """Length of the linear warm-up, which multiplies the cosine; rounded to steps (3,127 for ImageNet at 4,096)."""
    warmup_start: float = Field(default=1e-4, ge=0, le=1)
    """Factor at the first step of the warm-up."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of LARS and SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moment decay rates of AdamW."""
    weight_decay: float = Field(default=1e-5, ge=0)
    """Weight decay."""
    trust_coefficient: float = Field(default=1e-3, gt=0)
    """LARS trust coefficient."""
    exclude: Literal["ndim<=1", "released"] = "ndim<=1"
    """Parameters without weight decay and trust ratio: all vectors, with ConvNeXt's layer scales and Swin's relative
    position tables, or those the authors' regular expression finds (it misses the BatchNorm scales of downsampling
    branches and MLPs)."""
    clip_norm: float = Field(default=500.0, ge=0)
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""
    ema: float = Field(default=0.99, ge=0, le=1)
    """Momentum of the target network at the first step; it rises to optim.final_ema along a half cosine."""
    final_ema: float = Field(default=1.0, ge=0, le=1)
    """Momentum of the target network at the end."""


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
    """Length of the run and of all schedules."""
    global_batch: Annotated[int, Trait.DECIDES_SPEED] = Field(default=4096, ge=1, le=2**20)
    """Images per step, over all processes."""
    precision: Annotated[Literal["fp32", "bf16", "fp16", "fp64"], Trait.DECIDES_SPEED] = "bf16"
    """Arithmetic of the networks: autocast for bf16 and fp16 (with loss scaling); the loss is computed in fp32, or in
    fp64 there."""
    tf32: Annotated[bool, Trait.DECIDES_SPEED] = True
    """Convolutions of precision fp32 round their inputs to TF32 (10 bits of mantissa) on GPUs that have it, as is
    PyTorch's default. Linear layers and the loss are in full fp32."""
    deterministic: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Runs on the same GPUs, and resumed runs, have bit-identical weights. Only deterministic algorithms are used, and
    gradients of processes are added in the order of ranks, which is slower. Images must be decoded on the CPU
    (data.device=cpu). Without it, runs are bit-identical only on CPUs with one or two processes."""
    accumulate: Annotated[int, Trait.DECIDES_SPEED, _AUTO_IS_0] = Field(default=1, ge=0)
    """Micro-batches per step and process. Less memory for activations; gradients are those of all, each compared with
    the targets of the whole batch. BatchNorm statistics are those of a micro-batch. auto (or 0): the smallest number
    that fits into the free memory of every GPU, 1 on CPUs; it is stored with the run and kept when that is resumed."""
    recompute: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Activation checkpointing: the insides of backbone blocks are not kept for backward, but computed again."""
    compile: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Backbones and heads through torch.compile, which on CUDA generates Triton kernels; new shapes compile anew."""
    cuda_graph: Annotated[bool, Trait.RESUMABLE, Trait.DECIDES_SPEED] = False
    """Forward and backward as one recorded CUDA graph, for one process; recorded anew when montage.schedule changes
    the canvas. Not for several processes, whose collectives would be outside NCCL's timeouts in a graph."""
    max_loss_scale: float = Field(default=2.0**14, ge=1)
    """Upper bound of the fp16 loss scale."""
    on_nonfinite: Annotated[Literal["stop", "skip"], Trait.RESUMABLE] = "stop"
    """What becomes of a step whose gradient is infinite or NaN. stop: the run ends before the next checkpoint, naming
    it; in fp16, where the loss scale is lowered instead, after 100 such steps in a row. skip: weights, optimiser,
    momentum network and running statistics stay as they were, the record counts it, and the run ends after 100 such
    steps in a row."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Trait.RESUMABLE] = "auto"
    """Where the networks live."""
    devices: Annotated[Devices, Trait.OF_A_MACHINE, Trait.RESUMABLE] = "auto"
    """Processes that mcl pretrain starts on this machine where no launcher, such as torchrun, did: a number, one per
    GPU or over gloo on the CPU; a list of GPUs, such as [0,2]; auto: one per GPU, as far as global_batch divides."""
    threads: Annotated[int, Trait.OF_A_MACHINE, Trait.RESUMABLE] = Field(default=0, ge=0, le=4096)
    """CPU threads of PyTorch; 0 leaves its default."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of weights, order, crops, augmentations and montages."""
    log_every: Annotated[int, Trait.RESUMABLE] = Field(default=10, ge=1)
    """Steps between two records in metrics.jsonl."""
    profile: Annotated[int, Trait.RESUMABLE] = Field(default=0, ge=0, le=100)
    """Steps that the first process profiles, after the first five: profile/trace.json.gz, for chrome://tracing, and the
    time of every operator and kernel in profile/table.txt of the run folder. 0: none."""
    checkpoint_epochs: Annotated[float, Trait.RESUMABLE] = Field(default=4.0, gt=0)
    """Epochs between two checkpoints."""
    keep: Annotated[int, Trait.RESUMABLE] = Field(default=3, ge=1)
    """Checkpoints kept; older ones are deleted."""
    keep_best: Annotated[Literal["none", "retrieval", "knn", "linear", "svm"], Trait.RESUMABLE] = "none"
    """Evaluation whose best checkpoint is kept as well, under the name best.pt: by top-1 accuracy, of retrieval by its
    mean over the levels, on held-out images where there are any. It takes evaluation.every."""
    resume: Annotated[Literal["auto", "never"], Trait.RESUMABLE] = "auto"
    """auto continues the run found in the run folder; never refuses to touch a folder that holds one."""
    init_from: Annotated[str, Trait.PATH] = ""
    """Old name of model.init."""
    timeout: Annotated[float, Trait.RESUMABLE] = Field(default=600.0, gt=0, le=1e8)
    """Seconds without progress after which a run of several processes ends and names the one that hangs; more than
    loading and computing a step, and saving, may take."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    at_end: tuple[Literal["retrieval", "knn", "linear", "svm", "regions"], ...] = ()
    """Evaluations at the end of a run."""
    every: float = Field(default=0.0, ge=0, le=1e6)
    """Epochs between two evaluations during the run, each after a checkpoint; the first one before the first step.
    0: none. They leave what the run computes as it is."""
    during: tuple[Literal["retrieval", "knn", "linear", "svm", "regions"], ...] = ("retrieval",)
    """Which these are; on the images of data.val_root, or on those trained on without it."""
    gallery: int = Field(default=32, ge=2)
    """Retrieval: images in a gallery."""
    galleries: int = Field(default=32, ge=2)
    """Retrieval: galleries, each with new crops and montages; scores are averaged."""
    k: int = Field(default=10, ge=1)
    """Neighbours that vote in kNN."""
    features: Literal["c2", "c3", "c4", "c5", "p2", "p3", "p4", "p5"] = "c5"
    """What kNN, linear probe and SVM see: the mean over space of a stage of the backbone or of a level of the FPN."""
    labels: float = Field(default=1.0, gt=0, le=1)
    """Fraction of the images of every class whose labels kNN and linear probe know, drawn by trainer.seed; such as
    0.01 or 0.1."""
    annotations: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """SVM: file in COCO format with the classes of the images of data.root, such as VOC 2007's trainval set; images
    that it does not name are left out."""
    val_annotations: Annotated[str, Trait.PATH, Trait.OF_A_MACHINE] = ""
    """SVM: the same for data.val_root."""
    regions: Annotated[str, Trait.PATH] = ""
    """COCO-format folder, laid out as mcl finetune takes it, whose objects mcl evaluate regions tells apart."""
    region_cells: int = Field(default=0, ge=0, le=64)
    """Its images are shown whole, as squares of 32 * region_cells pixels; 0: twice montage.cells, at its last size."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str = ""
    """Weights & Biases project; empty does not log there."""
    progress: bool = True
    """Show a progress bar on a terminal."""
    preview: bool = True
    """Write pictures of the first montages into the run folder."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    name: str = "mcl"
    """Name of the run; its folder is output/name."""
    output: Annotated[str, Trait.PATH, Trait.RESUMABLE] = "runs"
    """Folder of all runs."""
    objective: Annotated[
        Literal["mcl", "supervised", "supervised_contrastive", "moco_v2", "byol"], Trait.DECIDES_SPEED
    ] = "mcl"
    """What is learned. mcl: tiles of every level find their own image among the targets of a momentum network.
    supervised: tiles of every level are classified. supervised_contrastive: all tiles of a class attract each other.
    These two need the class of every image. moco_v2 and byol: peers, of whole images, with the same trainer, loader and
    backbone; they want montage.ratios=[1] and more, as in their presets."""
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
        if self.trainer.compile and self.trainer.recompute:
            raise ValueError("trainer.recompute: torch.compile cannot recompute; set it or trainer.compile to false")
        if self.trainer.compile and self.trainer.deterministic:
            raise ValueError(
                "trainer.deterministic: torch.compile chooses kernels by timing; set it or trainer.compile to false"
            )
        if self.model.init and self.trainer.init_from:
            raise ValueError("trainer.init_from: is the old name of model.init, which is set, too; leave it out")
        best, evaluation = self.trainer.keep_best, self.evaluation
        if best != "none" and (not evaluation.every or best not in evaluation.during):
            raise ValueError(
                f"trainer.keep_best: {best} is not evaluated during the run; set evaluation.every=1, for instance, and "
                f"evaluation.during=[{best}]"
            )
        if not is_folder_name(self.name):
            raise ValueError(f"name: {self.name!r} is not a plain folder name")
        return self

    def doubts(self) -> list[str]:
        """What is legal and seldom meant, as after one key of a preset was changed: a line each, with what to set."""
        optim, epochs = self.optim, self.trainer.epochs
        peak = optim.base_lr * self.trainer.global_batch / 256
        lines = []
        if optim.warmup_epochs >= epochs:
            # Of the cosine times the warm-up; x (1 + cos(pi x)) / 2 is at most 0.26 between 0 and 1.
            highest = 0.26 * epochs / optim.warmup_epochs * peak
            lines.append(
                f"optim.warmup_epochs: a warm-up of {optim.warmup_epochs:g} epochs is as long as the run "
                f"(trainer.epochs={epochs}) or longer: the learning rate never passes {highest:.2g} of {peak:.2g}; "
                f"set optim.warmup_epochs={epochs / 10:g}, for instance"
            )
        if optim.name != "lars" and optim.base_lr >= OptimConfig.base_lr:
            usual = 0.05 if optim.name == "sgd" else 1e-3
            lines.append(
                f"optim.base_lr: {optim.base_lr:g} is a rate for lars, which scales it down; {optim.name} will hardly "
                f"converge with it; set optim.base_lr={usual:g}, for instance"
            )
        if optim.name == "lars" and optim.base_lr <= 0.02:
            lines.append(
                f"optim.base_lr: {optim.base_lr:g} is a rate for adamw or sgd; lars scales it down, so that weights "
                f"hardly move; set optim.base_lr={OptimConfig.base_lr:g}, for instance"
            )
        if optim.final_lr > peak:
            lines.append(
                f"optim.final_lr: {optim.final_lr:g} is above the highest learning rate of the run, {peak:.2g} "
                "(optim.base_lr * trainer.global_batch / 256), so that it rises to the end; set it lower"
            )
        if late := [epoch for epoch, _ in self.montage.schedule if epoch >= epochs]:
            lines.append(
                f"montage.schedule: the canvases from epoch {', '.join(map(str, late))} on are never used, since "
                f"trainer.epochs={epochs}; shorten the schedule with the run"
            )
        return lines

    @property
    def run_folder(self) -> Path:
        return Path(self.output) / self.name

    @property
    def loading(self) -> DataConfig:
        """``data`` for training, ``data.dtype`` resolved."""
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
        """What a process sees in every step.

        Args:
            size: images of the data set.
            images: of them per process and step.
            rank, world_size: of the process, and how many there are.
            geometry: in place of ``montage``.
            seed: in place of ``trainer.seed``.

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
        """Images of a step per process.

        Raises:
            ConfigError: trainer.global_batch does not divide by the processes, or makes no legal montage;
                montage.queries do not divide its canvases.
        """
        batch = self.trainer.global_batch
        if batch % world_size:
            raise ConfigError(f"trainer.global_batch: {batch} does not divide by {world_size} processes")
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
                "montage.queries: one query of level 0 per micro-batch leaves the projector's BatchNorm a single row; "
                "use more queries, a larger trainer.global_batch or a smaller trainer.accumulate"
            )
        if min(online) * geometry.fewest_cells**2 < 2:
            key = "montage.cells" if geometry.cells == 1 else "montage.schedule"
            raise ConfigError(
                f"trainer.global_batch: {images // parts} images per process and micro-batch and 1 "
                f"cell ({key}) leave BatchNorm one value per channel; double the batch or use 2 cells"
            )
        return images

    def parts(self, images: int) -> list[int]:
        """Numbers of micro-batches by which the canvases of every level, online queries and others, divide."""
        largest = math.gcd(*self.montage.query_canvases(images), *self.montage.canvases(images))
        return [n for n in range(1, largest + 1) if largest % n == 0]

    def _check_accumulate(self, images: int) -> None:
        online, canvases = self.montage.query_canvases(images), self.montage.canvases(images)
        legal = self.parts(images)
        if self.trainer.accumulate not in (0, *legal):
            raise ConfigError(
                f"trainer.accumulate: {images} images per process make {list(canvases)} canvases, of which "
                f"{list(online)} are online queries; these divide by {', '.join(map(str, legal))}, not by "
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
    """Whether a folder of that name lies directly in another one; no control characters, which would break lines."""
    return Path(name).name == name != ".." and min(name, default="") >= " "


PRESETS = Path(__file__).parent / "presets"
"""Configurations of ``mcl pretrain`` that are known by their names."""

DETECTORS = Path(__file__).parent / "finetune" / "configs"
"""Those of ``mcl finetune``."""

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the configuration, that is a leaf of the tree."""

    name: str
    """With its sections, as in data.root."""
    kind: Any
    """The type of its values, as they are written."""
    default: Any
    documentation: str
    traits: frozenset[Trait]

    @property
    def is_text(self) -> bool:
        """Whether its value is a text, or one of several."""
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
    """What a configuration has under a dotted key."""
    section: Any = config
    for part in key.split("."):
        section = getattr(section, part)
    return section


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys whose values differ and decide what a run computes."""
    return [
        key.name
        for key in all_keys()
        if Trait.RESUMABLE not in key.traits and value(before, key.name) != value(now, key.name)
    ]


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dictionary (tuples become lists), what ``config.yaml`` of a run holds."""
    plain: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return plain


def schema() -> dict[str, Any]:
    """JSON schema of a configuration, by which editors complete and check YAML files."""
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
        # A key of several types has an error for each.
        same = [first, *(other for other in others if ".".join(map(str, other["loc"])).startswith(f"{key}."))]
        wanted = list(
            dict.fromkeys(one["msg"].removeprefix("Input should be ").partition(", unable")[0] for one in same)
        )
        message = first["msg"] if len(wanted) == 1 else f"Input should be {' or '.join(wanted)}"
        message = message.replace("a valid tuple", "a list, such as [1, 2]")
        got = "nothing" if first["input"] is None else repr(first["input"])
        raise ConfigError(f"{key}: {message} (got {got})") from None


def load(path: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Reads a YAML file, or a preset by its name, and applies words or values to it (:func:`override`).

    In the file, too, text is what is written. Its data.val_root belongs to its data.root: who sets another root takes
    the held-out images away, unless they are set, too.

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
    """Applies ``key=value`` words to a configuration, or values by dotted keys; nothing behind the = is the empty text.

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
    """With the empty text for none, and in paths the home folder for ~, as the shell leaves data.root=~/images.

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
                raise ConfigError(f"{key.name}: no file can be called {value!r}; leave out what is written with \\")
            result[name] = at_home(key.name, value) if Trait.PATH in key.traits else value
    return result


def at_home(key: str, path: str) -> str:
    """A path with the home folder for ~, which the shell leaves in data.root=~/images.

    Raises:
        ConfigError: there is no home folder; the key is named.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and path.split("/")[0] == "~":
        raise ConfigError(f"{key}: {path}: there is no home folder that ~ could be; set HOME, or write the whole path")
    return expanded


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _nearest(key: str, known: list[str]) -> str:
    """Says which known key was probably meant: the same last word, or similar spelling."""
    leaf = key.rsplit(".", 1)[-1]
    close = [k for k in difflib.get_close_matches(key, known, n=1, cutoff=0.5) if _alike(leaf, k.rsplit(".", 1)[-1])]
    same = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    same = difflib.get_close_matches(key, same, n=1, cutoff=0)  # of several, the one in the likeliest section
    leaves = difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in known], n=1, cutoff=0.6)
    similar = [k for k in known if leaves and k.rsplit(".", 1)[-1] == leaves[0]]
    candidates = same or close or similar
    return f"did you mean {candidates[0]}?" if candidates else "see `mcl pretrain --help` for all keys"


def _alike(one: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, one, other).ratio() > 0.4
