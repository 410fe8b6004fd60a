"""Encoder: backbone, FPN and region head, and the ways to compute embeddings."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import STRIDE
from dali_pipelines.layout import cut, join
from mcl.config import ModelConfig
from mcl.models.backbones import Backbone
from mcl.models.fpn import FPN, Groups
from mcl.models.heads import MLP, GlobalHead, RegionHead
from mcl.ops import region_pool


class Encoder(nn.Module):
    """Backbone, FPN and region head, which compute one embedding per tile of the canvases.

    Args:
        config: names and widths, and ``compute``: with matched, FPN and head process only the canvases of each level,
            with released every canvas at every level. The embeddings differ only by BatchNorm statistics.
            ``assembly``: montage, or stack, where every tile is an image of its own.
        ratios: tiles per canvas side, per level.
        recompute: activation checkpointing of the backbone.
    """

    def __init__(self, config: ModelConfig, ratios: Sequence[int], recompute: bool = False) -> None:
        super().__init__()
        self.compute, self.assembly = config.compute, config.assembly
        self.ratios = tuple(ratios)
        depths = [r.bit_length() - 1 for r in ratios]  # a map twice as fine per doubling of the ratio
        self.backbone = Backbone(config.backbone, recompute, maps=depths[-1] + 1)
        self.fpn = FPN(self.backbone.channels, config.width, depths)
        self.head = RegionHead(config.width, config.head_convs, config.hidden)

    def forward(self, *views: MontageBatch) -> list[list[Tensor]]:
        """Embeddings of the tiles of views with equal numbers of canvases; BatchNorm normalises each view separately.

        Returns:
            (R, width) for each view and level.
        """
        if self.assembly == "stack":
            return self._stacked(views)
        return self._matched(views) if self.compute == "matched" else self._released(views)

    def _matched(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Processes all views together, since matrix products of few rows are slow."""
        canvases = views[0].canvas_counts
        levels = [*range(len(canvases))] * len(views)
        features = self.backbone(join([view.pixels for view in views]), [sum(canvases)] * len(views))
        maps = self.fpn(features, levels, canvases * len(views))
        regions = [boxes for view in views for boxes in view.regions()]
        counts = [len(boxes) for boxes in regions]
        embeddings = self.head(self.pool(maps, levels, regions, views[0].cells), counts).split(counts)
        return [list(embeddings[i : i + len(canvases)]) for i in range(0, len(regions), len(canvases))]

    def _stacked(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Processes one level after another, since their tiles differ in size, and both views together.

        Nothing is pooled: the map of a tile at its level already has cells x cells.
        """
        maps: list[Tensor] = []
        counts: list[int] = []
        for level, tiles in enumerate(zip(*(view.stacked() for view in views), strict=True)):
            own = [len(of_view) for of_view in tiles]
            maps += self.fpn(self.backbone(join(tiles), own), [level], views=own)
            counts += own
        embeddings = self.head(join(maps), counts).split(counts)
        return [list(embeddings[i :: len(views)]) for i in range(len(views))]

    def _released(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Processes every tile of every map in the head, view by view, finest map first."""
        counts, ratios = [len(view.pixels) for view in views], views[0].ratios
        maps = self.fpn(self.backbone(join([view.pixels for view in views]), counts), range(len(ratios)), views=counts)
        bounds = list(itertools.accumulate(views[0].canvas_counts, initial=0))
        embeddings = []
        for own in zip(*(Groups.apply(x, tuple(counts)) for x in maps), strict=True):
            every = [self.head(cut(x, ratio)) for x, ratio in zip(own[::-1], ratios[::-1], strict=True)][::-1]
            embeddings.append([every[i][bounds[i] * r**2 : bounds[i + 1] * r**2] for i, r in enumerate(ratios)])
        return embeddings

    def pool(self, maps: Sequence[Tensor], levels: Sequence[int], boxes: Sequence[Tensor], cells: int) -> Tensor:
        """Pools the tiles of all maps in one launch: (R, width, cells, cells), map by map."""
        index = torch.cat([b.new_full((len(b),), i, dtype=torch.int64) for i, b in enumerate(boxes)])
        strides = [STRIDE / self.ratios[level] for level in levels]
        return region_pool(maps, strides, torch.cat(list(boxes)), index, cells)


class GlobalEncoder(nn.Module):
    """Backbone, spatial mean and projector, which compute one embedding per canvas; there is no FPN.

    Args:
        config: names the backbone.
        projector: builds the projector for a number of input channels.
        recompute: activation checkpointing of the backbone.
    """

    fpn = None

    def __init__(self, config: ModelConfig, projector: Callable[[int], MLP], recompute: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone, recompute, maps=1)
        self.head = GlobalHead(projector(self.backbone.channels[0]))

    def forward(self, *views: MontageBatch) -> list[Tensor]:
        """Embeddings of the canvases of each view, (n, width); BatchNorm normalises each view separately."""
        counts = [len(view.pixels) for view in views]
        features = self.backbone(join([view.pixels for view in views]), counts)[0]
        return list(self.head(features, counts).split(counts))
