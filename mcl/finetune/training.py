"""A fine-tuning run: from the configuration to the table of AP."""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, init_dist, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from mcl import distributed
from mcl.config import ConfigError
from mcl.finetune import annotations, console, detection, hooks, metric, resume, schedule, weights
from mcl.finetune.data import Folder, open_folder
from mcl.finetune.labels import CHOSEN
from mcl.finetune.settings import innermost, replace
from mcl.finetune.workers import check_shared_memory, reporting_loader_errors
from mcl.records.metrics import log, log_to_console, log_to_file, recorded_errors, rewrite
from mcl.signals import Signals

BAD_FILES = "bad_files.jsonl"
PICTURE = "predictions.png"
MOST = 100
"""Maximum number of categories for which the terminal shows the AP of each; ``train.log`` always has them."""

_HOOKS_OF_TESTS = [{"type": "PlainMessages"}, {"type": "APTable"}]


def finetune(config: Config, *also: Hook) -> str:
    """Trains and evaluates, or continues; see :func:`mcl.finetune.finetune`.

    Args:
        config: configuration of the run.
        also: hooks in addition to those of the configuration.
    """
    if config.launcher != "none" and not is_distributed():  # as MMEngine's runner would do later
        set_multi_processing(**config.env_cfg.mp_cfg, distributed=True)
        init_dist(config.launcher, **config.env_cfg.dist_cfg)
    log_to_console()
    with recorded_errors(), reporting_loader_errors(config.timeout):
        return _finetune(config, also)


def _finetune(config: Config, also: Sequence[Hook]) -> str:
    masks = "segm" in config.val_evaluator.metric
    lvis = config.val_dataloader.dataset.type == "LVISFolder"
    data = config.data
    part = data.fraction, data.fraction_seed
    folder = open_folder(data.root, data.classes, masks, lvis, data.index, data.max_bad_fraction, *part)
    use(config, folder)
    if epochs := config.get("epochs"):
        before, steps = config.train_cfg.max_iters, round(epochs * folder.images / config.global_batch)
        config.train_cfg.max_iters = max(1, steps)
        schedule.scale(config, before, config.pop("given"))
    check_shared_memory(config)
    if config.get("test"):
        config.update(load_from=str(resume.to_test(config)), resume=False, custom_hooks=_HOOKS_OF_TESTS)
        _make_folder(config)
        return _test(config)
    own: list[Hook] = [resume.prepare(config, folder)]
    start = config.load_from or "none, the detector is trained from scratch"
    if config.weights and not config.resume:
        loaded = weights.load(config.weights, config.model, config.parts)
        own.append(loaded)
        start = loaded.summary
    _make_folder(config)
    if distributed.rank() == 0 and not config.resume:
        (Path(config.work_dir) / BAD_FILES).unlink(missing_ok=True)  # from a run without a checkpoint
    if distributed.rank() == 0 and data.fraction < 1:
        rewrite(Path(config.work_dir) / CHOSEN, "".join(f"{key}\n" for key in folder.chosen))
    whole = any(record["step"] == config.train_cfg.max_iters for record in _records(config))
    with Signals() as signals:
        runner = _Runner.from_cfg(config)
        runner.register_custom_hooks([*own, *also, hooks.Summary(start), hooks.SaveOnSignal(signals)])
        with contextlib.redirect_stdout(console.Printed(runner.logger)):
            runner.train()
            if all(record["step"] < runner.iter for record in _records(config)):
                runner.val()  # the run ended between its last checkpoint and its last evaluation
            if not (whole and (Path(config.work_dir) / PICTURE).exists()):
                _show(runner)
    return metric.table(_records(config))


def _test(config: Config) -> str:
    log.info("checkpoint: %s, evaluated on %s", config.load_from, config.data.root)
    if distributed.rank() == 0:
        (Path(config.work_dir) / metric.RESULTS).unlink(missing_ok=True)  # results of another checkpoint
    runner = _Runner.from_cfg(config)
    with contextlib.redirect_stdout(console.Printed(runner.logger)):
        runner.val()
        _show(runner)
    return metric.table(_records(config))


def _show(runner: Runner) -> None:
    """Logs the AP of categories and draws detections in some images; a failure to draw does not end the run."""
    folder = Path(runner.work_dir)
    if distributed.rank() == 0:
        if table := metric.by_category(folder):
            log.info("%s", table.rstrip(), extra={"console": len(runner.cfg.data.classes) <= MOST})
        try:
            detection.compare(hooks.detector_of(runner), runner.val_dataloader, folder / PICTURE)
        except Exception as error:
            log.warning("no %s: %s: %s", PICTURE, type(error).__name__, error)


def _make_folder(config: Config) -> None:
    try:
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
        log_to_file(Path(config.work_dir))
    except OSError as error:
        raise ConfigError(f"output: cannot write to {config.work_dir} ({error.strerror}); set output=FOLDER") from None


class _Runner(Runner):
    def build_logger(self, *arguments: Any, **options: Any) -> Any:
        logger = super().build_logger(*arguments, **options)
        console.route_messages(logger)
        return logger

    def build_val_loop(self, loop: Any) -> Any:
        built = super().build_val_loop(loop)
        annotations.forget()  # this loop's evaluator is the last reader of them
        return built


def _records(config: Config) -> list[dict[str, Any]]:
    """Records of evaluations, read on the first process; the same on all processes."""
    records = [metric.read(Path(config.work_dir))]
    broadcast_object_list(records)
    return records[0]


def use(config: Config, folder: Folder) -> None:
    """Writes paths and classes of a folder into a configuration, and derives other settings."""
    config.data.classes = list(folder.classes)
    replace(config.model, "num_classes", ..., len(folder.classes))
    for split, dataset in (
        (folder.train, config.train_dataloader.dataset),
        (folder.val, config.val_dataloader.dataset),
    ):
        innermost(dataset).update(
            data_root=str(folder.root),
            ann_file=split.annotations,
            data_prefix={"img": split.images},
            metainfo={"classes": folder.classes},
        )
    innermost(config.train_dataloader).update(fraction=config.data.fraction, fraction_seed=config.data.fraction_seed)
    config.val_evaluator.ann_file = str(folder.root / folder.val.annotations)
    config.test_dataloader, config.test_evaluator = copy.deepcopy((config.val_dataloader, config.val_evaluator))
    replace(config.val_dataloader, "type", "LoadImageFromFile", "LoadCheckedImage")
    config.train_dataloader.dataset.update(
        seed=config.randomness.seed,
        bad_files=str(Path(config.work_dir) / BAD_FILES),
        max_bad_fraction=config.data.max_bad_fraction,
    )
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.worker_init_fn = {"type": "outlive_sigterm"}
        if loader.num_workers:
            loader.timeout = config.timeout
