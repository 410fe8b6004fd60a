"""Schemas of the operators, and who implements them: the compiled libraries, or :mod:`mcl.ops.fallback`."""

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


_FOLDER = Path(__file__).parents[1]


def _load(name: str) -> str:
    """Loads a library that setup.py has built into the package; empty, or why there is none."""
    if not (_FOLDER / name).exists():
        return f"the extension was not built; {BUILD} installs it"
    try:
        torch.ops.load_library(str(_FOLDER / name))
    except OSError as error:  # made for another torch; the cause names the symbol or library
        return f"{name} does not load ({error.__cause__ or error}); {BUILD} replaces it"
    return ""


def _load_cuda() -> str:
    """As :func:`_load`, the library of this PyTorch's version of CUDA: another would bring another runtime."""
    version = (torch.version.cuda or "").partition(".")[0]
    others = [path.stem.removeprefix("_C_cuda") for path in _FOLDER.glob("_C_cuda*.so")]
    if others and version not in others:
        built = f"this PyTorch, {torch.__version__}, is built {f'for CUDA {version}' if version else 'without CUDA'}"
        return f"the extension serves CUDA {', '.join(others)}, and {built}; install another, or build from a checkout"
    if (_FOLDER / "_C.so").exists() and not others:
        return f"the extension is built without CUDA; MCL_BUILD_CUDA=1 {BUILD} builds it with"
    return _load(f"_C_cuda{version}.so")


missing = {"cpu": _load("_C.so"), "cuda": _load_cuda()}
"""Why the extension is not used on "cpu" and "cuda"; empty where it is."""


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
