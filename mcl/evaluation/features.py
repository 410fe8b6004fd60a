"""Backbone features of whole photographs, for kNN and the linear probe."""

import copy
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from dali_pipelines.loader import default_threads
from dali_pipelines.reference import decode
from dali_pipelines.source import Source
from mcl.config import Config
from mcl.models.backbones import Backbone

_BATCH = 64
_STATISTICS_BATCHES = 8


def load_photo(config: Config, source: Source, i: int) -> Tensor | None:
    """(3, S, S) normalised: short side to 8/7 of the canvas S, then the centre; None if image i cannot be decoded."""
    size = config.montage.final.canvas
    try:
        image = decode(source, i)
    except OSError:  # training has listed it already
        return None
    image = F.center_crop(F.resize(image, [round(size * 8 / 7)], antialias=True), [size, size])
    photo: Tensor = F.normalize(image.float() / 255, list(config.augment.mean), list(config.augment.std))
    return photo


def photos(config: Config, source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (n, 3, S, S) photographs and (n,) labels, in the source's order, without undecodable ones."""
    load = partial(load_photo, config, source)
    with ThreadPoolExecutor(config.data.threads or default_threads()) as pool:
        for start in range(0, len(source), _BATCH):
            loaded = enumerate(pool.map(load, range(start, min(start + _BATCH, len(source)))))
            images = {i: image for i, image in loaded if image is not None}
            if images:
                labels = torch.from_numpy(source.labels[start : start + _BATCH])
                yield torch.stack(list(images.values())), labels[list(images)]


@torch.no_grad()
def extract(backbone: Backbone, config: Config, source: Source, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean of C5 over space of photographs of known class, by a backbone in evaluation mode.

    Returns:
        (n, channels) float32 and (n,) labels, on the CPU.
    """
    features, labels = [], []
    batches = math.ceil(len(source) / _BATCH)
    shown = tqdm(photos(config, source), "features", batches, unit=" batches", disable=None, delay=1, leave=False)
    for images, label in shown:
        features.append(backbone(images.to(device))[0].mean((2, 3)).float().cpu())
        labels.append(label)
    classes = torch.cat(labels)
    return torch.cat(features)[classes >= 0], classes[classes >= 0]


def prepare(backbone: Backbone, config: Config, source: Source, device: torch.device) -> Backbone:
    """A copy on `device`, its BatchNorm statistics re-estimated on plain photographs of `source`."""
    backbone = copy.deepcopy(backbone).to(device, torch.float32).eval()
    update_bn(itertools.islice(photos(config, source), _STATISTICS_BATCHES), backbone, device)
    return backbone
