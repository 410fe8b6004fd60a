"""Features of whole photographs. Each image is decoded once, by one of the processes, with the loader of training.

Every process gets a contiguous share of the photographs, and all shares have the same number of steps, so that
processes can communicate after each step.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

from dali_pipelines.loader import MontageLoader, default_threads
from dali_pipelines.photos import PhotoPlan, canvas_of
from dali_pipelines.plan import order
from dali_pipelines.source import Source
from mcl import distributed
from mcl.config import Config, ConfigError

BATCH = 64
"""Photographs per step and process."""

STATISTICS_IMAGES = 8 * BATCH
"""Number of photographs on which BatchNorm's statistics are estimated."""

Numbers = npt.NDArray[np.int64]
Progress = Callable[[], None]
"""Called after every step by all processes. An exception that it raises ends the evaluation."""


@dataclass(frozen=True)
class Features:
    """Features of this process's share of images."""

    values: Tensor  # (n, D) float32, on the CPU
    index: Tensor  # (n,) int64 number of the image in the source, in the order of the requested numbers
    labels: Tensor  # (n,) int64 class, -1 unknown

    def select(self, rows: Tensor | slice) -> "Features":
        """A selection of rows."""
        return Features(self.values[rows], self.index[rows], self.labels[rows])


def photos(
    config: Config,
    source: Source,
    device: torch.device,
    numbers: Numbers | None = None,
    *,
    first: int = 0,
    whole: bool = False,
    cells: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of this process's share of a source's images, without images that cannot be decoded.

    Args:
        numbers: numbers of the images; None for all, in order.
        first: number of steps to skip, which an earlier call has done.
        whole: show the whole image, without keeping its aspect ratio, instead of the central square of 7/8 of the short
            side.
        cells: side of a photograph, in units of 32 pixels; None for the last size of the canvas schedule.

    Yields:
        pixels (n, 3, S, S) float32, normalised, on the device, and the images' numbers (n,), on the CPU. All processes
        get the same number of batches of at most 64 images; the last ones may be empty.

    Raises:
        BadDataError: none of the source's images can be decoded.
    """
    numbers = np.arange(len(source)) if numbers is None else numbers
    plan = PhotoPlan(
        seed=config.trainer.seed,
        size=len(source),
        images=BATCH,
        geometry=canvas_of(cells or config.montage.final.cells),
        augment=config.augment,
        shown=np.array_split(numbers, distributed.world_size())[distributed.rank()],
        whole=whole,
    )
    # Bad files were listed, and their limit checked, in training.
    data = dataclasses.replace(config.data, max_bad_fraction=1.0, tile_sampling="direct")
    if first < plan.steps:
        threads = data.threads or default_threads(distributed.local_world_size())
        with MontageLoader(source, plan, data, gpu=device.index, threads=threads) as loader:
            loader.load_state_dict({"position": first, "bad": {}})
            for step, (view,) in enumerate(loader, first):
                decoded = view.index == torch.from_numpy(plan.wanted(step))
                pixels = view.to(device, torch.float32).pixels
                yield (pixels if decoded.all() else pixels[decoded]), view.index[decoded]
    largest = -(-len(numbers) // distributed.world_size())
    for _ in range(max(first, plan.steps), -(-largest // BATCH)):
        yield torch.empty(0), torch.empty(0, dtype=torch.int64)


class Pooled(nn.Module):
    """Spatial means of a map of an encoder.

    Args:
        name: c2 to c5, a stage of the backbone, or p2 to p5, a map of the FPN.

    Raises:
        ConfigError: the encoder does not have this map.
    """

    def __init__(self, encoder: Any, name: str) -> None:
        super().__init__()
        self.backbone, self.stage = encoder.backbone, 5 - int(name[1])
        self.fpn, self.level = None, 0
        if name[0] == "p":
            self.fpn = getattr(encoder, "fpn", None)
            levels = () if self.fpn is None else self.fpn.depths
            if self.stage not in levels:
                known = ", ".join(f"p{5 - depth}" for depth in levels) or "none, since it has no FPN"
                raise ConfigError(f"evaluation.features: the model has no {name}; maps of its FPN: {known}")
            self.level = levels.index(self.stage)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) to (n, channels)."""
        maps = self.backbone(pixels)
        features = maps[self.stage] if self.fpn is None else self.fpn(maps, [self.level])[0]
        pooled: Tensor = features.mean((2, 3))
        return pooled


class Maps(nn.Module):
    """The maps of an encoder's FPN, level 0 first, or of the backbone if there is no FPN; `names` are p5, p4 and so
    on."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.backbone, self.fpn = encoder.backbone, getattr(encoder, "fpn", None)
        depths = range(len(encoder.backbone.channels)) if self.fpn is None else self.fpn.depths
        self.names = [f"{'c' if self.fpn is None else 'p'}{5 - depth}" for depth in depths]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(n, 3, S, S) to (n, channels, h, w) for each."""
        maps: list[Tensor] = self.backbone(pixels)
        return maps if self.fpn is None else self.fpn(maps, range(len(self.names)))


class _Each(nn.ModuleList):
    """Calls several networks with the same photographs."""

    def forward(self, pixels: Tensor) -> None:
        for network in self:
            network(pixels)


def prepare(
    networks: Sequence[nn.Module],
    config: Config,
    source: Source,
    device: torch.device,
    progress: Progress = lambda: None,
) -> list[nn.Module]:
    """Copies of networks on the device, in evaluation mode, with BatchNorm statistics of 512 photographs of the source.

    Every process computes the statistics itself, from the same photographs, so that all have the same copies.
    """
    copies = _Each(copy.deepcopy(list(networks))).to(device, torch.float32).eval()
    numbers = np.sort(order(config.trainer.seed, 0, len(source))[:STATISTICS_IMAGES])
    shuffled = numbers[order(config.trainer.seed, 1, len(numbers))]  # so that batches mix classes

    def pixels() -> Iterator[Tensor]:
        for batch, _ in photos(config, source, device, shuffled):
            if len(batch) > 1:
                yield batch

    with distributed.alone():
        update_bn(_reporting(pixels(), progress), copies)
    return list(copies)


def _reporting(batches: Iterator[Tensor], progress: Progress) -> Iterator[Tensor]:
    for batch in batches:
        progress()
        yield batch


@torch.no_grad()
def extract(
    networks: Sequence[nn.Module],
    config: Config,
    source: Source,
    device: torch.device,
    numbers: Numbers | None = None,
    progress: Progress = lambda: None,
) -> list[Features]:
    """Features of this process's share of photographs by several networks; each photograph is decoded once.

    Besides a batch, this needs n x D x 4 bytes of memory for each network, n being the number of images in the share.

    Args:
        networks: networks in evaluation mode, on the device, as :func:`prepare` returns them; they map (n, 3, S, S) to
            (n, D).
        numbers: numbers of the images; None for all.

    Returns:
        The features of each network.
    """
    total = -(-(len(source) if numbers is None else len(numbers)) // distributed.world_size())
    values: list[Tensor] = [torch.empty(0, 0) for _ in networks]
    index = torch.empty(total, dtype=torch.int64)
    done = 0
    with tqdm(total=total, desc="features", unit=" images", disable=_hidden(), delay=1, leave=False) as bar:
        for pixels, own in photos(config, source, device, numbers):
            for i, network in enumerate(networks if len(own) else ()):
                computed = network(pixels)
                if not done:
                    values[i] = torch.empty(total, computed.shape[1])
                values[i][done : done + len(own)] = computed
            index[done : done + len(own)] = own
            done += len(own)
            bar.update(len(own))
            progress()
    labels = torch.from_numpy(source.labels)[index[:done]]
    widths = distributed.gather_objects([own.shape[1] for own in values])  # unknown in processes without images
    return [
        Features(own[:done] if done else torch.empty(0, max(width)), index[:done], labels)
        for own, width in zip(values, zip(*widths, strict=True), strict=True)
    ]


def _hidden() -> bool | None:
    """Value of tqdm's `disable`: None hides the bar outside of a terminal."""
    return True if distributed.rank() else None
