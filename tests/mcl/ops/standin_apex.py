"""A replacement for NVIDIA apex in plain PyTorch: the functions that mcl calls, with apex's contracts; it records
calls.

It shows which arguments mcl passes, and that results are equal if apex behaves as documented. The host reads values
only where it does with apex.
"""

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048 * 32


@dataclass
class StandIn:
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def applier(self, op: Any, noop: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
        return op(CHUNK, noop, lists, *args)

    def _check(self, chunk: int, noop: Tensor, lists: list[list[Tensor]]) -> None:
        assert chunk == CHUNK
        assert (noop.dtype, noop.shape) == (torch.int32, (1,))
        assert len({len(tensors) for tensors in lists}) == 1
        assert all(t.is_contiguous() and t.dtype == torch.float32 for tensors in lists for t in tensors)

    def multi_tensor_l2norm(self, chunk: int, noop: Tensor, lists: Any, per_tensor: bool) -> tuple[Tensor, Tensor]:
        self.calls.append(("l2norm", (len(lists), len(lists[0]), per_tensor)))
        self._check(chunk, noop, lists)
        each = torch.stack([t.norm() for t in lists[0]])
        return each.norm()[None], each if per_tensor else torch.empty(0)

    def multi_tensor_axpby(self, chunk: int, noop: Tensor, lists: Any, a: float, b: float, arg_to_check: int) -> None:
        self.calls.append(("axpby", (len(lists), a, b, arg_to_check)))
        self._check(chunk, noop, lists)
        stays = noop.view(()) != 0
        for x, y, out in zip(*lists, strict=True):
            out.copy_(torch.where(stays, out, a * x + b * y))
            noop.logical_or_(~out.isfinite().all())

    def clip_grad_norm_(self, parameters: Any, max_norm: float) -> Tensor:
        """apex passes the factor to a kernel as a float, so the host waits for it."""
        grads = [p.grad for p in parameters]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        scale = float((max_norm / (norm + 1e-6)).clamp(max=1))
        self.calls.append(("clip", (scale,)))
        torch._foreach_mul_(grads, scale)
        return norm

    def cross_entropy(
        self, logits: Tensor, labels: Tensor, smoothing: float = 0.0, padding_idx: int = 0, half_to_float: bool = False
    ) -> Tensor:
        self.calls.append(("xentropy", (smoothing, padding_idx, half_to_float)))
        losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        return losses.masked_fill(labels == padding_idx, 0.0)


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Installs the replacement under apex's name."""
    stand_in = StandIn()
    modules: dict[str, dict[str, Any]] = {
        "amp_C": {
            "multi_tensor_l2norm": stand_in.multi_tensor_l2norm,
            "multi_tensor_axpby": stand_in.multi_tensor_axpby,
        },
        "apex": {},
        "apex.multi_tensor_apply": {"multi_tensor_applier": stand_in.applier},
        "apex.contrib": {},
        "apex.contrib.clip_grad": {"clip_grad_norm_": stand_in.clip_grad_norm_},
        "apex.contrib.xentropy": {"SoftmaxCrossEntropyLoss": types.SimpleNamespace(apply=stand_in.cross_entropy)},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in
