"""A fine-tuning from its configuration to its table of AP."""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mcl.config import ConfigError
from mcl.finetune import hooks, metric, resume, weights
from mcl.finetune.data import Folder, open_folder
from mcl.finetune.settings import innermost, replace
from mcl.signals import Signals


def finetune(config: Config) -> str:
    """Trains and evaluates, or continues; see :func:`mcl.finetune.finetune`."""
    masks = "segm" in config.val_evaluator.metric
    lvis = config.val_dataloader.dataset.type == "LVISFolder"
    folder = open_folder(config.data.root, config.data.classes, masks=masks, lvis=lvis)
    use(config, folder)
    own: list[Hook] = [resume.prepare(config, folder)]
    if config.weights and not config.resume:
        own.append(weights.load(Path(config.weights), config.model, **config.pretrained))
    try:
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: cannot write to {config.work_dir} ({error.strerror}); set output=FOLDER") from None
    with Signals() as signals:
        runner = Runner.from_cfg(config)
        runner.register_custom_hooks([*own, hooks.SaveOnSignal(signals)])
        runner.train()
        if all(record["step"] < runner.iter for record in _records(config)):
            runner.val()  # the run was cut between its last checkpoint and its last evaluation
    return metric.table(_records(config))


def _records(config: Config) -> list[dict[str, Any]]:
    """Evaluations that the first process has written, on all processes."""
    records = [metric.read(Path(config.work_dir))]
    broadcast_object_list(records)
    return records[0]


def use(config: Config, folder: Folder) -> None:
    """Puts paths and classes of a folder into a configuration."""
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
    config.val_evaluator.ann_file = str(folder.root / folder.val.annotations)
    config.train_dataloader.dataset.seed = config.randomness.seed
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.worker_init_fn = {"type": "outlive_sigterm"}
