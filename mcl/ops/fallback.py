"""The operators in PyTorch and NumPy, for machines where the extension was not built: right, and slow for regions."""

import contextlib
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
