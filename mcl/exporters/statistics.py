"""Re-estimates BatchNorm's running statistics of an export, on montages or on whole photographs."""

import copy
import dataclasses
import itertools
from typing import Any

import torch
from torch.optim.swa_utils import update_bn

from dali_pipelines.geometry import nearest_legal
from dali_pipelines.loader import MontageLoader
from dali_pipelines.source import SourceError, open_images
from mcl.config import Config, ConfigError
from mcl.evaluation.features import STATISTICS_IMAGES, prepare
from mcl.models import Encoder
from mcl.train.trainer import resolve_device

_BATCHES = 8
_IMAGES = 64


def of_montages(encoder: Encoder, cfg: Config) -> Encoder:
    """A copy of the encoder whose BatchNorm statistics are means over new montages of data.root, of all levels.

    Raises:
        ConfigError, SourceError: there are no images, or too few for a montage.
    """
    source = open_images(cfg.data)
    geometry = cfg.montage.final
    images = nearest_legal(geometry, min(_IMAGES, len(source)))[0]
    if images > len(source):
        raise ConfigError(
            f"data.root: {source.root} has only {len(source)} images; re-estimating BatchNorm's statistics needs at "
            f"least {images}"
        )
    plan = cfg.plan(len(source), images, geometry=geometry)
    device = resolve_device(cfg.trainer.device)
    encoder = copy.deepcopy(encoder).to(device)
    data = dataclasses.replace(cfg.data, max_bad_fraction=1.0)  # the limit was checked in training
    with MontageLoader(source, plan, data, gpu=device.index) as loader:
        views = itertools.chain.from_iterable(itertools.islice(loader, _BATCHES))
        update_bn((view.to(device, torch.float32) for view in views), encoder)
    return encoder.cpu()


def of_photographs(encoder: Encoder, cfg: Config, folder: str) -> tuple[Encoder, str]:
    """A copy of the encoder whose backbone has the statistics of whole photographs, as in `mcl evaluate`.

    Args:
        folder: folder of the photographs; empty for those of data.root.

    Returns:
        The copy, and a description of its statistics.

    Raises:
        ConfigError: there are no photographs, or the backbone has no BatchNorm.
    """
    data = dataclasses.replace(cfg.data, root=folder, source="auto", annotations="") if folder else cfg.data
    try:
        source = open_images(data)
    except SourceError as error:
        raise ConfigError(
            f"--statistics: no photographs to re-estimate BatchNorm's statistics on ({error}); set it to a folder, or "
            "to none"
        ) from None
    if len(source) < 2:
        raise ConfigError(f"--statistics: {source.root} has only {len(source)} images; statistics need at least 2")
    if not any(name.endswith("running_mean") for name, _ in encoder.backbone.named_buffers()):
        raise ConfigError(f"--statistics: model.backbone={cfg.model.backbone} has no BatchNorm; remove the option")
    encoder = copy.deepcopy(encoder)
    prepared: Any = prepare([encoder.backbone], cfg, source, resolve_device(cfg.trainer.device))[0]
    encoder.backbone = prepared.cpu()
    return encoder, f"re-estimated on {min(STATISTICS_IMAGES, len(source))} photographs (backbone only)"
