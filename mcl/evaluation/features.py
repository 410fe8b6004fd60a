"""Features of whole photographs, for whatever is done with them: each image is decoded once, by one of the processes.

Photographs come out of the loader that training has. Every process takes an equal, contiguous share of them, and all
make equally many steps, so that they can exchange something after each.
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
"""Photographs of a step and process."""

STATISTICS_IMAGES = 8 * BATCH
"""Photographs for BatchNorm's statistics."""

Numbers = npt.NDArray[np.int64]
Progress = Callable[[], None]
"""Is called after every step, by all processes; what it raises ends the work."""


@dataclass(frozen=True)
class Features:
    """Of the images that this process had."""

    values: Tensor  # (n, D) float32, on the CPU
    index: Tensor  # (n,) int64 number in the source, increasing where the numbers asked for are
    labels: Tensor  # (n,) int64 class, -1 unknown

    def select(self, rows: Tensor | slice) -> "Features":
        """Some of its rows."""
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
    """Batches of this process's share of some images of a source, without those that cannot be decoded.

    Args:
        numbers: of the images; None: all, in order.
        first: steps to leave out, as those that were done before.
        whole: shows whole images, their sides scaled apart, in place of the middle square of 7/8 of the short side.
        cells: side of a photograph, in units of 32 pixels; None: that which the schedule ends with.

    Yields:
        pixels (n, 3, S, S) float32, normalised, on the device, and their numbers (n,), on the CPU. All processes get
        equally many batches of at most 64, of which the last ones may be empty.

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
    # Training has listed and judged the bad files.
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
    """Means over space of a map of an encoder.

    Args:
        name: c2 to c5, a stage of the backbone, or p2 to p5, a level of the pyramid.

    Raises:
        ConfigError: there is no such level.
    """

    def __init__(self, encoder: Any, name: str) -> None:
        super().__init__()
        self.backbone, self.stage = encoder.backbone, 5 - int(name[1])
        self.fpn, self.level = None, 0
        if name[0] == "p":
            self.fpn = getattr(encoder, "fpn", None)
            levels = () if self.fpn is None else self.fpn.depths
            if self.stage not in levels:
                known = ", ".join(f"p{5 - depth}" for depth in levels) or "none, for want of an FPN"
                raise ConfigError(f"evaluation.features: {name} is none of the levels that the model has: {known}")
            self.level = levels.index(self.stage)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) to (n, channels)."""
        maps = self.backbone(pixels)
        features = maps[self.stage] if self.fpn is None else self.fpn(maps, [self.level])[0]
        pooled: Tensor = features.mean((2, 3))
        return pooled


class Maps(nn.Module):
    """The maps of an encoder's pyramid, level 0 first, or of its backbone without one; `names` are p5, p4 and so on."""

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
    """Networks that see the same photographs."""

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
    """Copies on the device, in evaluation mode, with BatchNorm statistics of 512 photographs of the source.

    Every process computes these by itself, from the same photographs, so that all copies are the same.
    """
    copies = _Each(copy.deepcopy(list(networks))).to(device, torch.float32).eval()
    numbers = np.sort(order(config.trainer.seed, 0, len(source))[:STATISTICS_IMAGES])
    shuffled = numbers[order(config.trainer.seed, 1, len(numbers))]  # batches of many classes each

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
    """What networks in evaluation mode make of the photographs of this process's share, which are decoded once.

    Memory, beside a batch: n x D x 4 bytes for each network, n the images of the share.

    Args:
        networks: (n, 3, S, S) to (n, D), on the device, as :func:`prepare` makes them.
        numbers: of the images; None: all.

    Returns:
        For each network.
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
    widths = distributed.gather_objects([own.shape[1] for own in values])  # which who had no image does not know
    return [
        Features(own[:done] if done else torch.empty(0, max(width)), index[:done], labels)
        for own, width in zip(values, zip(*widths, strict=True), strict=True)
    ]


def _hidden() -> bool | None:
    """Whether a bar is not drawn; None: where nobody sees it."""
    return True if distributed.rank() else None
