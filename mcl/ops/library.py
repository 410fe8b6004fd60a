"""Schemas of the operators, and their registration: from the compiled libraries, or :mod:`mcl.ops.fallback`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dali_pipelines import BUILD

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


def load(library: Path) -> str:
    """Loads a compiled library. Returns the reason why it cannot be used, with the remedy; empty if it was loaded."""
    if not library.exists():
        return f"the extension is not installed; {BUILD} installs it"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:  # built for another torch; the cause names the symbol or library
        return f"{library.name} does not load ({error.__cause__ or error}); {BUILD} replaces it"
    return ""


def load_cuda(folder: Path, cuda: str | None) -> str:
    """As :func:`load`, for PyTorch's CUDA version, such as "13.0"; another one would load a second CUDA runtime."""
    version = (cuda or "").partition(".")[0]
    found = [library.stem.removeprefix("_C_cuda") for library in folder.glob("_C_cuda*.so")]
    if found and version not in found:
        ours = f"PyTorch is built {f'for CUDA {version}' if version else 'without CUDA'}"
        return (
            f"the extension supports CUDA {', '.join(found)}, {ours}; install another PyTorch, or build in a checkout"
        )
    if not found and (folder / "_C.so").exists():
        return f"the extension is built without CUDA; MCL_BUILD_CUDA=1 {BUILD} builds it with CUDA"
    return load(folder / f"_C_cuda{version}.so")


_FOLDER = Path(__file__).parents[1]
missing = {"cpu": load(_FOLDER / "_C.so"), "cuda": load_cuda(_FOLDER, torch.version.cuda)}
"""Why the extension is not used on "cpu" and "cuda"; empty if it is used."""


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
    """Registers a function as the implementation of an operator on devices that the extension does not support.

    Args:
        name: name of the operator.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for device, key in _DEVICES.items():
            if not compiled(name, device):
                library.impl(name, function, key)
        return function

    return register
