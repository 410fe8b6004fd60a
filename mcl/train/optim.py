"""LARS, parameter groups, schedules. Nothing here reads a number back from the device."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from mcl import ops
from mcl.config import OptimConfig

_VECTORS = (".layer_scale", ".relative_position_bias_table")
"""Parameters of ConvNeXt and Swin that are treated as vectors, although they have more dimensions."""
_RELEASED_EXCLUSION = re.compile(r"(bn|gn)\d+\.(weight|bias)|\.bn\.(weight|bias)|bias")

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast types by ``trainer.precision``."""


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888), as in the released code.

    With w a parameter and g its gradient:
        trust = trust_coefficient * |w| / (|g| + weight_decay * |w|)
        buffer = momentum * buffer + lr * trust * (g + weight_decay * w)
        w = w - buffer
    Groups with ``adapt=False`` use trust = 1. A zero weight gives trust = 0, so it never changes.

    Like PyTorch's fused optimisers, it uses two attributes that :class:`torch.amp.GradScaler` sets, one float32 each: a
    step changes nothing if ``found_inf`` is not 0, and divides gradients by ``grad_scale``, in place.

    Args:
        params: parameters, or groups of them with their own ``weight_decay`` and ``adapt``.
    """

    _step_supports_amp_scaling = True  # read by GradScaler

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates all parameters that have a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        grads = [_in_order_of(w, w.grad) for w in weights if w.grad is not None]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_div_(grads, scale)
        ops.lars_(
            weights,
            grads,
            _momenta(self, weights),
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=group["trust_coefficient"],
            adapt=group["adapt"],
            found_inf=getattr(self, "found_inf", None),
        )


def _momenta(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[Tensor]:
    """The momentum buffers of weights; zeros for those that have none yet."""
    states = [optimizer.state[w] for w in weights]
    for w, state in zip(weights, states, strict=True):
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(w)
    return [state["momentum_buffer"] for state in states]


def _in_order_of(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides of the weight; copied if they differ, which is rare."""
    return grad if grad.stride() == weight.stride() else torch.empty_like(weight).copy_(grad)


def excluded(name: str, parameter: Tensor, rule: str) -> bool:
    """Whether a parameter has neither weight decay nor trust ratio; `rule` is ``optim.exclude``."""
    if rule == "released":
        return _RELEASED_EXCLUSION.search(_released_name(name)) is not None
    return parameter.ndim <= 1 or name.endswith(_VECTORS)


def _released_name(name: str) -> str:
    """The parameter's name in the authors' code, which calls the norms of FPN and head convolutions `bn`."""
    return re.sub(r"^(online\.fpn\..*|online\.head\.convs\..*)\.norm\.", r"\1.bn.", name)


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Optimiser over the trainable parameters of `model` in two groups; those of :func:`excluded` are the second.

    It skips a step if its attribute ``found_inf``, () float32 on the device, is 1.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    usual = [p for name, p in trainable if not excluded(name, p, config.exclude)]
    vectors = [p for name, p in trainable if excluded(name, p, config.exclude)]
    groups: list[dict[str, Any]] = [
        {"params": usual, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.name == "lars":
        groups[1]["adapt"] = False
        return LARS(groups, lr=0.0, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    if config.name == "sgd":
        return _prepared(SGD(groups, lr=0.0, momentum=config.momentum, fused=True))
    return _prepared(AdamW(groups, lr=0.0, betas=config.betas, fused=True))


def _prepared(optimizer: Optimizer) -> Optimizer:
    """Prepares steps of PyTorch's fused optimisers: gradients get the strides of their weights, and momentum buffers
    are created, which SGD leaves uninitialised if its first step is skipped."""
    given: list[tuple[Tensor, Tensor]] = []

    def before(*_: Any) -> None:
        for group in optimizer.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for w in weights:
                given.append((w, w.grad))
                w.grad = _in_order_of(w, w.grad)
            if group.get("momentum"):
                _momenta(optimizer, weights)

    def after(*_: Any) -> None:
        for w, grad in given:
            w.grad = grad  # a CUDA graph may have recorded it
        given.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores the state of parameters. Settings of groups are not restored: they follow from the configuration, and
    from the implementation that PyTorch chooses."""
    groups = [
        own | {"params": saved["params"]}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


def learning_rate(config: OptimConfig, global_batch: int, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of a step: a cosine over the whole run, multiplied by a linear warm-up.

    Args:
        config: ``optim`` of the configuration.
        global_batch: images per step.
        step: from 0.
        steps: number of steps of the run.
        steps_per_epoch: number of steps per epoch.
    """
    peak = config.base_lr * global_batch / 256
    lr = config.final_lr + (peak - config.final_lr) * (math.cos(math.pi * step / steps) + 1) / 2
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        lr *= config.warmup_start + (1 - config.warmup_start) * step / warmup
    return lr


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class LossScaler(torch.amp.GradScaler):
    """Loss scaling for fp16 with an upper bound of the scale, as in the authors' code."""

    def __init__(self, device: str, maximum: float, enabled: bool) -> None:
        super().__init__(device, init_scale=maximum, enabled=enabled)
        self._maximum = maximum

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adapts the scale after a step."""
        super().update(new_scale)
        if self.is_enabled():
            assert self._scale is not None  # the first step has made it
            self._scale.clamp_(max=self._maximum)
