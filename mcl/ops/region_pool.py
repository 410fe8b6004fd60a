"""Region pooling: RoIAlign over several maps in one launch, with a deterministic backward pass.

Shape letters: n canvases of a map, C channels, R boxes, P output_size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mcl.ops.library import library

MAX_MAPS = 8


def region_pool(
    features: Sequence[Tensor],
    strides: Sequence[float],
    boxes: Tensor,
    index: Tensor,
    output_size: int,
    sampling_ratio: int = 0,
) -> Tensor:
    """Pools boxes from feature maps: RoIAlign with ``aligned=True`` (arXiv 1703.06870), over all maps at once.

    A box is divided into P x P bins; a bin is the mean of bilinear samples in it. If every sample of a box lies on a
    cell centre, cells are copied bit for bit. fp16, bf16 and fp32 are summed in fp32, fp64 in fp64. The backward pass
    adds boxes in their order, without atomics, so it is deterministic. Nothing is read back from the device.

    Boxes with non-finite or reversed edges, or with a map or row that does not exist, give 0 and no gradient; so do
    boxes without area if `sampling_ratio` is 0.

    Args:
        features: maps (n, C, H, W), at most 8, of one dtype and device; n, H, W may differ. Any memory format; maps are
            not copied.
        strides: canvas pixels per cell, per map.
        boxes: (R, 5) row of the map, then x1, y1, x2, y2 in canvas pixels. They have no gradient.
        index: (R,) int64, the map that a box is pooled from.
        output_size: bins per side, P.
        sampling_ratio: samples per bin and side; 0: one per cell that a bin covers, at most the map's size.

    Returns:
        (R, C, P, P), channels_last if all maps are.

    Raises:
        ValueError: arguments do not fit each other; the message names them.
    """
    _check(features, strides, boxes, index, output_size, sampling_ratio)
    pooled: Tensor = torch.ops.mcl.region_pool(
        list(features), [float(s) for s in strides], boxes.detach(), index, output_size, sampling_ratio
    )
    return pooled


def _check(
    features: Sequence[Tensor],
    strides: Sequence[float],
    boxes: Tensor,
    index: Tensor,
    output_size: int,
    sampling_ratio: int,
) -> None:
    if not 1 <= len(features) <= MAX_MAPS:
        raise ValueError(f"features: {len(features)} maps; 1 to {MAX_MAPS} are possible")
    if len(strides) != len(features) or min(strides) <= 0:
        raise ValueError(f"strides: {list(strides)} must be one positive number for each of {len(features)} maps")
    shapes = [tuple(f.shape) for f in features]
    if any(f.ndim != 4 for f in features) or len({s[1] for s in shapes}) > 1 or any(0 in s[2:] for s in shapes):
        raise ValueError(f"features: shapes {shapes} must be (n, C, H, W) with one C and no empty side")
    if not all(f.dtype.is_floating_point for f in features):
        raise ValueError(f"features: {[f.dtype for f in features]} must be floating-point")
    if boxes.ndim != 2 or boxes.shape[1] != 5 or not boxes.dtype.is_floating_point:
        raise ValueError(
            f"boxes: {boxes.dtype} {tuple(boxes.shape)} must be floating-point (R, 5): row, x1, y1, x2, y2"
        )
    if index.dtype != torch.int64 or index.shape != boxes.shape[:1]:
        raise ValueError(f"index: {index.dtype} {tuple(index.shape)} must be int64 with one entry per box")
    devices = {str(t.device) for t in (*features, boxes, index)}
    if len(devices) > 1:
        raise ValueError(f"features, boxes and index are on {sorted(devices)}; move them to one device")
    if not 1 <= output_size <= 1024:
        raise ValueError(f"output_size: {output_size} must be from 1 to 1024")
    if not 0 <= sampling_ratio <= 1024:
        raise ValueError(f"sampling_ratio: {sampling_ratio} must be from 0 to 1024")


def channels_last(features: Sequence[Tensor]) -> bool:
    """Whether all maps are channels_last; then the results are as well."""
    return all(f.stride(1) == 1 for f in features)


def _format(last: bool) -> torch.memory_format:
    return torch.channels_last if last else torch.contiguous_format


@torch.library.register_fake("mcl::region_pool", lib=library)
def _fake(
    features: list[Tensor], strides: list[float], boxes: Tensor, index: Tensor, output_size: int, sampling_ratio: int
) -> Tensor:
    size = (boxes.shape[0], features[0].shape[1], output_size, output_size)
    return torch.empty(
        size, dtype=features[0].dtype, device=features[0].device, memory_format=_format(channels_last(features))
    )


@torch.library.register_fake("mcl::region_pool_backward", lib=library)
def _fake_backward(
    grad: Tensor, sizes: list[int], strides: list[float], boxes: Tensor, index: Tensor, ratio: int, last: bool
) -> list[Tensor]:
    return [
        torch.empty(sizes[i : i + 4], dtype=grad.dtype, device=grad.device, memory_format=_format(last))
        for i in range(0, len(sizes), 4)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, ctx.strides, boxes, index, _, ctx.ratio = inputs
    ctx.sizes = [side for f in features for side in f.shape]
    ctx.last = channels_last(features)
    ctx.save_for_backward(boxes, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.mcl.region_pool_backward(grad, ctx.sizes, ctx.strides, *ctx.saved_tensors, ctx.ratio, ctx.last)
    return grads, None, None, None, None, None


def _setup_twice(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, _, ctx.strides, boxes, index, ctx.ratio, _ = inputs
    ctx.bins = grad.shape[2]
    ctx.save_for_backward(boxes, index)


def _backward_twice(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Pooling is linear, so the derivative of its backward pass is pooling."""
    pooled = torch.ops.mcl.region_pool(grads, ctx.strides, *ctx.saved_tensors, ctx.bins, ctx.ratio)
    return pooled, None, None, None, None, None, None


torch.library.register_autograd("mcl::region_pool", _backward, setup_context=_setup, lib=library)
torch.library.register_autograd("mcl::region_pool_backward", _backward_twice, setup_context=_setup_twice, lib=library)

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _autocast(features: list[Tensor], *args: Any) -> Tensor:
    """Maps are cast to the widest of their dtypes; boxes are not rounded."""
    widest = features[0].dtype
    for f in features:
        widest = torch.promote_types(widest, f.dtype)
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        pooled: Tensor = torch.ops.mcl.region_pool([f.to(widest) for f in features], *args)
    return pooled


for _key in ("AutocastCPU", "AutocastCUDA"):
    library.impl("region_pool", _autocast, _key)
