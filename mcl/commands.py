"""Implementation of the verbs: runs, and work with their checkpoints."""

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
    """Runs :func:`pretrain` on the devices of ``trainer.devices``, one process per device.

    Raises:
        ProcessError: one of several processes failed. Other errors: see :func:`pretrain`.
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


@record  # torchrun then reports why a process ended
def pretrain(cfg: Config) -> None:
    """Trains, then evaluates, and writes pictures and the report to the run folder.

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
            except Interrupted:  # all processes stop at the same step, so none waits for another
                distributed.teardown()
                raise
    distributed.teardown()  # only the first process continues
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
    """Draws a picture into the run folder and TensorBoard if ``log.preview`` is set. A failure is only logged."""
    try:
        if cfg.log.preview:
            show_picture(cfg, picture(cfg.run_folder / "preview"), step)
    except Exception as error:  # the disk, the images or DALI can fail
        log.warning("no picture: %s: %s", type(error).__name__, error)


def evaluate(name: str, path: Path, overrides: Sequence[str] | Mapping[str, Any]) -> list[Record]:
    """Scores a checkpoint and returns one record per split. Scores of a checkpoint in a run are added to that run.

    Raises:
        CheckpointError, ConfigError, SourceError: wrong input.
    """
    state = checkpoint.load(path)
    model, cfg = checkpoint.built(state, path)
    cfg = config.override(_at_the_end(cfg), overrides)
    arithmetic.choose(cfg.trainer)
    records = evaluation.evaluate([name], model, cfg, resolve_device(cfg.trainer.device))
    folder = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and (folder / "config.yaml").exists():
        try:
            for record in records:
                append(folder / EVALUATIONS, {**record, "step": state["step"], "by": "mcl evaluate"})
            if (folder / "report.html").exists():
                report.write(folder)
        except (RecordError, OSError) as error:  # such as a run of another user
            warnings.warn(f"{error}; the scores are not written to the run", stacklevel=2)
    return records


def _at_the_end(cfg: Config) -> Config:
    """With the canvases of the last epoch, so that montage.cells sets another size whatever the run's schedule was."""
    return dataclasses.replace(cfg, montage=cfg.montage.final)


def embed(
    path: Path, images: str, out: Path, features: str, plot: str, overrides: Sequence[str] | Mapping[str, Any]
) -> Iterator[str]:
    """Writes features of images, and draws them if `plot` is pca or umap; yields the written files.

    Args:
        path: checkpoint.
        images: as for ``data.root``; replaces all keys of the checkpoint that select images.
        out, features: see :func:`mcl.evaluation.embedding.embed`.
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
        _at_the_end(cfg), {"data.root": images, "data.source": "auto", "data.annotations": "", "data.val_root": ""}
    )
    cfg = config.override(cfg, overrides)
    arithmetic.choose(cfg.trainer)
    source = open_images(cfg.data)
    made = embedding.embed(model.online, cfg, source, resolve_device(cfg.trainer.device), out, features)
    yield f"{made.path}: {len(made.names)} x {made.rows().shape[1]} features, {len(made.bad)} images are bad"
    if plot:
        yield from map(str, neighbours.draw(made, source, plot))


def preview(path: Path, overrides: Sequence[str], step: int, output: Path | None = None) -> Iterator[Path]:
    """Draws montages of a configuration or checkpoint, and feature maps of a checkpoint; yields the written files.

    Args:
        path: configuration or checkpoint.
        overrides: ``key=value`` words.
        step: step of the run, from 0.
        output: folder to write; None: ``preview/`` of the run folder, or in the folder of a checkpoint without a run.

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
        raise ConfigError(f"--step: the run has steps 0 to {steps - 1}, not {step}")
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
    """Both views of the first images of a step, on the CPU: the smallest number that makes a montage.

    Images, crops and colours are those of the run. If the run has larger batches, it places other images next to them.
    """
    images = nearest_legal(cfg.montage, 1)[0]
    plan = cfg.plan(len(source), images, world_size=max(1, cfg.trainer.global_batch // images))
    with MontageLoader(source, plan, dataclasses.replace(cfg.data, device="cpu")) as loader:
        loader.load_state_dict({"position": step, "bad": {}})
        query, key = next(loader)
        return query, key


def features(model: Objective, cfg: Config, folder: Path) -> Path:
    """Draws feature maps of some images, of ``data.val_root`` if it is set; returns the picture's path.

    The same network with random weights is shown beside the trained one, both with BatchNorm statistics of images.
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
    """Updates the index of image sizes; yields lines of a summary.

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
        yield f"  {n} of them are decoded by Pillow, which is slower: see dali_pipelines/README.md"
    yield f"  {read[-1]} headers read in {seconds:.1f} s, {read[-1] / seconds:.0f} per second"
    path = index_file(data.index, source.root, source.kind, "" if held_out else data.annotations)
    yield f"  index: {path if os.path.exists(path) else 'could not be written'}"
