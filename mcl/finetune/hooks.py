"""Hooks for MMEngine's training loop."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from mcl.distributed.consensus import Consensus
from mcl.finetune.console import shown
from mcl.finetune.loading import seed_everything
from mcl.records.metrics import log
from mcl.signals import Interrupted, Signals


@HOOKS.register_module()
class SeedEveryStep(Hook):
    """Makes the random numbers of a step, such as for sampling regions, depend only on seed, step and process."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, runner.iter, get_rank())


@HOOKS.register_module()
class PlainMessages(Hook):
    """Keeps MMEngine's message hub in checkpoints as plain lists and numbers, which ``weights_only=True`` reads."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["message_hub"] = json.loads(json.dumps(checkpoint["message_hub"], default=_plain))

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, scalar in scalars.items():
            scalars[name] = HistoryBuffer(scalar["values"], scalar["counts"], scalar["longest"])


def _plain(value: Any) -> Any:
    if isinstance(value, HistoryBuffer):
        return {"values": value.data[0], "counts": value.data[1], "longest": value.max_length}
    return value.tolist()  # a NumPy value


class LoadWeights(Hook):
    """Loads pre-trained weights into a detector after its initialisation.

    Args:
        weights: tensors by the names of the detector.
        summary: description of the weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], summary: str) -> None:
        self.weights, self.summary = weights, summary

    def before_train(self, runner: Any) -> None:
        detector_of(runner).load_state_dict(self.weights, strict=False)


class Summary(Hook):
    """Logs data, model, weights and schedule in one line each.

    Args:
        weights: description of the initial weights.
    """

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def before_train(self, runner: Any) -> None:
        config, detector = runner.cfg, detector_of(runner)
        images, classes = len(runner.train_dataloader.dataset), config.data.classes
        log.info(
            "data: %s: %d images to train on, %d to evaluate on, %d classes (%s)",
            *(config.data.root, images, len(runner.val_dataloader.dataset), len(classes)),
            ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else ""),
        )
        parameters = sum(parameter.numel() for parameter in detector.parameters())
        device = next(detector.parameters()).device
        log.info("model: %s, %.1f million parameters, on %s", config.model.type, parameters / 1e6, device.type)
        log.info("weights: %s", self.weights)
        log.info("schedule: %s", _schedule(runner, config.global_batch / images))


def _schedule(runner: Any, epochs: float) -> str:
    """Steps and learning rate of a run in words; `epochs` is the fraction of an epoch in a step."""
    config, steps = runner.cfg, runner.max_iters
    parts = [f"{steps} steps of {config.global_batch} images ({steps * epochs:.1f} epochs)"]
    group = runner.optim_wrapper.param_groups[0]
    rate = f"learning rate {group.get('initial_lr', group['lr']):.3g}"
    for scheduler in config.param_scheduler:
        if scheduler.type == "LinearLR":
            rate += f" after {scheduler.end} steps of warm-up"
        if milestones := [str(step) for step in scheduler.get("milestones", ()) if step < steps]:
            rate += f", times {scheduler.gamma:g} at {', '.join(milestones)}"
    parts += [rate, f"evaluated every {runner.train_loop.val_interval} steps"]
    return "; ".join([*parts, f"continued at step {runner.iter}"] if runner.iter else parts)


class Repeat(Hook):
    """Logs which of several runs this is, and extends the displayed remaining time to all runs.

    Args:
        number: number of this run, from 0.
        count: number of runs.
    """

    def __init__(self, number: int, count: int) -> None:
        self.number, self.count = number, count
        self._step = 0.0  # seconds

    def before_train(self, runner: Any) -> None:
        seed = runner.cfg.randomness.seed
        log.info("repeat %d of %d, with seed %d; eta is for all repeats", self.number + 1, self.count, seed)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        left, eta = runner.max_iters - runner.iter - 1, runner.message_hub.get_info("eta")  # of MMEngine's timer
        self._step = eta / left if left else self._step
        later = (self.count - self.number - 1) * runner.max_iters
        runner.message_hub.update_info("eta", eta + later * self._step)


class Identity(Hook):
    """Stores in checkpoints the sections of the configuration that decide what the run computes.

    Args:
        sections: JSON by section, from before MMEngine changed the configuration.
    """

    def __init__(self, sections: Mapping[str, str]) -> None:
        self.sections = dict(sections)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["mcl"] = self.sections


class SaveOnSignal(Hook):
    """Saves a checkpoint and ends the run after SIGTERM or Ctrl-C, between training steps or batches of other work.

    Args:
        signals: signals that this process received. If any process received one, all end after the same step.

    Raises:
        Interrupted: a signal was received and the checkpoint was written.
    """

    priority = "LOWEST"  # runs after all other hooks of the step

    def __init__(self, signals: Signals) -> None:
        self.signals, self._consensus = signals, Consensus()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._leave(runner, runner.iter + 1)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._leave(runner, runner.iter)

    def after_norm_iter(self, runner: Any, step: int) -> None:
        """Called by :class:`PreciseBatchNorm` after every batch."""
        self._leave(runner, step)

    def _leave(self, runner: Any, step: int) -> None:
        if number := self._consensus(self.signals.received):
            _save(runner, step)
            raise Interrupted(128 + number)


def _save(runner: Any, step: int) -> None:
    """Writes the checkpoint after a step."""
    runner.save_checkpoint(runner.work_dir, f"iter_{step}.pth", meta={"iter": step}, by_epoch=False)


def detector_of(runner: Any) -> Any:
    """The model without the wrapper that distributes it."""
    return getattr(runner.model, "module", runner.model)


@HOOKS.register_module()
class PreciseBatchNorm(Hook):
    """Re-estimates BatchNorm's statistics before checkpoints and evaluations, as detectron2's ``PRECISE_BN`` does.

    All BatchNorms of the detector must be trained, since frozen statistics would be overwritten. If the run is stopped
    during the estimation, it repeats the estimation before its next evaluation.

    Args:
        interval: steps between estimations. Evaluations and the last step are always preceded by one.
        batches: number of training batches over which statistics are averaged.
    """

    priority = "NORMAL"

    def __init__(self, interval: int, batches: int) -> None:
        self.interval, self.batches = interval, batches
        self._due = False

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        due = any(self.every_n_train_iters(runner, n) for n in (self.interval, runner.train_loop.val_interval))
        if due or self.is_last_train_iter(runner):
            self._estimate(runner, runner.iter + 1)

    def before_val(self, runner: Any) -> None:
        if self._due:  # the run was stopped meanwhile
            self._estimate(runner, runner.iter)
            _save(runner, runner.iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["batch_norm_due"] = self._due

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self._due = checkpoint["meta"].get("batch_norm_due", False)

    def _estimate(self, runner: Any, step: int) -> None:
        self._due = True
        seed_everything(runner.seed, step, get_rank())
        with shown("re-estimating BatchNorm", "batches") as show:
            update_bn(self._batches(runner, step, show), _Losses(detector_of(runner)))
        self._due = False

    def _batches(self, runner: Any, step: int, show: Callable[[int, int], None]) -> Iterator[Any]:
        """The training batches after a step. After each batch, hooks are called, which may end the run on a signal."""
        loader = runner.train_dataloader
        loader.batch_sampler.start = step
        for done, batch in enumerate(itertools.islice(loader, self.batches), start=1):
            yield batch
            show(done, self.batches)
            runner.call_hook("after_norm_iter", step=step)


class _Losses(nn.Module):
    """Computes the losses of a detector on a batch of a loader, which updates BatchNorm's statistics."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, batch: Any) -> None:
        self.detector(**self.detector.data_preprocessor(batch, training=True), mode="loss")
