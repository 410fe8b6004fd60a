"""Operators of the compiled extension (sources in kernels/), with fallbacks in PyTorch and torchvision."""

from mcl.ops import fallback  # noqa: F401  registers operators that the extension lacks
from mcl.ops.batch_norm import batch_norm
from mcl.ops.library import compiled, missing
from mcl.ops.region_pool import region_pool
from mcl.ops.steps import backends, clip_grad_norm_, costs, cross_entropy, describe, ema_, lars_, norms

__all__ = [
    "backends",
    "batch_norm",
    "clip_grad_norm_",
    "compiled",
    "costs",
    "cross_entropy",
    "describe",
    "ema_",
    "lars_",
    "missing",
    "norms",
    "region_pool",
]
