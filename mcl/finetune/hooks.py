"""What happens around MMEngine's training steps."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from mcl.distributed.signals import Consensus
from mcl.finetune.loading import seed_everything
from mcl.signals import Interrupted, Signals


@HOOKS.register_module()
class SeedEveryStep(Hook):
    """Makes what a step draws, such as the sampled regions, a function of seed, step and process."""

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
    return value.tolist()  # of NumPy


class LoadWeights(Hook):
    """Puts pre-trained weights into a detector after it was initialised."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def before_train(self, runner: Any) -> None:
        detector = _detector(runner)
        detector.load_state_dict(self.weights, strict=False)
        parts = Counter(name.partition(".")[0] for name in self.weights)
        runner.logger.info(
            "pre-trained: %d of the detector's %d tensors (%s)",
            len(self.weights),
            len(detector.state_dict()),
            ", ".join(f"{part} {count}" for part, count in parts.items()),
        )


class Identity(Hook):
    """Notes in checkpoints what decides the course of the run.

    Args:
        sections: JSON by section of the configuration, as it was before MMEngine changed it.
    """

    def __init__(self, sections: Mapping[str, str]) -> None:
        self.sections = dict(sections)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["mcl"] = self.sections


class SaveOnSignal(Hook):
    """Ends a run that SIGTERM or Ctrl-C reached: it saves after the step, or the image of an evaluation, and leaves.

    Args:
        signals: what this process received; all processes leave after the same step.

    Raises:
        Interrupted: after the checkpoint was written.
    """

    priority = "LOWEST"  # all others are done with the step

    def __init__(self, signals: Signals) -> None:
        self.signals, self._consensus = signals, Consensus()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._leave(runner, runner.iter + 1)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._leave(runner, runner.iter)

    def _leave(self, runner: Any, step: int) -> None:
        if number := self._consensus(self.signals.received):
            meta = {"iter": step}
            runner.save_checkpoint(runner.work_dir, f"iter_{step}.pth", meta=meta, by_epoch=False)
            raise Interrupted(128 + number)


def _detector(runner: Any) -> Any:
    """The model itself, not what distributes it."""
    return getattr(runner.model, "module", runner.model)


@HOOKS.register_module()
class PreciseBatchNorm(Hook):
    """Re-estimates BatchNorm's statistics before checkpoint and evaluation, as detectron2's ``PRECISE_BN`` does.

    It is for detectors all of whose BatchNorms are trained: statistics that are frozen would be lost.

    Args:
        interval: steps between two times; evaluations, and the last step of a run, have theirs in any case.
        batches: of the training data, from which means are taken.
    """

    priority = "NORMAL"

    def __init__(self, interval: int, batches: int) -> None:
        self.interval, self.batches = interval, batches

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        due = any(self.every_n_train_iters(runner, n) for n in (self.interval, runner.train_loop.val_interval))
        if not (due or self.is_last_train_iter(runner)):
            return
        loader = runner.train_dataloader
        loader.batch_sampler.start = runner.iter + 1
        update_bn(itertools.islice(loader, self.batches), _Losses(_detector(runner)))


class _Losses(nn.Module):
    """A detector as it is trained on a batch of a loader."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, batch: Any) -> None:
        self.detector(**self.detector.data_preprocessor(batch, training=True), mode="loss")
