"""Detects where the host would wait for a device."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_dim_consecutive", "unique_consecutive"),
}
"""Operators whose result, or its shape, the host must know; item(), bool(), tolist() and where(x) use them."""

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operators that count the True values of a mask."""


class Waited(AssertionError):
    """The host would have waited for the device."""


class Detector(TorchDispatchMode):
    """Raises an error if the host would wait for a device, and counts the operators that were called.

    Args:
        device: device of the tensors; "cpu" stands for a GPU.
        pinned: tensors from which a copy to the device need not wait.
    """

    def __init__(self, device: str, pinned: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._device, self._pinned = device, pinned
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        if name in READS and any(map(self._on_device, args)):
            raise Waited(str(func))
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise Waited(f"{func} by a mask")
        if name.startswith(("index_put", "_index_put", "_unsafe_index_put")) and args[2].device != args[0].device:
            raise Waited(f"{func} of a value on the host")
        # PyTorch has no fake kernel for fused SGD, which returns nothing
        out = None if name == "_fused_sgd_" and self._device == "cuda" else func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            into = name == "copy_"  # arguments: target, source, non_blocking
            asynchronous = kwargs.get("non_blocking", into and args[2:] == (True,))
            self._check_copy(str(func), args[1] if into else args[0], out, asynchronous)
        self.seen[f"{func.namespace}::{name}"] += 1
        return out

    def _on_device(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type == self._device

    def _check_copy(self, name: str, source: Tensor, target: Tensor, asynchronous: bool) -> None:
        if source.device == target.device:
            return
        if target.device.type == "cpu":
            raise Waited(f"{name} to the host")
        if not (asynchronous and any(source is p for p in self._pinned)):
            raise Waited(f"{name} from pageable memory")
