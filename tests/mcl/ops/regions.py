"""Maps and boxes for tests of region pooling, other implementations, and the allowed error."""

import math
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor

Pool = Callable[..., Tensor]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
STRIDES = [32.0, 16.0, 8.0]
"""Strides of :func:`maps`."""


def maps(dtype: torch.dtype, layout: torch.memory_format, channels: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, channels, 4, 4), (2, channels, 8, 7), (1, channels, 15, 17)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [f.contiguous(memory_format=layout).requires_grad_() for f in drawn]


def random_boxes(number: int, rows: list[int], reach: float, seed: int) -> tuple[Tensor, Tensor]:
    """(R, 5) boxes, some partly or completely outside of [0, reach], and (R,) numbers of maps."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(rows), (number,), generator=generator)
    corners = torch.rand(number, 2, 2, generator=generator) * reach * 1.4 - reach * 0.2
    low, high = corners.amin(1), corners.amax(1)
    row = (torch.rand(number, generator=generator) * torch.tensor(rows)[index]).floor()
    return torch.cat([row[:, None], low, high], 1), index


def reshaped(features: Tensor, ratio: int) -> Tensor:
    """The expected result on the grid: (n, C, r * cells, r * cells) cut into its tiles, (n * r^2, C, cells, cells)."""
    n, channels, height, _ = features.shape
    cells = height // ratio
    grid = features.reshape(n, channels, ratio, cells, ratio, cells)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n * ratio * ratio, channels, cells, cells)


def roi_align(
    features: list[Tensor], strides: list[float], boxes: Tensor, index: Tensor, size: int, ratio: int = 0
) -> Tensor:
    """torchvision's RoIAlign, map by map."""
    results = features[0].new_zeros(len(boxes), features[0].shape[1], size, size)
    for level, (f, stride) in enumerate(zip(features, strides, strict=True)):
        mine = index == level
        pooled = torchvision.ops.roi_align(f, boxes[mine].to(f.dtype), size, 1 / stride, ratio, True)
        results = results.index_put((mine.nonzero()[:, 0],), pooled)
    return results


def plain_pytorch(
    features: list[Tensor], strides: list[float], boxes: Tensor, index: Tensor, size: int, ratio: int
) -> Tensor:
    """RoIAlign by indexing, in the features' precision; coordinates are in fp64."""
    pooled = []
    for (row, x1, y1, x2, y2), level in zip(boxes.double().tolist(), index.tolist(), strict=True):
        f, stride = features[level][int(row)], strides[level]
        axes, samples = [], []
        for low, high, length in ((y1, y2, f.shape[1]), (x1, x2, f.shape[2])):
            count = ratio or math.ceil((high - low) / stride / size)
            step = (high - low) / stride / size / count
            at = low / stride - 0.5 + (torch.arange(size * count, dtype=torch.float64) + 0.5) * step
            samples.append((size, count))
            inside = (at >= -1) & (at <= length)
            at = at.clamp(0, length - 1)
            left = at.floor().long().clamp(max=length - 1)
            share = (at - left).to(f.dtype)
            axes.append((left, (left + 1).clamp(max=length - 1), 1 - share, share, inside.to(f.dtype)))
        (yl, yh, wyl, wyh, iny), (xl, xh, wxl, wxh, inx) = axes
        rows = f[:, yl] * wyl[:, None] + f[:, yh] * wyh[:, None]
        cells = (rows[:, :, xl] * wxl + rows[:, :, xh] * wxh) * iny[:, None] * inx
        pooled.append(cells.unflatten(2, samples[1]).unflatten(1, samples[0]).mean((2, 4)))
    return torch.stack(pooled)


def check_errors(
    pool: Pool, features: list[Tensor], boxes: Tensor, index: Tensor, size: int, ratio: int, device: str = "cpu"
) -> None:
    """Pooling and its gradients are at most twice as far from float64 as PyTorch's in the same precision.

    PyTorch's is torchvision in float32. In 16 bits, where torchvision rounds boxes or does not exist, it is the same
    RoIAlign written in PyTorch. Everything except `pool` is computed on the CPU.
    """
    dtype = features[0].dtype
    exact = [f.detach().double().requires_grad_() for f in features]
    moved = [f.detach().to(device).requires_grad_() for f in features]
    reference = roi_align if dtype == torch.float32 else plain_pytorch
    ours = pool(moved, STRIDES, boxes.to(device), index.to(device), size, ratio)
    plain = reference(features, STRIDES, boxes, index, size, ratio)
    truth = roi_align(exact, STRIDES, boxes, index, size, ratio)
    assert ours.dtype == dtype
    assert error(ours, truth) <= 2 * error(plain, truth)
    grad = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = (
        torch.autograd.grad(p, f, grad.to(p.device, p.dtype))
        for p, f in ((ours, moved), (plain, features), (truth, exact))
    )
    for ours, plain, truth in zip(*grads, strict=True):
        assert error(ours, truth) <= 2 * error(plain, truth)


def error(x: Tensor, truth: Tensor) -> float:
    return (x.cpu().double() - truth).abs().max().item()
