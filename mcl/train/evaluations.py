"""Evaluations of a run: their steps, which of them are missing, and which checkpoint is the best."""

from collections.abc import Callable

import torch

from dali_pipelines.loader import BadDataError
from dali_pipelines.source import SourceError
from mcl import distributed, evaluation
from mcl.config import Config, ConfigError
from mcl.evaluation.features import Progress
from mcl.evaluation.scoring import Sources
from mcl.objectives import Objective
from mcl.records.metrics import EVALUATIONS, Record, log, read
from mcl.train import checkpoint


class Evaluations:
    """Evaluations during a run and at its end, by all processes.

    Args:
        config: configuration of the run.
        sources: images by split.
        steps: number of steps of the run.
        steps_per_epoch: number of steps per epoch.
    """

    def __init__(self, config: Config, sources: Sources, steps: int, steps_per_epoch: int) -> None:
        self._config, self._sources, self._steps = config, sources, steps
        self._per_epoch = steps_per_epoch
        self._every = max(1, round(config.evaluation.every * steps_per_epoch)) if config.evaluation.every else 0
        self._folder = config.run_folder

    def names(self, step: int) -> list[str]:
        """Names of the evaluations at a step."""
        own = self._config.evaluation
        during = own.during if self._every and (step % self._every == 0 or step == self._steps) else ()
        return list(dict.fromkeys([*(own.at_end if step == self._steps else ()), *during]))

    def missing(self, step: int) -> list[str]:
        """Evaluations at a step that have no record yet, as rank 0 determines them for all processes."""
        done = {record["name"] for record in self._records() if record["step"] == step}
        missing = [name for name in self.names(step) if name not in done]
        told: list[str] = distributed.gather_objects(missing)[0]
        return told

    def run(
        self, model: Objective, device: torch.device, step: int, write: Callable[[Record], None], progress: Progress
    ) -> None:
        """Runs the missing evaluations at a step, and points best.pt at its checkpoint if that is the best so far.

        Args:
            model: the model to evaluate.
            device: device of the model.
            step: step of the run.
            write: takes the records, on the first process.
            progress: called after every part of the work, by all processes; its exceptions end the evaluation.
        """
        if missing := self.missing(step):
            held_out = step < self._steps or "retrieval" not in self._config.evaluation.at_end
            try:
                records = evaluation.evaluate(missing, model, self._config, device, self._sources, held_out, progress)
            except (ConfigError, SourceError, BadDataError) as error:
                if isinstance(error, BadDataError) and distributed.world_size() > 1:
                    raise  # other processes may not have raised it
                log.warning("no %s: %s", ", ".join(missing), error)  # images changed; the run can go on
                return
            for record in records:
                if distributed.rank() == 0:
                    write({**record, "step": step, "epoch": step / self._per_epoch, "by": "run"})
                    log.info("%s", evaluation.describe(record))
        best = self._config.trainer.keep_best
        if step and best in self.names(step) and distributed.rank() == 0 and self._best(best) == step:
            checkpoint.mark_best(self._folder / "checkpoints", step)

    def _best(self, name: str) -> int:
        """The step with the highest score, on held-out images where there are any; -1 without records."""
        own = [record for record in self._records() if record["name"] == name and record["step"]]
        own = [record for record in own if record["split"] == "val"] or own
        return max(own, key=evaluation.score)["step"] if own else -1

    def _records(self) -> list[Record]:
        return [record for record in read(self._folder / EVALUATIONS) if record.get("by") == "run"]
