"""Kernel launches of a training step, and the memory that its BatchNorms move: ``python -m tests.kernels.launches``.

Forward and backward of both views run on PyTorch's fake tensors, and every operator counts as the kernels that it
launches on a GPU. For our operators, a test compares these counts with the sources; those of PyTorch and cuDNN are in
the table below. The tensors claim to be on a CPU, since autograd needs a driver for others; a test checks that forward
calls the same operators on a GPU.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import markdown
from dali_pipelines.batch import MontageBatch, in_order
from dali_pipelines.layout import tile_boxes
from mcl import config
from mcl.config import Config
from mcl.models.norm import BatchNorm
from mcl.objectives import MCL

_VIEWS = """detach device empty empty_like expand new_empty promote_types select slice split_with_sizes t unbind
    unsqueeze view"""
_ONE = """_allgather_base_ _log_softmax _log_softmax_backward_data _to_copy add add_ addmm allreduce_ avg_pool2d
    avg_pool2d_backward cat clamp_min clone convolution copy_ div eq gather gt index_copy_ linalg_vector_norm
    masked_fill_ max_pool2d_with_indices mean mm mul neg new_full nll_loss_forward ones_like relu_ scalar_tensor stack
    sub sum threshold_backward upsample_nearest2d upsample_nearest2d_backward where zero_"""
LAUNCHES = {
    **dict.fromkeys(_VIEWS.split(), 0),
    **dict.fromkeys(_ONE.split(), 1),
    # Includes the zeros to which the next kernel adds.
    **dict.fromkeys(("max_pool2d_with_indices_backward", "nll_loss_backward"), 2),
    # channels_last. Forward: statistics; running statistics and 1 / standard deviation; the map. Backward: sums; the
    # map.
    "native_batch_norm": 3,
    "native_batch_norm_backward": 2,
    "batch_norm_stats": 2,
    "batch_norm_stats_alone": 2,
    "batch_norm_combine": 1,
    "batch_norm_apply": 1,
    "batch_norm_backward_reduce": 2,
    "batch_norm_backward_apply": 1,
    "region_pool": 1,
    "region_pool_backward": 2,
}
"""Launches per operator; ``convolution_backward`` has one per gradient instead."""

PASSES = {
    "native_batch_norm": 3,
    "native_batch_norm_backward": 5,
    "add_": 3,
    "relu_": 2,
    "threshold_backward": 3,
    "batch_norm_stats": 1,
    "batch_norm_stats_alone": 1,
    "batch_norm_combine": 0,
    "batch_norm_apply": 2,
    "batch_norm_backward_reduce": 2,
    "batch_norm_backward_apply": 3,
}
"""Passes over maps by norms, and by the additions and ReLUs after them."""

KINDS = ("BatchNorm", "convolutions, matrix products", "all others")
_PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm"}


class Meter(TorchDispatchMode):
    """Counts launches by kind, and the bytes that norms read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        self.operators[name] += 1
        kind = KINDS[0 if name in PASSES else 1 if name in _PRODUCTS else 2]
        self.launches[kind] += sum(args[-1]) if name == "convolution_backward" else LAUNCHES[name]
        if name in PASSES and args[0].dim():  # scalars count batches
            self.moved += (PASSES[name] + self._more(name, args)) * args[0].nbytes
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _more(name: str, args: Any) -> int:
        """Passes for a residual, which is read, or for its gradient, which is written after y has been read."""
        if name == "batch_norm_apply":
            return int(args[5] is not None)
        return 2 * (args[2] is not None) if name == "batch_norm_backward_reduce" else 0


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """Autocast to bf16 as on a GPU, even without one."""
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    torch.autocast_increment_nesting()  # otherwise inner contexts would clear the cache of cast weights when they end
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()


def in_turn(norm: BatchNorm) -> Any:
    """Forward with PyTorch's BatchNorm: each group separately, then the addition, then ReLU."""

    def forward(x: Tensor, counts: Sequence[int] = (), residual: Tensor | None = None, relu: bool = False) -> Tensor:
        groups = [_BatchNorm.forward(norm, rows) for rows in (x.split(list(counts)) if len(counts) > 1 else [x])]
        y = torch.cat(groups) if len(groups) > 1 else groups[0]
        if residual is not None:
            y += residual
        return y.relu_() if relu else y

    return forward


def as_before(model: MCL) -> None:
    """Replaces a model's norms by PyTorch's, and processes one view after another."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.forward = in_turn(module)  # type: ignore[method-assign]
    for name in ("embeddings", "predictions", "targets"):
        together = getattr(model, name)
        setattr(model, name, lambda views, together=together: [together([view])[0] for view in views])


def step(cfg: Config, images: int, before: bool, device: str = "cpu") -> tuple[Meter, Meter]:
    """Forward and backward, on a CPU only; `before` uses :func:`as_before`."""
    with torch.device("meta"):
        model = MCL(cfg).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tile_boxes(cfg.montage, images)  # fills the cache with real tensors before fake ones are used
    forward, backward = Meter(), Meter()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        if before:
            as_before(model)
        query, key = (_view(cfg, images, device) for _ in range(2))
        with autocast(device), forward:
            loss = model(query, key).loss
        if device == "cpu":
            with backward:
                loss.backward()
    return forward, backward


def _view(cfg: Config, images: int, device: str) -> MontageBatch:
    side = cfg.montage.canvas
    view = in_order(cfg.montage, images, torch.empty(sum(cfg.montage.canvases(images)), 3, side, side))
    tensors = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
    moved: dict[str, Any] = {
        name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in tensors.items() if isinstance(t, Tensor)
    }
    moved["pixels"] = moved["pixels"].to(memory_format=torch.channels_last)
    return dataclasses.replace(view, **moved)


@functools.cache
def counted() -> tuple[Meter, Meter]:
    """Counts of a whole step of the default configuration, ResNet-50 in bf16 with 128 images: before, and now."""
    cfg, total = config.from_dict({}), []
    for before in (True, False):
        forward, backward = step(cfg, 128, before)
        forward.launches += backward.launches
        forward.moved += backward.moved
        total.append(forward)
    return total[0], total[1]


def table() -> str:
    """The counts as Markdown."""
    before, now = counted()
    rows = [[kind, before.launches[kind], now.launches[kind]] for kind in KINDS]
    rows.append(["**launches**", before.launches.total(), now.launches.total()])
    rows.append(["**GB that BatchNorm reads and writes**", before.moved / 1e9, now.moved / 1e9])
    shown = [[what, f"{a:,.4g}", f"{b:,.4g}", f"{b / a - 1:+.0%}"] for what, a, b in rows]
    return markdown(["a step", "PyTorch's BatchNorm, view by view", "ours", ""], shown)


if __name__ == "__main__":
    print(table())
