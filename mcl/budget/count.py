"""FLOPs and bytes of a training step, counted while the real modules run on tensors without memory.

PyTorch's fake tensors have shapes and types as on a CPU, including autocast, but no data. So a step of any size takes
seconds. The counts include forward and backward of both views:

* 2 FLOPs per multiply-add of convolutions and matrix products, by PyTorch's formulas. Backward is counted from the
  gradients that autograd computes; the first convolution, for example, has none for its input.
* Bytes that autograd stores between forward and backward, each piece of memory once, and the peak of all memory.
* Communication of several processes: calls of BatchNorm, gradients in the order of backward, targets.

Operations that compute little compared with their memory traffic are not counted: BatchNorm, activations, pooling,
interpolation, softmax, clipping, optimiser and momentum update, and region pooling, which only copies cells of a
montage.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from dali_pipelines.batch import in_order
from dali_pipelines.geometry import Geometry
from dali_pipelines.layout import tile_boxes
from mcl import distributed
from mcl.config import Config
from mcl.models.backbones import Backbone
from mcl.objectives import OBJECTIVES, Objective, build
from mcl.train.optim import AUTOCAST, build_optimizer

PARTS = ("backbone", "FPN", "head", "projector", "predictors", "loss", "momentum network")
"""Parts of a step. `head` is the convolutions of the region head, `momentum network` the whole network. Modules of an
objective outside of its encoders count as predictors."""

_CLASSES = ("",) * 1000
"""Placeholders for the classes of the images, which are unknown here; as many as in ImageNet-1k."""

_OWNERS = {  # by prefix of a module's name; the first match counts
    "online.head.projector": "projector",
    "online.head": "head",
    "online.fpn": "FPN",
    "online.backbone": "backbone",
    "online": "",
    "target": "momentum network",
}


def _owner(name: str) -> str:
    """The part of a module or parameter; empty for a module of several parts."""
    return next((part for start, part in _OWNERS.items() if name.startswith(start)), "predictors" if name else "")


@dataclass(frozen=True)
class Normalization:
    """A call of a BatchNorm in training mode."""

    channels: int
    groups: int  # groups of rows that are normalised separately
    element: int  # bytes per element of the statistics
    returns: bool  # whether backward passes through it; False when recomputed, and in the momentum network


@dataclass(frozen=True)
class Count:
    """Counts of one process's training step, by part."""

    forward: Mapping[str, int]  # FLOPs
    backward: Mapping[str, int]  # FLOPs
    saved: Mapping[str, int]  # bytes that autograd keeps for backward
    parameters: Mapping[str, int]  # number of parameters, without buffers
    norms: Sequence[Normalization]  # in the order of calls
    gradients: Sequence[int]  # bytes of each gradient, in the order in which backward computes them
    gathered: Sequence[int]  # bytes of one process's input to each all-gather, such as the targets of a view
    peak: int  # maximum bytes that forward and backward hold at once, including saved tensors

    @property
    def flops(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())


@dataclass(frozen=True)
class Stage:
    """Epochs with one geometry: a stage of the canvas schedule."""

    first: int
    epochs: int
    geometry: Geometry
    count: Count  # of a micro-batch
    images: int  # per process and micro-batch
    accumulate: int  # micro-batches of a step
    views: float  # pixels that the loader makes per image, in views of 224 px

    @property
    def flops(self) -> float:
        """FLOPs per image."""
        return self.count.flops / self.images

    @property
    def saved(self) -> int:
        """Bytes that autograd keeps, all parts."""
        return sum(self.count.saved.values())


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *others: Any, **_: Any) -> int:
    """FLOPs of the gradients of input and weight, each as many as forward. PyTorch's formula ignores groups."""
    wanted: Sequence[bool] = others[-1][:2]
    return 2 * sum(wanted) * gradient.numel() * weight[0].numel()


_FORMULAS = {**flop_registry, torch.ops.aten.convolution_backward: _convolution_backward}


class _Meter(TorchDispatchMode):
    """Counts operations and saved tensors for the part of the step that they belong to.

    A node of the backward graph first unpacks its saved tensors, which identifies its part.

    Args:
        known: tensors that exist outside of the step, such as parameters, and are not counted as saved.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.saved: Counter[str] = Counter()
        self.norms: list[Normalization] = []
        self.gradients: list[int] = []
        self.peak = 0
        self._inside = ["loss"]
        self._returning: str | None = None
        # Addresses of living storages; an address may be reused after its storage is freed.
        self._known = {t.untyped_storage()._cdata for t in known}
        self._booked = set(self._known)
        self._living = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            if self._returning is None:
                self.forward[self._inside[-1]] += flops
            else:
                self.backward[self._returning] += flops
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._live(tensor.untyped_storage())
        return out

    def _live(self, storage: torch.UntypedStorage) -> None:
        if self._first(storage, self._known):
            self._living += storage.nbytes()
            self.peak = max(self.peak, self._living)
            weakref.finalize(storage, self._die, storage.nbytes())

    def _die(self, size: int) -> None:
        self._living -= size

    @staticmethod
    def _first(storage: torch.UntypedStorage, seen: set[int]) -> bool:
        """Whether a storage is new; adds it to those seen as long as it lives."""
        if storage._cdata in seen:
            return False
        seen.add(storage._cdata)
        weakref.finalize(storage, seen.discard, storage._cdata)
        return True

    def watch(self, model: nn.Module) -> None:
        """Records the running part, calls of BatchNorm, and gradients in the order in which backward computes them."""
        for name, module in model.named_modules():
            if (part := _owner(name)) != _owner(name.rpartition(".")[0]):
                for called in module if isinstance(module, nn.ModuleList) else [module]:
                    self._watch(called, part)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(self._note)  # recomputation may stop before forward hooks
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.gradients.append(p.nbytes))

    def _watch(self, module: nn.Module, part: str) -> None:
        def leave(*_: Any) -> None:  # returns None, since a result of a hook would replace the output
            self._inside.pop()

        module.register_forward_pre_hook(lambda *_: self._inside.append(part))
        module.register_forward_hook(leave)

    def _note(self, module: Any, inputs: tuple[Any, ...]) -> None:
        x, *counts = inputs[:2]
        element = torch.promote_types(x.dtype, torch.float32).itemsize
        returns = torch.is_grad_enabled() and self._returning is None
        groups = max(1, len(counts[0]) if counts else 1)
        self.norms.append(Normalization(module.num_features, groups, element, returns))

    def run(self, precision: str, loss: Callable[[], Tensor]) -> None:
        """Counts forward and backward; `precision` is a value of ``trainer.precision``."""
        dtype = AUTOCAST.get(precision)
        with self, torch.autograd.graph.saved_tensors_hooks(self._save, self._take_out):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                value = loss()
            value.backward()

    def _save(self, tensor: Tensor) -> tuple[str, Tensor]:
        part, storage = self._inside[-1], tensor.untyped_storage()
        if self._first(storage, self._booked):
            self.saved[part] += storage.nbytes()
        return part, tensor

    def _take_out(self, saved: tuple[str, Tensor]) -> Tensor:
        self._returning, tensor = saved
        return tensor


@functools.cache
def step(config: Config, images: int, processes: int) -> Count:
    """Counts a step.

    Args:
        config: configuration of the run, with the montage of the epoch to count.
        images: images per process and micro-batch, N.
        processes: number of processes times micro-batches, whose targets the loss compares with.
    """
    geometry, precision = config.montage, config.trainer.precision
    model = _without_memory(config)

    def loss() -> Tensor:
        total: Tensor = model(query, key).loss
        return total

    tile_boxes(geometry, images)  # fills its cache, which must not contain fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True), distributed.imagined(processes) as gathered:
        model.to_empty(device="cpu")
        canvases = (sum(geometry.canvases(images)), 3, geometry.canvas, geometry.canvas)
        query, key = (in_order(geometry, images, torch.empty(canvases, dtype=_dtype(precision))) for _ in range(2))
        meter = _Meter([*model.parameters(), *model.buffers(), query.pixels, key.pixels])
        meter.watch(model)
        meter.run(precision, loss)
    parameters = Counter[str]()
    for name, p in model.named_parameters():
        parameters[_owner(name)] += p.numel()
    counts = meter.forward, meter.backward, meter.saved, parameters
    return Count(*counts, meter.norms, meter.gradients, gathered, meter.peak)


@functools.cache
def supervised(backbone: str, side: int = 224) -> int:
    """FLOPs per image of a supervised training step, with a classifier of 1,000 classes.

    Args:
        backbone: value of ``model.backbone``.
        side: side of the images in pixels.
    """
    images = 8
    with torch.device("meta"):
        model = Backbone(backbone)
        classifier = nn.Linear(model.channels[0], 1000)
        pixels, labels = torch.empty(images, 3, side, side), torch.empty(images, dtype=torch.int64)
    return flops(lambda: F.cross_entropy(classifier(model(pixels)[0].mean((2, 3))), labels)) // images


def flops(loss: Callable[[], Tensor]) -> int:
    """FLOPs of computing a loss in fp32 and of its backward.

    Args:
        loss: computes the loss from tensors without memory, such as those of the device meta.
    """
    meter = _Meter()
    meter.run("fp32", loss)
    return meter.forward.total() + meter.backward.total()


def state(config: Config) -> dict[str, int]:
    """Bytes that a process holds permanently, measured on the device meta after a step of the optimiser.

    Returns:
        ``parameters`` and ``momentum_network`` (with their buffers), ``gradients``, ``optimizer``.
    """
    model = _without_memory(config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.empty_like(p)
    optimizer = build_optimizer(config.optim, model)
    for group in optimizer.param_groups:
        group["fused"] = False  # PyTorch's fused kernels do not support meta tensors; the state is the same
    optimizer.step()
    target = _bytes(model.target.state_dict().values()) if model.target else 0
    held = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    return {
        "parameters": _bytes(model.state_dict().values()) - target,
        "gradients": _bytes(trainable),
        "optimizer": _bytes(held),
        "momentum_network": target,
    }


def _without_memory(config: Config) -> Objective:
    """The model of a run on the device meta, in the dtype of its precision."""
    with torch.device("meta"):
        labelled = OBJECTIVES[config.objective].labelled
        return build(config, _CLASSES if labelled else ()).to(_dtype(config.trainer.precision))


def _dtype(precision: str) -> torch.dtype:
    return torch.float64 if precision == "fp64" else torch.float32


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
