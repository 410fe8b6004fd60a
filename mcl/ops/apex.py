"""NVIDIA apex, if it is installed: norms, momentum network and cross-entropy of CUDA tensors.

apex is installed from its sources or with NVIDIA's containers; the project of that name on PyPI is unrelated. Its
multi-tensor kernels take contiguous CUDA tensors and a flag, which overflow checks set, and return at once if it is not
zero; so every call uses a new flag. apex's ``clip_grad_norm_`` is not used, since it reads the norm back.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DEVICES = ("cuda",)


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:  # absent, the unrelated project, or built for another torch
        return None


_applier = _find("apex.multi_tensor_apply", "multi_tensor_applier")
_l2norm = _find("amp_C", "multi_tensor_l2norm")
_axpby = _find("amp_C", "multi_tensor_axpby")
_cross_entropy = _find("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")
_parts = {
    "norms": [_applier, _l2norm],
    "ema_": [_applier, _axpby],
    "clip": [_applier, _l2norm],
    "cross_entropy": [_cross_entropy],
}


def supplies(task: str) -> bool:
    """Whether apex has the functions for a task: "norms", "ema_", "clip" or "cross_entropy"."""
    return None not in _parts.get(task, [None])


def serves(task: str, tensors: Sequence[Tensor]) -> bool:
    """Whether apex supports a task on these tensors, which must be fp32 on CUDA."""
    return supplies(task) and all(t.device.type in _DEVICES and t.dtype == torch.float32 for t in tensors)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of the tensors, (T,)."""
    each: Tensor = _applier(_l2norm, _flag(tensors), [_flat(tensors)], True)[1]
    return each


def ema_(targets: Sequence[Tensor], onlines: Sequence[Tensor], momentum: float) -> None:
    x, y = _flat(targets), _flat(onlines)
    _applier(_axpby, _flag(targets), [x, y, x], momentum, 1 - momentum, -1)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all elements, ()."""
    norm: Tensor = _applier(_l2norm, _flag(tensors), [_flat(tensors)], False)[0]
    return norm.view(())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over rows. `padding_idx` is -1, since apex ignores labels that equal it."""
    smoothing, padding_idx, half_to_float = 0.0, -1, False
    rows: Tensor = _cross_entropy.apply(logits, labels, smoothing, padding_idx, half_to_float)
    return rows.mean()


def _flag(tensors: Sequence[Tensor]) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=tensors[0].device)


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Flat views of the tensors in memory order, which does not matter for norms and sums."""
    return [t if t.is_contiguous() else t.detach().as_strided((t.numel(),), (1,)) for t in tensors]
