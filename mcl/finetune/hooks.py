"""What happens around MMEngine's training steps."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import get_rank, master_only
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from torch import Tensor

from mcl.distributed.signals import Consensus, Interrupted, Signals
from mcl.evaluation.statistics import fresh_statistics
from mcl.finetune.loading import seed_everything
from mcl.records.metrics import rewrite


@HOOKS.register_module()
class SeedEveryStep(Hook):
    """Makes what a step draws, such as the sampled regions, a function of seed, step and process."""

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, runner.iter, get_rank())


@HOOKS.register_module()
class PlainMessages(Hook):
    """Keeps MMEngine's message hub in checkpoints as plain lists and numbers, which ``weights_only=True`` reads."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        hub = checkpoint["message_hub"]
        scalars = {
            name: {"values": buffer.data[0].tolist(), "counts": buffer.data[1].tolist(), "longest": buffer.max_length}
            for name, buffer in hub["log_scalars"].items()
        }
        checkpoint["message_hub"] = {
            "log_scalars": scalars,
            "runtime_info": {name: _plain(value) for name, value in hub["runtime_info"].items()},
            "resumed_keys": dict(hub["resumed_keys"]),
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
        for name, scalar in scalars.items():
            scalars[name] = HistoryBuffer(scalar["values"], scalar["counts"], scalar["longest"])


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as Python's, at any depth."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return value


@HOOKS.register_module()
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


@HOOKS.register_module()
class Identity(Hook):
    """Notes in checkpoints what decides the course of the run.

    Args:
        sections: JSON by section of the configuration, as it was before MMEngine changed it.
    """

    def __init__(self, sections: Mapping[str, str]) -> None:
        self.sections = dict(sections)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"]["mcl"] = self.sections


@HOOKS.register_module()
class SaveOnSignal(Hook):
    """Ends a run that SIGTERM or Ctrl-C reached: it saves after the step, or the image of an evaluation, and leaves.

    Args:
        signals: what this process received; all processes leave after the same step.

    Raises:
        Interrupted: after the checkpoint was written.
    """

    priority = "LOWEST"  # all others are done with the step

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def before_run(self, runner: Any) -> None:
        self._consensus = Consensus()

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
        model = _detector(runner)
        with fresh_statistics(model):
            for batch in itertools.islice(loader, self.batches):
                model(**model.data_preprocessor(batch, training=True), mode="loss")


_NAMES = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "APs", "mAP_m": "APm", "mAP_l": "APl"}
_KINDS = {"bbox": "box", "segm": "mask"}
RESULTS = "ap.json"
TABLE = "ap.md"


@HOOKS.register_module()
class APTable(Hook):
    """Writes what pycocotools measured into the run folder: ``ap.json``, a record per evaluation, and ``ap.md``."""

    @master_only
    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        folder = Path(runner.work_dir)
        record = {"step": runner.iter, **_aps(metrics or {})}
        records = [other for other in read(folder) if other["step"] < runner.iter]
        records.append(record)
        rewrite(folder / RESULTS, json.dumps(records, indent=1) + "\n")
        rewrite(folder / TABLE, table(records))
        runner.logger.info("\n%s", table([record]))


def _aps(metrics: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """AP by kind and name, in percent; None where there is nothing of that size to detect."""
    aps: dict[str, dict[str, float | None]] = {}
    for name, value in metrics.items():
        kind, _, measure = name.removeprefix("coco/").partition("_")
        if kind in _KINDS and measure in _NAMES:
            aps.setdefault(_KINDS[kind], {})[_NAMES[measure]] = round(100 * value, 1) if value >= 0 else None
    return aps


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of the evaluations of a run, in their order."""
    path = folder / RESULTS
    records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Markdown table of evaluations, AP in percent."""
    lines = [
        "| step | of | " + " | ".join(_NAMES.values()) + " |",
        "|---|---|" + "---|" * len(_NAMES),
    ]
    for record in records:
        for kind in _KINDS.values():
            if kind in record:
                values = ["-" if value is None else f"{value:.1f}" for value in record[kind].values()]
                lines.append(f"| {record['step']} | {kind} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
