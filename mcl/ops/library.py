"""Schemas of the operators, and who implements them: the compiled extension, or :mod:`mcl.ops.fallback`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCHEMAS = {
    "region_pool": (
        "(Tensor[] features, float[] strides, Tensor boxes, Tensor index, SymInt output_size, int sampling_ratio)"
        " -> Tensor"
    ),
    "region_pool_backward": (
        "(Tensor grad, SymInt[] sizes, float[] strides, Tensor boxes, Tensor index, int sampling_ratio,"
        " bool channels_last) -> Tensor[]"
    ),
    "batch_norm_stats": "(Tensor x, SymInt[] counts) -> Tensor",
    "batch_norm_stats_alone": (
        "(Tensor x, SymInt[] counts, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches,"
        " float? momentum, float eps) -> Tensor"
    ),
    "batch_norm_combine": (
        "(Tensor parts, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum,"
        " float eps) -> Tensor"
    ),
    "batch_norm_apply": (
        "(Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, SymInt[] counts, Tensor? residual, bool relu)"
        " -> Tensor"
    ),
    "batch_norm_backward_reduce": (
        "(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor statistics, SymInt[] counts,"
        " bool relu) -> (Tensor, Tensor, Tensor)"
    ),
    "batch_norm_backward_apply": (
        "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, Tensor sums, SymInt[] counts,"
        " bool relu) -> Tensor"
    ),
    "norms": "(Tensor[] tensors) -> Tensor",
    "lars_": (
        "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor? norms, float lr, float momentum,"
        " float weight_decay, float trust_coefficient, bool adapt, Tensor? found_inf=None) -> ()"
    ),
    "ema_": "(Tensor(a!)[] targets, Tensor[] onlines, float momentum, Tensor? found_inf=None) -> ()",
}
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}

library = torch.library.Library("mcl", "DEF")
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema)


def _load() -> str:
    """Loads the extension that setup.py has built into the package; empty, or why there is none."""
    found = sorted(Path(__file__).parents[1].glob("_C*.so"))
    if not found:
        return "the extension was not built; pip install --no-build-isolation -e . builds it"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:  # made for another torch or CUDA; the cause names the symbol or library
        reason = error.__cause__ or error
        return f"{found[0].name} does not load ({reason}); pip install --no-build-isolation -e . rebuilds it"
    return ""


missing = _load()
"""Why the extension is not used; empty where it is."""


def compiled(name: str, device: str) -> bool:
    """Whether the extension implements an operator on "cpu" or "cuda"."""
    return (name, device) in _compiled


_compiled = {
    (name, device)
    for name in SCHEMAS
    for device, key in _DEVICES.items()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mcl::{name}", key)
}


def fallback(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the implementation of an operator on the devices that the extension does not serve.

    Args:
        name: of the operator.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for device, key in _DEVICES.items():
            if not compiled(name, device):
                library.impl(name, function, key)
        return function

    return register
