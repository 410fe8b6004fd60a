"""The training loop."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from dali_pipelines.loader import MontageLoader, default_threads
from dali_pipelines.source import Source, open_images
from mcl import distributed, doctor, ops
from mcl.config import Config, ConfigError, changed_keys, from_dict, to_dict, value
from mcl.distributed import hang, launch
from mcl.distributed.consensus import Consensus
from mcl.evaluation import check_evaluations
from mcl.objectives import OBJECTIVES, Output, build
from mcl.records.collapse import CollapseWarning
from mcl.records.meters import Meter, Stopwatch
from mcl.records.metrics import (
    ENVIRONMENT,
    EVALUATIONS,
    BadFiles,
    Metrics,
    ProgressBar,
    check_sinks,
    log,
    log_to_console,
    log_to_file,
    rewrite,
)
from mcl.records.profile import profiled
from mcl.signals import Interrupted, Signals
from mcl.train import agreement, arithmetic, checkpoint, ema, memory
from mcl.train.evaluations import Evaluations
from mcl.train.optim import learning_rate
from mcl.train.saving import Saver
from mcl.train.step import TrainingStep

_DRIVER = Path("/proc/driver/nvidia/version")

_SKIPPED_IN_A_ROW = 100
"""Number of consecutive skipped steps (fp16, or trainer.on_nonfinite=skip) that ends a run."""


class NonFiniteLossError(RuntimeError):
    """Loss or gradient is infinite or NaN; the message names step, level and last good checkpoint."""


class _Stopped(Exception):
    """A signal arrived during an evaluation; all processes raise this at the same place."""

    def __init__(self, signal: int) -> None:
        self.signal = signal


def resolve_device(name: str) -> torch.device:
    """The device of this process for ``trainer.device``.

    Raises:
        ConfigError: CUDA is requested but not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device: cuda is set, but PyTorch sees no CUDA device; use trainer.device=cpu")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", distributed.local_rank()) if on_gpu else torch.device("cpu")


class Trainer:
    """A run: created from its configuration, or continued if its folder has a checkpoint.

    Raises:
        ConfigError, SourceError, CheckpointError: wrong input, before any work starts.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, config.run_folder
        trainer = config.trainer
        launch.world_size()  # raises if the variables are not those of torchrun
        self.device = resolve_device(trainer.device)
        arithmetic.choose(trainer)
        distributed.setup(self.device.type, trainer.timeout, self.folder)
        log_to_console()
        if trainer.threads:
            torch.set_num_threads(trainer.threads)

        # Nothing is written before all checks have passed.
        self.images = config.images_per_rank(distributed.world_size())
        source = distributed.once_per_machine(lambda: open_images(config.data), config.data)
        held_out = distributed.once_per_machine(lambda: check_evaluations(config, source), config.data)
        OBJECTIVES[config.objective].check(config, source)
        state = distributed.local_rank_zero_first(lambda: checkpoint.latest(self.folder / "checkpoints"))
        hang.end_after(trainer.timeout + hang.GRACE)
        agreement.check(config, self.device.type, source, None if state is None else state["step"])
        if state is not None:
            self.config = config = memory.as_before(config, state)
            self._check_resumable(state, source)
        plan = config.plan(len(source), self.images, distributed.rank(), distributed.world_size())
        self.loader = MontageLoader(
            source,
            plan,
            config.loading,
            gpu=self.device.index,
            threads=config.data.threads or default_threads(distributed.local_world_size()),
        )
        arithmetic.check(config, self.device.type, self.loader.device)
        self.steps_per_epoch = plan.steps_per_epoch
        self.steps = trainer.epochs * self.steps_per_epoch
        self.step = 0
        if state is None or state["step"] < self.steps:
            self.config = config = memory.fit(config, self.device, self.loader)

        torch.manual_seed(trainer.seed)  # the same weights on every rank
        self.model = build(config, source.classes)
        self._initial = "" if state is not None else self._read_initial()
        self._update = TrainingStep(config, self.model, self.device)
        self._skips = trainer.on_nonfinite == "skip"
        levels = len(config.montage.ratios)
        self._meter = Meter(levels, self.model.scores, self.device, trainer.precision == "fp16", self._skips)
        if state is not None:
            self.load_state_dict(state, str(self.folder))
        self._saver = Saver(self.folder / "checkpoints", trainer.keep)
        self._evaluations = Evaluations(config, {"train": source, **held_out}, self.steps, self.steps_per_epoch)
        self.finished = self.step == self.steps and not self._evaluations.missing(self.step)
        if not self.finished:
            self._prepare_folder()

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> None:
        """Trains and evaluates until the end or a signal.

        Raises:
            CheckpointError: a checkpoint could not be saved.
            NonFiniteLossError: loss or gradient is infinite or NaN.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint was saved.
        """
        with hang.deadline(self.folder / "hangs", self.config.trainer.timeout) as extend:
            self._fit(extend)

    def _fit(self, extend: Callable[[], None]) -> None:
        metrics = Metrics(self.config, self.step) if distributed.rank() == 0 else None
        self._describe()
        consensus, stop = Consensus(), 0
        trainer = self.config.trainer
        every = max(1, round(trainer.checkpoint_epochs * self.steps_per_epoch))
        warn_of_collapse = CollapseWarning(self.config)
        stopwatch = Stopwatch(self.steps - self.step, self._update.timer)
        with (
            Signals() as signals,
            ProgressBar(self.config, self.step, self.steps) as bar,
            profiled(self.folder / "profile", trainer.profile) as count_step,
        ):
            try:
                with stopwatch.standing():
                    stop = self._evaluate(metrics, extend, consensus, signals)
                while self.step < self.steps and not stop:
                    extend()
                    with stopwatch.waiting():
                        query, key = next(self.loader)
                    with memory.explained(self.config, self.device, self.loader):
                        output, grad_norm = self.train_step(query, key)
                    self._meter.add(self.step, output, grad_norm)
                    self.step += 1
                    stopwatch.lap(trainer.global_batch)
                    bar.advance()
                    count_step()
                    stop = consensus(signals.received)
                    if self.step % trainer.log_every == 0 or self.step == self.steps:
                        record = self._record(stopwatch)
                        if metrics is not None:
                            metrics.write(record)
                            bar.show(record)
                            warn_of_collapse(record)
                    evaluated = bool(self._evaluations.names(self.step))
                    if self.step % every == 0 or self.step == self.steps or stop or evaluated:
                        with stopwatch.saving():
                            self.save()
                    self._saver.check()
                    if evaluated and not stop:
                        with stopwatch.standing():
                            stop = self._evaluate(metrics, extend, consensus, signals)
                self._saver.wait()
                distributed.barrier()  # torchrun ends all processes as soon as one has failed or was stopped
            except BaseException:
                self._saver.settle()
                hang.end_after(hang.GRACE)  # closing waits for the GPU, which may wait for a process that has ended
                raise
            finally:
                self.loader.close()
                if metrics is not None:
                    metrics.close()
            if stop := stop or signals.received:
                _warn("stopped by signal %d at step %d; the same command continues", stop, self.step)
                raise Interrupted(128 + stop)

    def _evaluate(
        self, metrics: Metrics | None, extend: Callable[[], None], consensus: Consensus, signals: Signals
    ) -> int:
        """Runs the evaluations of this step that are missing; returns the signal that ended them, or 0."""

        def progress() -> None:
            extend()
            if stop := consensus(signals.received):
                raise _Stopped(stop)

        if not self._evaluations.names(self.step):
            return 0
        self._saver.wait()  # this checkpoint may become the best
        write = metrics.write if metrics is not None else lambda _: None
        try:
            self._evaluations.run(self.model, self.device, self.step, write, progress)
        except _Stopped as stopped:
            return stopped.signal
        return 0

    def train_step(self, query: MontageBatch, key: MontageBatch) -> tuple[Output, Tensor]:
        """Runs the next step (:class:`~mcl.train.step.TrainingStep`) with scheduled learning rate and momentum."""
        optim, trainer = self.config.optim, self.config.trainer
        lr = learning_rate(optim, trainer.global_batch, self.step, self.steps, self.steps_per_epoch)
        return self._update(query, key, lr, ema.momentum(optim.ema, self.step, self.steps, optim.final_ema))

    # ------------------------------------------------------------------------------------------------ state

    def save(self) -> None:
        """Starts to save a checkpoint in the background. Raises if the loss is no longer finite."""
        self._check_finite()
        for bad in distributed.gather_objects(self.loader.bad):
            self.loader.share(bad)
        if distributed.rank() == 0:
            self._saver.save(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": to_dict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            **({"classes": list(self.model.classes)} if self.model.labelled else {}),
            **self._update.state_dict(),
            "loader": self.loader.state_dict(),
            "files": self.loader.source.digest(),
            "rng": rng,
            "environment": self._environment(),
        }

    def load_state_dict(self, state: dict[str, Any], origin: str) -> None:
        """Restores a state of :meth:`state_dict`; `origin` names the file in errors."""
        checkpoint.restore(self.model, state["model"], origin)
        self._update.load_state_dict(state)
        self.loader.load_state_dict(state["loader"])
        self.step = state["step"]
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        before, now = state["environment"], self._environment()
        changed = [f"{k} was {before.get(k)}, is {now[k]}" for k in now if before.get(k) != now[k]]
        if changed and before.get("deterministic") and self.config.trainer.deterministic:
            raise ConfigError(
                f"trainer.deterministic: the run in {self.folder} cannot be resumed bit for bit: {'; '.join(changed)}; "
                "restore the old values, or set trainer.deterministic=false"
            )
        if changed:
            _warn("resuming, but not bit for bit: %s", "; ".join(changed))

    def _check_resumable(self, state: dict[str, Any], source: Source) -> None:
        """
        Raises:
            ConfigError: the folder has another run, or ``trainer.resume`` is never.
        """
        if self.config.trainer.resume == "never":
            raise ConfigError(f"trainer.resume: never, but {self.folder} already has a run; choose another name")
        before = from_dict(state["config"])
        if changes := changed_keys(before, self.config):
            key = changes[0]
            raise ConfigError(
                f"{key}: was {value(before, key)!r} in the run in {self.folder}, is now {value(self.config, key)!r} "
                f"({len(changes)} keys differ: {', '.join(changes)}); keep the old ones to resume it. To train on from "
                f"its weights: name=NEW model.init={self.folder / 'checkpoints' / checkpoint.LAST}"
            )
        if state["files"] != source.digest():
            raise ConfigError(
                f"data.root: the files in {self.config.data.root} are not those that the run in {self.folder} was "
                "started with; put them back (broken ones may stay), or choose another name for a new run"
            )

    def _read_initial(self) -> str:
        """Loads the weights of ``model.init`` into the model; returns a description of them.

        Raises:
            CheckpointError, ConfigError: they cannot be read, downloaded or used.
        """
        from mcl.weights.start import start  # imports mcl.exporters, which imports this module

        source = self.config.model.init or self.config.trainer.init_from
        return distributed.local_rank_zero_first(lambda: start(self.model, source)) if source else ""

    def _environment(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "torch": str(torch.__version__),
            "device": name,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "world_size": distributed.world_size(),
            "engine": f"{self.loader.engine_name} on {self.loader.device}",
            "operators": ops.describe(self.device.type),
            "compiled": self.config.trainer.compile,
            "deterministic": self.config.trainer.deterministic,
        }

    # --------------------------------------------------------------------------------------------- set-up and messages

    def _prepare_folder(self) -> None:
        first = distributed.rank() == 0
        if first:
            check_sinks(self.config)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log_to_file(self.folder)
        except OSError as error:
            raise ConfigError(f"output: cannot write to {self.folder} ({error.strerror}); set output=FOLDER") from None
        if first:
            rewrite(self.folder / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))
            about = {"started": datetime.now().astimezone().isoformat(timespec="seconds"), **self._environment()}
            about["images"] = len(self.loader.source)
            rewrite(self.folder / ENVIRONMENT, json.dumps(about, indent=1))
            if not self.step:
                for name in ("bad_files.jsonl", EVALUATIONS):  # from a run without a checkpoint
                    (self.folder / name).unlink(missing_ok=True)
        elsewhere = {} if first else self.loader.source.bad
        self.loader.report_bad(BadFiles(self.folder / "bad_files.jsonl", elsewhere))
        if self.step:
            log.info("resumed at step %d of %d", self.step, self.steps)
        distributed.barrier()

    def _describe(self) -> None:
        source, plan, model, trainer = self.loader.source, self.loader.plan, self.config.model, self.config.trainer
        names = "" if not source.classes else f" in {len(source.classes)} classes"
        log.info("%d images%s in %s, %d of them bad", len(source), names, source.root, len(self.loader.bad))
        if n := source.by_pillow.sum():
            log.info("%d of these images are decoded by Pillow, which is slower: see dali_pipelines/README.md", n)
        log.info("loader: %s on %s (%s)", self.loader.engine_name, self.loader.device, self.loader.reason)
        log.info("operators: %s", ops.describe(self.device.type))
        if self._initial:
            log.info("initial weights: %s", self._initial)
        if costs := ops.costs(self.device.type):
            _warn("%s", costs)
        if busy := doctor.busy():
            _warn("%s", busy)
        if trainer.device == "auto" and self.device.type == "cpu" and _DRIVER.exists():
            _warn("training on the CPU: PyTorch sees no GPU, though there is a driver; mcl doctor reports why")
        log.info(
            f"{self.config.objective}, {model.backbone}, canvas {plan.geometry.canvas} px, {model.assembly}, "
            f"{model.compute}, {arithmetic.describe(trainer, self.device.type)} "
            f"on {self.device} x {distributed.world_size()}; "
            f"{plan.global_batch} images per step, {self.steps_per_epoch} steps per epoch, {self.steps} steps"
        )
        for doubt in self.config.doubts():
            _warn("%s", doubt)

    def _record(self, stopwatch: Stopwatch) -> dict[str, Any]:
        self._check_finite()
        optim, trainer = self.config.optim, self.config.trainer
        last = self.step - 1
        means = self._meter.read()
        if self._skips and means["skipped"]:
            _warn("%d steps since the last record had no finite gradient and were skipped", means["skipped"])
        return {
            "kind": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "lr": learning_rate(optim, trainer.global_batch, last, self.steps, self.steps_per_epoch),
            "ema": ema.momentum(optim.ema, last, self.steps, optim.final_ema),
            **stopwatch.read(),
            **memory.peak(self.device),
            **means,
        }

    def _check_finite(self) -> None:
        failure = self._meter.failure()
        if failure is not None:
            step, levels = failure
            what = f"loss of level {', '.join(map(str, levels))}" if levels else "gradient"
            what = f"{what} was not finite at step {step}"
        elif (skipped := self._meter.skipped_in_a_row()) >= _SKIPPED_IN_A_ROW:
            what = f"gradient was not finite in the last {skipped} steps"
        else:
            return
        self._saver.settle()  # the last checkpoint may still be being written
        good = checkpoint.steps(self.folder / "checkpoints")
        raise NonFiniteLossError(
            f"the {what}; last good checkpoint: {good[-1] if good else 'none'}. "
            "Lower optim.base_lr or lengthen optim.warmup_epochs"
        )


def _warn(message: str, *values: object) -> None:
    """Warns of what all processes find, in the first one."""
    if distributed.rank() == 0:
        log.warning(message, *values)
