"""Slower implementations of the operators in PyTorch and torchvision, for devices that the extension does not support.

They read nothing back to the host either.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torchvision  # noqa: F401  brings torch.ops.torchvision
from torch import Tensor

from mcl.ops.library import fallback
from mcl.ops.region_pool import channels_last


def _rois(
    level: int, shape: tuple[int, ...], stride: float, boxes: Tensor, index: Tensor, bins: int, ratio: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mask (R,) of the boxes that are pooled from a map, and all boxes in torchvision's format, (R, 5).

    The other boxes are placed outside of the map without area. They cost nothing, and the host need not select boxes.
    """
    rows, _, height, width = shape
    row, *edges = boxes.to(dtype).unbind(1)
    mine = (index == level) & (row >= 0) & (row < rows)
    for low, high in zip(edges[:2], edges[2:], strict=True):
        mine &= (high - low >= 0) & (high - low).isfinite()
    if not ratio:  # limits bins to three times the map: torchvision takes one sample per cell
        sides = (width, height, width, height)
        edges = [e.clamp(-bins * s * stride, (bins + 1) * s * stride) for e, s in zip(edges, sides, strict=True)]
    return mine, torch.stack([row.where(mine, 0), *(e.where(mine, -2 * stride) for e in edges)], 1)


def _like_the_operator(x: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """A copy with the memory format of the fake kernels."""
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout).copy_(x)


@fallback("region_pool")
def region_pool(
    features: list[Tensor], strides: list[float], boxes: Tensor, index: Tensor, output_size: int, sampling_ratio: int
) -> Tensor:
    channels, dtype = features[0].shape[1], features[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    pooled = features[0].new_zeros(len(boxes), channels, output_size, output_size, dtype=wide)
    for level, (f, stride) in enumerate(zip(features, strides, strict=True)):
        mine, rois = _rois(level, f.shape, stride, boxes, index, output_size, sampling_ratio, wide)
        if len(f):
            found = torch.ops.torchvision.roi_align(
                f.to(wide), rois, 1 / stride, output_size, output_size, sampling_ratio, True
            )
            pooled = found.where(mine[:, None, None, None], pooled)
    return _like_the_operator(pooled, dtype, channels_last(features))


@fallback("region_pool_backward")
def region_pool_backward(
    grad: Tensor, sizes: list[int], strides: list[float], boxes: Tensor, index: Tensor, ratio: int, last: bool
) -> list[Tensor]:
    if grad.is_cuda:  # torchvision uses atomics
        torch._prims_common.alert_not_deterministic("region pooling without mcl's CUDA kernels")
    wide, bins = grad.to(torch.promote_types(grad.dtype, torch.float32)), grad.shape[2]
    grads = []
    for level, stride in enumerate(strides):
        shape = tuple(sizes[4 * level : 4 * level + 4])
        _, rois = _rois(level, shape, stride, boxes, index, bins, ratio, wide.dtype)
        of_map = torch.ops.torchvision._roi_align_backward(wide, rois, 1 / stride, bins, bins, *shape, ratio, True)
        grads.append(_like_the_operator(of_map, grad.dtype, last))
    return grads


@fallback("batch_norm_stats")
def batch_norm_stats(x: Tensor, counts: list[int]) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cells = x[0, 0].numel()
    groups = []
    for rows, count in zip(wide.split(counts), counts, strict=True):
        var, mean = torch.var_mean(rows, _over_rows(x), correction=0)
        number = wide.new_full((1,), float(count * cells))
        groups.append(torch.cat([mean, var * number, number]))
    return torch.stack(groups)[None]


@fallback("batch_norm_stats_alone")
def batch_norm_stats_alone(x: Tensor, counts: list[int], *rest: Any) -> Tensor:
    statistics: Tensor = batch_norm_combine(batch_norm_stats(x, counts), *rest)
    return statistics


@fallback("batch_norm_combine")
def batch_norm_combine(
    parts: Tensor, running_mean: Tensor | None, running_var: Tensor | None, batches: Tensor | None,
    momentum: float | None, eps: float,
) -> Tensor:  # fmt: skip
    mean, squares, rows = (part.double() for part in _parted(parts))
    all_rows = rows.sum(0)
    center = (mean * rows).sum(0) / all_rows
    squares = (squares + (mean - center).square() * rows).sum(0)
    inverse = (squares / all_rows + eps).rsqrt()
    for group in range(len(center)):
        if batches is not None:
            batches += 1
        if running_mean is None or running_var is None:
            continue
        share: Any = 1 / batches if momentum is None else momentum  # type: ignore[operator]
        var = squares[group] / (all_rows[group] - 1)
        for running, new in ((running_mean, center[group]), (running_var, var)):
            running.copy_((1 - share) * running + share * new)
    return torch.cat([center, inverse, all_rows], 1).to(parts.dtype)


@fallback("batch_norm_apply")
def batch_norm_apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, counts: list[int],
    residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)
    added = itertools.repeat(None) if residual is None else residual.split(counts)
    for rows, own, more, to in zip(x.split(counts), statistics, added, y.split(counts), strict=False):
        value = _affine(rows, weight, bias, own)
        value = value if more is None else value + more
        to.copy_(value.relu() if relu else value)
    return y


@fallback("batch_norm_backward_reduce")
def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, statistics: Tensor,
    counts: list[int], relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    passed = grad.new_empty(0, dtype=statistics.dtype) if y is None else torch.where(y <= 0, 0, grad)
    sums = []
    for rows, of_y, own in zip(x.split(counts), (grad if y is None else passed).split(counts), statistics, strict=True):
        through = _through(of_y, rows, weight, bias, own, relu and y is None)
        sums.append(torch.stack([(through * f).sum(_over_rows(x)) for f in (1, _affine(rows, None, None, own))]))
    by_group = torch.stack(sums, 1)
    return by_group, by_group.sum(1), passed


@fallback("batch_norm_backward_apply")
def batch_norm_backward_apply(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, sums: Tensor,
    counts: list[int], relu: bool,
) -> Tensor:  # fmt: skip
    of_x = torch.empty_like(x)
    groups = zip(x.split(counts), grad.split(counts), statistics, sums.unbind(1), of_x.split(counts), strict=True)
    for rows, of_y, own, of_group, to in groups:
        plain, weighted = (_along(x, total / own[-1]) for total in of_group)
        through = _through(of_y, rows, weight, bias, own, relu)
        scale = own[x.shape[1] : -1] if weight is None else own[x.shape[1] : -1] * weight
        to.copy_(_along(x, scale) * (through - plain - _affine(rows, None, None, own) * weighted))
    return of_x


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor) -> Tensor:
    """Normalised rows of a group, in the dtype of its statistics (2 c + 1,)."""
    mean, inverse, _ = _parted(statistics)
    value = (x.to(mean) - _along(x, mean)) * _along(x, inverse if weight is None else inverse * weight)
    return value if bias is None else value + _along(x, bias)


def _through(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, relu: bool
) -> Tensor:
    """The gradient of a group before ReLU."""
    wide = grad.to(statistics)
    return torch.where(_affine(x, weight, bias, statistics) <= 0, 0, wide) if relu else wide


def _parted(statistics: Tensor) -> tuple[Tensor, ...]:
    """Splits statistics (..., 2 c + 1) into two parts (..., c) and the numbers of rows (..., 1)."""
    channels = statistics.shape[-1] // 2
    parts: tuple[Tensor, ...] = statistics.split([channels, channels, 1], -1)
    return parts


def _over_rows(x: Tensor) -> list[int]:
    """All dimensions except channels."""
    return [0, *range(2, x.dim())]


def _along(x: Tensor, values: Tensor) -> Tensor:
    """Values (c,), reshaped to broadcast over the channels of x."""
    return values.view(-1, *[1] * (x.dim() - 2))


@fallback("norms")
def norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors))


@fallback("lars_")
def lars_(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], given: Tensor | None, lr: float,
    momentum: float, weight_decay: float, trust_coefficient: float, adapt: bool, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    steps = torch._foreach_add(grads, weights, alpha=weight_decay)
    if adapt:
        weight_norms, grad_norms = (norms(weights), norms(grads)) if given is None else given.unbind()
        scale = grad_norms + weight_decay * weight_norms
        trust = torch.where(scale > 0, trust_coefficient * weight_norms / scale, 0.0)
        torch._foreach_mul_(steps, list((trust * lr).unbind()))
    else:
        torch._foreach_mul_(steps, lr)
    with _unless(found_inf, [*weights, *momenta]):
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, steps)
        torch._foreach_sub_(weights, momenta)


@fallback("ema_")
def ema_(targets: list[Tensor], onlines: list[Tensor], momentum: float, found_inf: Tensor | None = None) -> None:
    with _unless(found_inf, targets):
        torch._foreach_mul_(targets, momentum)
        torch._foreach_add_(targets, onlines, alpha=1 - momentum)


@contextlib.contextmanager
def _unless(found_inf: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """Restores the tensors on exit if `found_inf` is not 0, without reading it on the host."""
    if found_inf is None:
        yield
        return
    kept = [t.clone() for t in tensors]
    yield
    for now, before in zip(tensors, kept, strict=True):
        torch.where(found_inf.reshape(()) == 0, now, before, out=now)
