"""What the verbs do: a whole run from its configuration, and what is done with its checkpoints."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from dali_pipelines.loader import BadDataError, MontageLoader
from dali_pipelines.plan import Plan
from dali_pipelines.source import Source, SourceError
from mcl import checkpoint, config, distributed, evaluation, report
from mcl import preview as pictures
from mcl.config import Config, ConfigError
from mcl.evaluation.features import load_photo
from mcl.evaluation.run import describe
from mcl.images import open_images
from mcl.metrics import Metrics, log, read, recorded_errors
from mcl.models import MCL
from mcl.montage import MontageBatch, nearest_legal
from mcl.trainer import Trainer, resolve_device

_PREVIEW_PHOTOS = 6


def pretrain(cfg: Config) -> None:
    """Trains, then evaluates, draws and reports into the run folder.

    Raises:
        ConfigError, SourceError, CheckpointError: wrong input.
        NonFiniteLossError, PeerError, Interrupted: see :meth:`mcl.trainer.Trainer.fit`.
    """
    try:
        with recorded_errors():
            trainer = Trainer(cfg)
            first = distributed.rank() == 0
            if first:
                _draw(cfg, lambda folder: montages(cfg, trainer.step, folder, trainer.loader.source))
            trainer.fit()
    finally:
        distributed.teardown()  # what follows is the first process's alone
    if first:
        _finish(trainer)


def _finish(trainer: Trainer) -> None:
    cfg, folder = trainer.config, trainer.folder
    done = {r["name"] for r in read(folder / "metrics.jsonl") if r["kind"] == "eval" and r["step"] == trainer.step}
    metrics = Metrics(cfg, trainer.step)
    for name in (name for name in cfg.evaluation.at_end if name not in done):
        try:
            records = list(evaluation.evaluate(name, trainer.model, cfg, trainer.device))  # all of its splits or none
        except (ConfigError, SourceError, BadDataError) as error:  # the images changed; the weights are none the worse
            log.warning("no %s: %s", name, error)
            continue
        for record in records:
            metrics.write({**record, "step": trainer.step})
            log.info("%s", describe(record))
    metrics.close()
    _draw(cfg, lambda pictures_folder: features(trainer.model, cfg, pictures_folder))
    log.info("report: %s", report.write(folder))
    log.info("weights: %s", folder / "checkpoints" / checkpoint.LAST)


def _draw(cfg: Config, picture: Callable[[Path], Path]) -> None:
    """Draws into the run folder, if pictures are wanted; a run never ends for want of one."""
    try:
        if cfg.log.preview:
            picture(cfg.run_folder / "preview")
    except Exception as error:  # a picture meets the disk, the images and DALI; none of them may cost a run
        log.warning("no picture: %s: %s", type(error).__name__, error)


def evaluate(name: str, path: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Scores a checkpoint; yields a line or two per split.

    Raises:
        CheckpointError, ConfigError, SourceError: wrong input.
    """
    model, cfg = checkpoint.load_model(path)
    cfg = config.override(cfg, overrides)
    for record in evaluation.evaluate(name, model, cfg, resolve_device(cfg.trainer.device)):
        yield describe(record)


def preview(path: Path, overrides: Sequence[str], step: int, output: Path) -> Iterator[Path]:
    """Draws what a configuration, or a checkpoint, makes of its images; yields the files written.

    Raises:
        CheckpointError, ConfigError, SourceError: wrong input.
    """
    model = None
    if path.suffix == ".pt":
        model, cfg = checkpoint.load_model(path)
        cfg = config.override(cfg, overrides)
    else:
        cfg = config.load(path, overrides)
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
    plan = Plan(
        seed=cfg.trainer.seed,
        size=len(source),
        images=images,
        geometry=cfg.montage,
        augment=cfg.augment,
        tile_sampling=cfg.data.tile_sampling,
        world_size=max(1, cfg.trainer.global_batch // images),
    )
    with MontageLoader(source, plan, dataclasses.replace(cfg.data, device="cpu")) as loader:
        loader.load_state_dict({"position": step, "bad": {}})
        return next(loader)


def features(model: MCL, cfg: Config, folder: Path) -> Path:
    """Draws feature maps of some photographs, held-out ones if there are any; returns the picture's path."""
    source = open_images(cfg.data, held_out=bool(cfg.data.val_root))
    load = partial(load_photo, source, size=cfg.montage.final.canvas, mean=cfg.augment.mean, std=cfg.augment.std)
    spread = range(0, len(source), max(1, len(source) // _PREVIEW_PHOTOS))
    images = [image for image in map(load, spread[:_PREVIEW_PHOTOS]) if image is not None]
    path = folder / "features.png"
    parameter = next(model.parameters())
    pictures.feature_maps(model.online, torch.stack(images).to(parameter), path, cfg.augment)
    return path
