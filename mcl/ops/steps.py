"""Operations on all parameters, and cross-entropy. Nothing is read back from the device.

apex is used if it is installed and supports the operation, then the extension, then PyTorch.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcl.ops import apex
from mcl.ops.library import compiled, library, missing

_WITHOUT = {
    "region_pool": "a launch per map, and on GPUs gradients that are added in no fixed order",
    "batch_norm": "more launches, and more passes over every map",
    "lars_": "more passes over the parameters",
    "ema_": "more passes over the parameters",
}
"""Costs of an operator that is not compiled."""


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms of fp32 or fp64 tensors without gaps in memory; returns (T,) of their dtype, on their device."""
    if apex.serves("norms", tensors):
        return apex.norms(tensors)
    result: Tensor = torch.ops.mcl.norms(list(tensors))
    return result


def lars_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    adapt: bool = True,
    found_inf: Tensor | None = None,
) -> None:
    """One step of LARS (see :class:`mcl.train.optim.LARS`), in place, on fp32 or fp64 tensors without gaps in memory.

    Args:
        weights: parameters.
        grads: gradients, with the strides of the parameters.
        momenta: momentum buffers, with the strides of the parameters.
        lr: learning rate.
        momentum: momentum.
        weight_decay: weight decay.
        trust_coefficient: trust coefficient.
        adapt: whether to multiply by the trust ratio.
        found_inf: one float32 on the device of the tensors; if it is not 0, nothing changes. The host does not read it.
    """
    both = [*weights, *grads]
    given = apex.norms(both).view(2, -1) if adapt and apex.serves("norms", both) else None
    settings = (lr, momentum, weight_decay, trust_coefficient, adapt)
    torch.ops.mcl.lars_(list(weights), list(grads), list(momenta), given, *settings, found_inf)


def ema_(
    targets: Sequence[Tensor], onlines: Sequence[Tensor], momentum: float, found_inf: Tensor | None = None
) -> None:
    """target = momentum * target + (1 - momentum) * online, in place; tensors and `found_inf` as for :func:`lars_`."""
    if found_inf is None and apex.serves("ema_", [*targets, *onlines]):  # apex's kernel ignores its flag
        apex.ema_(targets, onlines, momentum)
    else:
        torch.ops.mcl.ema_(list(targets), list(onlines), momentum, found_inf)


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales gradients in place so that their global norm is at most `max_norm`; returns the norm before, ().

    An infinite `max_norm` leaves them unchanged.
    """
    parameters = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in parameters if p.grad is not None]
    served = grads and apex.serves("clip", grads)
    norm = apex.total_norm(grads) if served else nn.utils.get_total_norm(grads)
    if not math.isinf(max_norm):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (R, B) logits against (R,) int64 labels: ()."""
    if apex.serves("cross_entropy", [logits]):
        return apex.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels)


def backends(device: str) -> dict[str, tuple[str, str]]:
    """The library that runs each operator on "cpu" or "cuda", and why."""
    chosen = {}
    for task in ("region_pool", "batch_norm", "norms", "lars_", "ema_", "clip", "cross_entropy"):
        if device == "cuda" and apex.supplies(task):
            chosen[task] = ("apex", "it is installed")
        elif task in ("clip", "cross_entropy"):
            chosen[task] = ("PyTorch", "apex is not installed" if device == "cuda" else "apex supports CUDA only")
        elif compiled("batch_norm_apply" if task == "batch_norm" else task, device):
            chosen[task] = ("mcl", "the extension is built")
        else:
            chosen[task] = ("torchvision" if task == "region_pool" else "PyTorch", missing[device])
    return chosen


def costs(device: str) -> str:
    """What is slower on "cpu" or "cuda" without compiled operators, why, and the remedy; empty if nothing is slower."""
    served = backends(device)
    lacking = [task for task in _WITHOUT if served[task][0] in ("PyTorch", "torchvision")]
    if not lacking:
        return ""
    each = "; ".join(f"{task}: {_WITHOUT[task]}" for task in lacking)
    return f"steps are slower without mcl's {device.upper()} operators ({each}): {served[lacking[0]][1]}"


def describe(device: str) -> str:
    """The libraries that run operators on "cpu" or "cuda", such as "mcl: region_pool, lars_; PyTorch: clip"."""
    tasks: dict[str, list[str]] = {}
    for task, (name, _) in backends(device).items():
        tasks.setdefault(name, []).append(task)
    return "; ".join(f"{name}: {', '.join(done)}" for name, done in tasks.items())


@torch.library.register_fake("mcl::norms", lib=library)
def _fake_norms(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors))


@torch.library.register_fake("mcl::lars_", lib=library)
@torch.library.register_fake("mcl::ema_", lib=library)
def _fake_in_place(*arguments: object) -> None:
    return None
