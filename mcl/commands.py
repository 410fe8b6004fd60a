"""What the verbs do: a whole run from its configuration, and what is done with its checkpoints."""

import dataclasses
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import record

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import nearest_legal
from dali_pipelines.loader import MontageLoader
from dali_pipelines.source import Source, index_file, open_images
from mcl import config, distributed, evaluation
from mcl.config import Config, ConfigError, DataConfig
from mcl.distributed import local
from mcl.evaluation import embedding, neighbours
from mcl.evaluation.features import Maps, photos, prepare
from mcl.evaluation.scoring import describe
from mcl.objectives import Objective, build
from mcl.records import preview as pictures
from mcl.records import report
from mcl.records.metrics import (
    EVALUATIONS,
    Record,
    RecordError,
    append,
    log,
    log_to_console,
    log_to_file,
    read,
    recorded_errors,
)
from mcl.records.tensorboard import show_picture
from mcl.signals import Interrupted
from mcl.train import arithmetic, checkpoint
from mcl.train.trainer import Trainer, resolve_device

_PREVIEW_PHOTOS = 6
_BAD_EXAMPLES = 5


def run(cfg: Config) -> None:
    """:func:`pretrain` on the devices of ``trainer.devices``, in one process for each.

    Raises:
        ProcessError: one of several processes failed; and see :func:`pretrain`.
    """
    trainer = cfg.trainer
    gpus = distributed.gpus() if trainer.device != "cpu" else 0
    numbers = local.devices("trainer.devices", trainer.devices, gpus, partial(_divides, cfg))
    if numbers == [0]:
        return pretrain(cfg)
    cfg.images_per_rank(len(numbers))
    with tempfile.TemporaryDirectory(prefix="mcl-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config.to_dict(cfg), sort_keys=False))
        local.run(["pretrain", str(file)], numbers, "trainer.devices", gpus, trainer.timeout)


def _divides(cfg: Config, processes: int) -> bool:
    try:
        return cfg.images_per_rank(processes) > 0
    except ConfigError:
        return False


@record  # for torchrun, which then says why a process ended
def pretrain(cfg: Config) -> None:
    """Trains, then evaluates, draws and reports into the run folder.

    Raises:
        ConfigError, SourceError, CheckpointError: wrong input.
        PeerError: another process ended or hangs.
        NonFiniteLossError, Interrupted: see :meth:`mcl.train.trainer.Trainer.fit`.
    """
    with recorded_errors(), distributed.naming_peers():
        trainer = Trainer(cfg)
        first = distributed.rank() == 0
        if not trainer.finished:
            if first and trainer.step < trainer.steps:
                _draw(cfg, trainer.step, lambda folder: montages(cfg, trainer.step, folder, trainer.loader.source))
            try:
                trainer.fit()
            except Interrupted:  # of all processes at the same step, so that none is waited for in vain
                distributed.teardown()
                raise
    distributed.teardown()  # what follows is the first process's alone
    if first:
        with recorded_errors():
            _finish(trainer)


def _finish(trainer: Trainer) -> None:
    cfg, folder = trainer.config, trainer.folder
    if trainer.finished and (folder / "report.html").exists():
        log.info("the run is finished: all %d steps are done", trainer.step)
        for scores in read(folder / EVALUATIONS):
            if scores["step"] == trainer.step and scores["by"] == "run":
                log.info("%s", describe(scores))
    else:
        if trainer.finished:
            log_to_file(folder)
        _draw(cfg, trainer.step, lambda pictures_folder: features(trainer.model, cfg, pictures_folder))
        report.write(folder)
    log.info("report: %s", folder / "report.html")
    log.info("weights: %s", folder / "checkpoints" / checkpoint.LAST)


def _draw(cfg: Config, step: int, picture: Callable[[Path], Path]) -> None:
    """Draws into the run folder and TensorBoard, if pictures are wanted; a run never ends for want of one."""
    try:
        if cfg.log.preview:
            show_picture(cfg, picture(cfg.run_folder / "preview"), step)
    except Exception as error:  # a picture meets the disk, the images and DALI; none of them may cost a run
        log.warning("no picture: %s: %s", type(error).__name__, error)


def evaluate(name: str, path: Path, overrides: Sequence[str] | Mapping[str, Any]) -> list[Record]:
    """Scores a checkpoint, by a record for each split; a run's own checkpoint also in the run's list and report.

    Raises:
        CheckpointError, ConfigError, SourceError: wrong input.
    """
    state = checkpoint.load(path)
    model, cfg = checkpoint.built(state, path)
    cfg = config.override(cfg, overrides)
    arithmetic.choose(cfg.trainer)
    records = evaluation.evaluate([name], model, cfg, resolve_device(cfg.trainer.device))
    folder = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and (folder / "config.yaml").exists():
        try:
            for record in records:
                append(folder / EVALUATIONS, {**record, "step": state["step"], "by": "mcl evaluate"})
            if (folder / "report.html").exists():
                report.write(folder)
        except (RecordError, OSError) as error:  # somebody else's run, perhaps
            warnings.warn(f"{error}; the scores are in no file", stacklevel=2)
    return records


def embed(
    path: Path, images: str, out: Path, features: str, plot: str, overrides: Sequence[str] | Mapping[str, Any]
) -> Iterator[str]:
    """Writes features of images, and draws them if `plot` is pca or umap; yields what was written.

    Args:
        path: of the checkpoint.
        images: as ``data.root``; the checkpoint's other keys of ``data`` that say what images there are do not count.
        out, features: as of :func:`mcl.evaluation.embedding.embed`.
        overrides: ``key=value`` words, or values by dotted keys.

    Raises:
        CheckpointError, ConfigError, SourceError, BadDataError: wrong input.
        EmbeddingError: a file cannot be written.
    """
    log_to_console()
    embedding.check(out)
    neighbours.check(plot)
    model, cfg = checkpoint.load_model(path)
    cfg = config.override(
        cfg, {"data.root": images, "data.source": "auto", "data.annotations": "", "data.val_root": ""}
    )
    cfg = config.override(cfg, overrides)
    arithmetic.choose(cfg.trainer)
    source = open_images(cfg.data)
    made = embedding.embed(model.online, cfg, source, resolve_device(cfg.trainer.device), out, features)
    yield f"{made.path}: {len(made.names)} x {made.rows().shape[1]} features, {len(made.bad)} images are bad"
    if plot:
        yield from map(str, neighbours.draw(made, source, plot))


def preview(path: Path, overrides: Sequence[str], step: int, output: Path | None = None) -> Iterator[Path]:
    """Draws what a configuration, or a checkpoint, makes of its images; yields the files written.

    Args:
        path: of the configuration or checkpoint.
        overrides: ``key=value`` words.
        step: of the run.
        output: folder to write; None: ``preview/`` of the run folder, a checkpoint's own, or beside a checkpoint that
            lies in none.

    Raises:
        CheckpointError, ConfigError, SourceError: wrong input.
    """
    model = None
    if path.suffix == ".pt":
        model, cfg = checkpoint.load_model(path)
        cfg = config.override(cfg, overrides)
        folder = path.absolute().parent
        output = output or (folder.parent if folder.name == "checkpoints" else folder) / "preview"
    else:
        cfg = config.load(path, overrides)
        output = output or cfg.run_folder / "preview"
    source = open_images(cfg.data)
    steps = cfg.trainer.epochs * (len(source) // cfg.trainer.global_batch)
    if not 0 <= step < max(1, steps):
        raise ConfigError(f"--step: {step} is none of the run's {steps} steps, which count from 0")
    yield montages(cfg, step, output, source)
    if model is not None:
        yield features(model, cfg, output)


def montages(cfg: Config, step: int, folder: Path, source: Source) -> Path:
    """Draws both views of the first images of a step; returns the picture's path."""
    query, key = batch(cfg, step, source)
    path = folder / f"montage_{step:06d}.png"
    pictures.montages(query, key, cfg.augment, path)
    return path


def batch(cfg: Config, step: int, source: Source) -> tuple[MontageBatch, MontageBatch]:
    """Both views of the first images of a step, as many as make the smallest montage, on the CPU.

    Images, crops and colours are those of the run; their neighbours in the montages are not, where the batch is larger.
    """
    images = nearest_legal(cfg.montage, 1)[0]
    plan = cfg.plan(len(source), images, world_size=max(1, cfg.trainer.global_batch // images))
    with MontageLoader(source, plan, dataclasses.replace(cfg.data, device="cpu")) as loader:
        loader.load_state_dict({"position": step, "bad": {}})
        query, key = next(loader)
        return query, key


def features(model: Objective, cfg: Config, folder: Path) -> Path:
    """Draws feature maps of some photographs, held-out ones if there are any; returns the picture's path.

    The same network untrained is shown beside the trained one, both with BatchNorm statistics of photographs.
    """
    source = open_images(cfg.data, held_out=bool(cfg.data.val_root))
    device = next(model.parameters()).device
    torch.manual_seed(cfg.trainer.seed)
    networks = [Maps(own.online) for own in (model, build(cfg, model.classes))]
    trained, untrained = prepare(networks, cfg, source, device)
    spread = np.arange(0, len(source), max(1, len(source) // _PREVIEW_PHOTOS))[:_PREVIEW_PHOTOS]
    ((images, _),) = photos(cfg, source, device, spread)
    path = folder / "features.png"
    shown = {"Trained": trained, "Untrained": untrained}
    pictures.feature_maps(shown, networks[0].names, images, path, cfg.augment)
    return path


def index(data: DataConfig) -> Iterator[str]:
    """Brings the index up to date; yields what there is to say, in lines.

    Raises:
        SourceError: see :func:`dali_pipelines.source.open_source`.
    """
    yield from _index(data, held_out=False)
    if data.val_root:
        yield from _index(data, held_out=True)


def _index(data: DataConfig, held_out: bool) -> Iterator[str]:
    read = [0]
    start = time.perf_counter()
    source = open_images(data, held_out, lambda done, of, images: read.append(images))
    seconds = time.perf_counter() - start
    classes = f" in {len(source.classes)} classes" if source.classes else ""
    yield f"{source.root}: {len(source)} images{classes}, {len(source.bad)} of them bad ({source.kind})"
    for i, reason in list(source.bad.items())[:_BAD_EXAMPLES]:
        yield f"  {source.names[i]}: {reason}"
    if n := source.by_pillow.sum():
        yield f"  {n} of them are decoded by Pillow, which is slower: dali_pipelines/README.md says which"
    yield f"  {read[-1]} headers read in {seconds:.1f} s, {read[-1] / seconds:.0f} per second"
    path = index_file(data.index, source.root, source.kind, "" if held_out else data.annotations)
    yield f"  index: {path if os.path.exists(path) else 'could not be written'}"
