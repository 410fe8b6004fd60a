"""Derives optimiser and schedule of a fine-tuning from a few keys. Keys that the command line sets are not changed."""

import inspect
from collections.abc import Collection
from typing import Any

from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from mcl.config import ConfigError
from mcl.records.metrics import log
from mcl.train import optim

_STEPS = ("begin", "end", "milestones", "T_max")
"""Keys of schedulers that are numbers of steps."""


@OPTIMIZERS.register_module()
class LARS(optim.LARS):
    """LARS of pre-training. Biases and scales have trust ratio 1; otherwise a bias of 0 would never change."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        groups = [group if isinstance(group, dict) else {"params": [group]} for group in params]
        groups = [{**group, "adapt": all(p.ndim > 1 for p in group["params"])} for group in groups]
        super().__init__(groups, lr, momentum, weight_decay, trust_coefficient)


def choose_optimizer(config: Config, before: Any, given: Collection[str]) -> None:
    """Removes settings that an optimiser of another type does not have, such as the momentum of SGD.

    Args:
        config: configuration of the run.
        before: type of the optimiser in the files.
        given: keys that the command line sets.

    Raises:
        ConfigError: there is no such optimiser, it has no such setting, or its learning rate is not set.
    """
    section, optimizer = "optim_wrapper.optimizer", config.optim_wrapper.get("optimizer", {})
    if optimizer.get("type") == before or not _is_set(f"{section}.type", given):
        return
    kind = OPTIMIZERS.module_dict.get(optimizer.get("type"))
    if kind is None:
        raise ConfigError(f"{section}.type: no optimiser {optimizer.type!r}; there are SGD, AdamW, LARS and others")
    if not _is_set(f"{section}.lr", given):
        raise ConfigError(
            f"{section}.lr: {optimizer.lr} is a learning rate of {before}; set one of {optimizer.type}, e.g. 1e-4 of "
            "AdamW"
        )
    for key in optimizer.keys() - inspect.signature(kind).parameters - {"type"}:
        if _is_set(f"{section}.{key}", given):
            raise ConfigError(f"{section}.{key}: {optimizer.type} has no such setting; leave it out")
        del optimizer[key]


def scale(config: Config, before: int, given: Collection[str]) -> None:
    """Scales milestones and warm-up with the number of steps, rounded down; a warm-up has at least 2 steps.

    Args:
        config: configuration of the run, changed in place.
        before: number of steps for which ``param_scheduler`` was written.
        given: keys that the command line sets.
    """
    steps = config.train_cfg.max_iters
    late = []
    for number, scheduler in enumerate(config.param_scheduler):
        if not isinstance(scheduler, dict):
            continue
        for key in _STEPS:
            value = scheduler.get(key)
            if isinstance(value, int | list) and not _is_set(f"param_scheduler.{number}.{key}", given):
                scheduler[key] = _scaled(value, steps, before)
                if key == "end":  # with a single step, MMEngine's LinearLR would keep its first factor
                    scheduler[key] = max(scheduler[key], scheduler.get("begin", 0) + 2)
        late += [m for m in scheduler.get("milestones") or () if isinstance(m, int) and m >= steps]
    if late:
        log.warning(
            "the learning rate will not decrease at %s: train_cfg.max_iters=%d; set param_scheduler.1.milestones",
            *(late, steps),
        )


def _scaled(value: Any, steps: int, before: int) -> Any:
    if isinstance(value, list):
        return [_scaled(each, steps, before) for each in value]
    return value * steps // before if isinstance(value, int) else value


def _is_set(key: str, given: Collection[str]) -> bool:
    """Whether the command line sets a key, a section that contains it, or an element of it."""
    return any(f"{key}.".startswith(f"{word}.") or word.startswith(f"{key}.") for word in given)
