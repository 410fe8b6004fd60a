"""The operators in PyTorch and NumPy, for machines where the extension was not built: right, and slow for regions."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcl.ops.library import compiled, fallback, warn_slow


@dataclass(frozen=True)
class _Region:
    """One box: its number and map, the window of cells it reads, and the weights of these cells in its bins."""

    box: int
    level: int
    row: int
    y: slice
    x: slice
    weights_y: Tensor  # (P, h)
    weights_x: Tensor  # (P, w)

    @property
    def copy(self) -> bool:
        return all(len(w) == w.shape[1] and torch.equal(w, torch.eye(len(w))) for w in (self.weights_y, self.weights_x))


def _axis(
    low: float, high: float, scale: float, size: int, bins: int, ratio: int, real: Any
) -> tuple[slice, npt.NDArray[Any]] | None:
    """Cells and their weights (bins, cells) along one axis; None where there are no samples.

    The rules are those of kernels/csrc/region_sampling.h.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        start = real(low) * real(scale) - real(0.5)
        extent = real(high) * real(scale) - real(0.5) - start
    if not (np.isfinite(start) and np.isfinite(extent) and extent >= 0):
        return None
    bin_size = extent / real(bins)
    count = ratio or (size if bin_size >= size else int(np.ceil(bin_size)))
    if count == 0:
        return None
    bin_of, sample = np.divmod(np.arange(bins * count), count)
    at = start + bin_of.astype(real) * bin_size + (sample.astype(real) + real(0.5)) * bin_size / real(count)
    inside = (at >= -1) & (at <= size)
    bin_of, at = bin_of[inside], np.maximum(at[inside], real(0))
    left = np.minimum(at.astype(np.int64), size - 1)
    share = np.where(left == size - 1, real(0), at - left.astype(real))
    weights = np.zeros((bins, size), real)
    np.add.at(weights, (bin_of, left), real(1) - share)
    np.add.at(weights, (bin_of, np.minimum(left + 1, size - 1)), share)
    used = np.flatnonzero(weights.any(0))
    if not len(used):
        return None
    cells = slice(int(used[0]), int(used[-1]) + 1)
    return cells, weights[:, cells] / real(count)


def _regions(
    shapes: list[tuple[int, ...]], strides: list[float], boxes: Tensor, index: Tensor, bins: int, ratio: int,
    dtype: torch.dtype,
) -> Iterator[_Region]:  # fmt: skip
    """The boxes that give something; shapes of maps are (n, C, H, W)."""
    real = np.float64 if dtype == torch.float64 else np.float32
    for box, (level, (row, *edges)) in enumerate(zip(index.tolist(), boxes.tolist(), strict=True)):
        if not (0 <= level < len(shapes) and 0 <= row < shapes[level][0]):
            continue
        scale, (height, width) = 1 / strides[level], shapes[level][2:]
        y = _axis(edges[1], edges[3], scale, height, bins, ratio, real)
        x = _axis(edges[0], edges[2], scale, width, bins, ratio, real)
        if y and x:
            yield _Region(box, level, int(row), y[0], x[0], torch.from_numpy(y[1]), torch.from_numpy(x[1]))


def _weighted(equation: str, region: _Region, values: Tensor) -> Tensor:
    """Sum over bins or cells, in which a weight of zero leaves out even what is not finite."""
    y, x = (w.to(values.device) for w in (region.weights_y, region.weights_x))
    finite = torch.isfinite(values)
    result = torch.einsum(equation, y, values.where(finite, 0), x)
    if not finite.all():
        for special, found in (
            (torch.inf, values.isposinf()),
            (-torch.inf, values.isneginf()),
            (torch.nan, values.isnan()),
        ):
            hit = torch.einsum(equation, (y != 0).to(y), found.to(y), (x != 0).to(x)) > 0
            result = result + torch.where(hit, special, 0.0).to(result)
    return result


@fallback("region_pool")
def region_pool(
    features: list[Tensor], strides: list[float], boxes: Tensor, index: Tensor, output_size: int, sampling_ratio: int
) -> Tensor:
    if not compiled("region_pool", features[0].device.type):  # otherwise this is called by name, as by a test
        warn_slow()
    channels, dtype = features[0].shape[1], features[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    last = all(f.stride(1) == 1 for f in features)
    pooled = torch.zeros(len(boxes), channels, output_size, output_size, dtype=dtype, device=features[0].device)
    pooled = pooled.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    shapes = [tuple(f.shape) for f in features]
    for region in _regions(shapes, strides, boxes, index, output_size, sampling_ratio, dtype):
        window = features[region.level][region.row, :, region.y, region.x]
        if not region.copy:
            window = _weighted("py,cyx,qx->cpq", region, window.to(wide))
        pooled[region.box] = window
    return pooled


@fallback("region_pool_backward")
def region_pool_backward(
    grad: Tensor, sizes: list[int], strides: list[float], boxes: Tensor, index: Tensor, ratio: int, last: bool
) -> list[Tensor]:
    shapes = [tuple(sizes[i : i + 4]) for i in range(0, len(sizes), 4)]
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = [torch.zeros(shape, dtype=wide, device=grad.device) for shape in shapes]
    for region in _regions(shapes, strides, boxes, index, grad.shape[2], ratio, grad.dtype):
        into = sums[region.level][region.row, :, region.y, region.x]
        into += _weighted("py,cpq,qx->cyx", region, grad[region.box].to(wide))
    memory_format = torch.channels_last if last else torch.contiguous_format
    # Never a view of a sum: an operator's results must be tensors of their own.
    return [torch.empty_like(s, dtype=grad.dtype, memory_format=memory_format).copy_(s) for s in sums]


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
    """Rows of a group, normalised, in the dtype of its statistics (2 c + 1,)."""
    mean, inverse, _ = _parted(statistics)
    value = (x.to(mean) - _along(x, mean)) * _along(x, inverse if weight is None else inverse * weight)
    return value if bias is None else value + _along(x, bias)


def _through(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, relu: bool
) -> Tensor:
    """What ReLU lets through of a group's gradient."""
    wide = grad.to(statistics)
    return torch.where(_affine(x, weight, bias, statistics) <= 0, 0, wide) if relu else wide


def _parted(statistics: Tensor) -> tuple[Tensor, ...]:
    """(..., 2 c + 1) as batch_norm has it: two of (..., c), and the numbers of rows (..., 1)."""
    channels = statistics.shape[-1] // 2
    parts: tuple[Tensor, ...] = statistics.split([channels, channels, 1], -1)
    return parts


def _over_rows(x: Tensor) -> list[int]:
    """All dimensions but that of channels."""
    return [0, *range(2, x.dim())]


def _along(x: Tensor, values: Tensor) -> Tensor:
    """(c,) along the channels of x."""
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
    """Puts the tensors back as they were, without asking on the host, where `found_inf` is not 0."""
    if found_inf is None:
        yield
        return
    kept = [t.clone() for t in tensors]
    yield
    for now, before in zip(tensors, kept, strict=True):
        torch.where(found_inf.reshape(()) == 0, now, before, out=now)
