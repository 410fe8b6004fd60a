"""Sections of the configuration. The string under each field is its documentation."""

from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import Field, NonNegativeInt, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from dali_pipelines.settings import STRICT, Trait


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
    """SVM: COCO-format file with the classes of the images of data.root, such as VOC 2007's trainval set. It names
    images relative to data.root; images that it does not list are not used."""
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
