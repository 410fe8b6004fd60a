"""FLOPs and bytes of a training step, counted while the real modules run on tensors without memory.

The tensors are PyTorch's fake ones: shapes and types as on a CPU, autocast included, and no data; so a step of any size
takes seconds. What is counted is what runs, forward and backward, both views:

* 2 FLOPs per multiply-add of convolutions and matrix products, as PyTorch's own formulas have it. Backward is counted
  from the gradients that autograd really computes; the first convolution, for example, has none towards its input.
* Not counted, since they compute little for what they read and write: BatchNorm, activations, pooling, interpolation,
  softmax, clipping, optimiser and momentum update; region pooling, which on the montage's grid only copies.
* Bytes of what autograd keeps between forward and backward, each piece of memory once. (Under autocast a fake BatchNorm
  keeps its two statistics per channel in 2 bytes each, a real one in 4: 0.2 MB of R50's gigabytes.)
* What several processes would have to exchange: calls of BatchNorm, gradients in the order in which they come, targets.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mcl import montage
from mcl.config import ModelConfig, OptimConfig
from mcl.distributed import Gather
from mcl.models import MCL
from mcl.montage import Geometry, MontageBatch
from mcl.optim import AUTOCAST, build_optimizer

PARTS = ("backbone", "FPN", "head", "projector", "predictors", "loss", "momentum network")
"""What a step consists of. `head` are its convolutions; everything of the momentum network is in the last."""


@dataclass(frozen=True)
class Normalization:
    """A call of a BatchNorm in training mode."""

    channels: int
    element: int  # bytes of what its statistics are computed in
    returns: bool  # whether backward comes through it; not where it is computed again, nor in the momentum network


@dataclass(frozen=True)
class Count:
    """Of one process's training step, by part."""

    forward: Mapping[str, int]  # FLOPs
    backward: Mapping[str, int]  # FLOPs
    saved: Mapping[str, int]  # bytes that autograd keeps for backward
    parameters: Mapping[str, int]  # how many, buffers excluded
    norms: Sequence[Normalization]  # in the order of calls
    gradients: Sequence[int]  # bytes of each, in the order in which backward computes them
    targets: Sequence[int]  # bytes of a bank, per view, before they are gathered

    @property
    def flops(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())


class _Meter(TorchDispatchMode):
    """Books what runs and what is saved on the part of the step that it belongs to.

    A node of the backward graph begins by taking out what it has saved, which tells whose it is.

    Args:
        known: tensors that exist anyway, and are not counted as saved.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.saved: Counter[str] = Counter()
        self.norms: list[Normalization] = []
        self.gradients: list[int] = []
        self._inside = ["loss"]
        self._returning: str | None = None
        self._storages = {storage._cdata: storage for storage in (t.untyped_storage() for t in known)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            if self._returning is None:
                self.forward[self._inside[-1]] += flops
            else:
                self.backward[self._returning] += flops
        return out

    def watch(self, part: str, module: nn.Module) -> None:
        """What this module does belongs to `part`, unless a module within it is watched itself."""

        def enter(*_: Any) -> None:
            self._inside.append(part)

        def leave(*_: Any) -> None:
            self._inside.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def watch_exchanges(self, model: nn.Module) -> None:
        """Notes calls of BatchNorms, and gradients as they come."""

        def note(module: Any, inputs: tuple[Any, ...], _: Any) -> None:
            x, *counts = inputs[:2]
            element = torch.promote_types(x.dtype, torch.float32).itemsize
            returns = torch.is_grad_enabled() and self._returning is None
            groups = max(1, len(counts[0]) if counts else 1)  # each is normalised by itself
            self.norms += [Normalization(module.num_features, element, returns)] * groups

        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_hook(note)
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.gradients.append(_bytes([p])))

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Within it, what autograd saves is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._save, self._take_out)

    def _save(self, tensor: Tensor) -> tuple[str, Tensor]:
        part, storage = self._inside[-1], tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage  # kept, so that no other storage gets its place
            self.saved[part] += storage.nbytes()
        return part, tensor

    def _take_out(self, saved: tuple[str, Tensor]) -> Tensor:
        self._returning, tensor = saved
        return tensor


class _Gathered(MCL):
    """MCL as one of several processes: its banks of targets are as large as those of all."""

    processes = 1
    own: Sequence[int] = ()  # bytes of its own part of them

    def banks(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> list[Gather]:
        banks = [bank.wait() for bank in super().banks(parts)]
        self.own = [_bytes([bank]) for bank in banks]
        return [Gather(bank.repeat(self.processes, 1)) for bank in banks]


@functools.cache
def step(
    model: ModelConfig, geometry: Geometry, images: int, processes: int, precision: str, recompute: bool = False
) -> Count:
    """Counts a step of MCL.

    Args:
        model: section of the configuration.
        geometry: of the epoch in question.
        images: per process, N; of a micro-batch, where gradients are accumulated.
        processes: whose targets are compared with; times micro-batches.
        precision, recompute: of section ``trainer``.
    """
    dtype = torch.float64 if precision == "fp64" else torch.float32
    with torch.device("meta"):
        mcl = _Gathered(model, geometry)
    mcl.processes = processes
    mcl.online.backbone.recompute = recompute
    with FakeTensorMode():
        _make_fake(mcl, dtype)
        parts = _modules(mcl)
        owner = {id(p): part for part, modules in parts.items() for module in modules for p in module.parameters()}
        views = [_view(geometry, images, dtype) for _ in range(2)]
        meter = _Meter([*mcl.parameters(), *mcl.buffers(), *(view.images for view in views)])
        for part, modules in parts.items():
            for module in modules:
                meter.watch(part, module)
        meter.watch_exchanges(mcl)
        _run(meter, precision, lambda: mcl(*views).loss)
    parameters = Counter[str]()
    for p in mcl.parameters():
        parameters[owner[id(p)]] += p.numel()
    return Count(meter.forward, meter.backward, meter.saved, parameters, meter.norms, meter.gradients, mcl.own)


@functools.cache
def supervised(backbone: str, side: int = 224) -> int:
    """FLOPs per image of a supervised training step of torchvision's model, classifier included.

    Args:
        side: of the images, pixels.
    """
    images = 8
    with torch.device("meta"):
        model = torchvision.models.get_model(backbone)
    with FakeTensorMode():
        _make_fake(model, torch.float32)
        pixels, labels = torch.empty(images, 3, side, side), torch.empty(images, dtype=torch.int64)
        meter = _Meter([])
        _run(meter, "fp32", lambda: F.cross_entropy(model(pixels), labels))
    return (meter.forward.total() + meter.backward.total()) // images


@dataclass(frozen=True)
class State:
    """Bytes that a process holds at all times."""

    parameters: int  # of the online network, with its buffers
    gradients: int
    optimizer: int
    momentum_network: int  # with its buffers


def state(model: ModelConfig, geometry: Geometry, optim: OptimConfig, precision: str) -> State:
    """Measures what a step leaves behind: every gradient, and the optimiser's state, on the meta device."""
    with torch.device("meta"):
        mcl = MCL(model, geometry).to(torch.float64 if precision == "fp64" else torch.float32)
    trainable = [p for p in mcl.parameters() if p.requires_grad]
    for p in trainable:
        p.grad = torch.empty_like(p)
    optimizer = build_optimizer(optim, mcl)
    optimizer.step()
    buffers = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    target = [*mcl.target.parameters(), *mcl.target.buffers()]
    everything = [*mcl.parameters(), *mcl.buffers()]
    return State(_bytes(everything) - _bytes(target), _bytes(trainable), _bytes(buffers), _bytes(target))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _modules(mcl: MCL) -> dict[str, list[nn.Module]]:
    """Modules of each part; those within others come later."""
    online = mcl.online
    return {
        "backbone": [online.backbone],
        "FPN": [online.fpn],
        "head": [online.head],
        "projector": [online.head.projector],
        "predictors": list(mcl.predictors),
        "momentum network": [mcl.target],
    }


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model tensors of the mode that is active, in place of its own."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad))
        for name, b in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(b.shape, dtype=dtype if b.is_floating_point() else b.dtype))


def _run(meter: _Meter, precision: str, loss: Callable[[], Tensor]) -> None:
    dtype = AUTOCAST.get(precision)
    with meter, meter.saving():
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            value = loss()
        value.backward()


def _view(geometry: Geometry, images: int, dtype: torch.dtype) -> MontageBatch:
    side = geometry.canvas
    return montage.in_order(geometry, images, torch.empty(sum(geometry.canvases(images)), 3, side, side, dtype=dtype))
