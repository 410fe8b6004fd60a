"""MCL: online and momentum encoder, predictors, and the two ways to compute their loss."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mcl import distributed
from mcl.config import ModelConfig
from mcl.loss import contrast, total_loss
from mcl.models.backbones import Backbone
from mcl.models.fpn import FPN
from mcl.models.heads import RegionHead, predictor
from mcl.montage import STRIDE, Geometry, MontageBatch, all_tiles
from mcl.ops import region_pool


class Encoder(nn.Module):
    """Backbone, FPN and region head: canvases to one embedding per tile.

    Args:
        config: names and widths.
        ratios: tiles per canvas side, per level.
    """

    def __init__(self, config: ModelConfig, ratios: Sequence[int]) -> None:
        super().__init__()
        self.ratios = tuple(ratios)
        self.backbone = Backbone(config.backbone)
        depths = [r.bit_length() - 1 for r in ratios]  # a map twice as fine per doubling of the ratio
        self.fpn = FPN(self.backbone.channels, config.width, depths)
        self.head = RegionHead(config.width, config.head_convs, config.hidden)

    def forward(
        self, images: Tensor, canvases: Sequence[int], boxes: Sequence[Tensor], cells: int, compute: str
    ) -> list[Tensor]:
        """Embeddings of the tiles of every level.

        Args:
            images: (K, 3, S, S), canvases of all levels, level 0 first.
            canvases: canvases per level.
            boxes: per level (R, 5) its tiles: row among the level's canvases, x1, y1, x2, y2 in canvas pixels.
            cells: feature cells per tile side.
            compute: matched, where FPN and head see only each level's own canvases, or released, where they see every
                canvas at every level. The embeddings differ only by BatchNorm's statistics.

        Returns:
            Per level, (R, width).
        """
        features = self.backbone(images)
        levels = range(len(canvases))
        if compute == "matched":
            return self.matched(
                features, canvases, boxes, cells, [self.fpn for _ in levels], [self.head for _ in levels]
            )
        maps = self.fpn(features, levels)
        everything = [all_tiles(r, STRIDE * cells, len(images), images.device) for r in self.ratios]
        tiles = self.pool(maps, everything, cells)
        embeddings = {i: self.head(tiles[i]) for i in reversed(levels)}  # finest map first
        bounds = list(itertools.accumulate(canvases, initial=0))
        return [embeddings[i][bounds[i] * r**2 : bounds[i + 1] * r**2] for i, r in enumerate(self.ratios)]

    def matched(
        self,
        features: Sequence[Tensor],
        canvases: Sequence[int],
        boxes: Sequence[Tensor],
        cells: int,
        fpns: Sequence[nn.Module],
        heads: Sequence[nn.Module],
    ) -> list[Tensor]:
        """Embeddings from the backbone's maps of all canvases: each level its own, through its FPN and head.

        Levels follow each other, level 0 first, since this is the order in which running statistics are updated.
        """
        bounds = list(itertools.accumulate(canvases, initial=0))
        maps = [fpn([f[bounds[i] : bounds[i + 1]] for f in features], [i])[0] for i, fpn in enumerate(fpns)]
        return [head(tiles) for head, tiles in zip(heads, self.pool(maps, boxes, cells), strict=True)]

    def pool(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], cells: int) -> list[Tensor]:
        """Tiles of every level, per level (R, width, cells, cells), in one launch."""
        counts = [len(b) for b in boxes]
        index = torch.cat([b.new_full((len(b),), i, dtype=torch.int64) for i, b in enumerate(boxes)])
        strides = [STRIDE / r for r in self.ratios[: len(maps)]]
        return list(region_pool(maps, strides, torch.cat(list(boxes)), index, cells).split(counts))


@dataclass(frozen=True)
class Output:
    """Of one step: V = 2 directions (query view first), L levels. All but `loss` are detached."""

    loss: Tensor  # () total, with gradient
    losses: Tensor  # (V, L) cross-entropy before weights and the factor 2 T
    positive: Tensor  # (V, L) mean cosine between a tile and its own image's target
    negative: Tensor  # (V, L) mean cosine between a tile and the other targets


class MCL(nn.Module):
    """The model of a training step.

    The target encoder starts as a copy of the online one and is updated by :func:`mcl.ema.update` alone; it stays in
    training mode, so its BatchNorms use the statistics of its own batches.

    Args:
        config: section ``model`` of the configuration.
        geometry: section ``montage``.
    """

    def __init__(self, config: ModelConfig, geometry: Geometry) -> None:
        super().__init__()
        self.config = config
        self.online = Encoder(config, geometry.ratios)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictors = nn.ModuleList(predictor(config.width, config.hidden) for _ in geometry.ratios)

    def forward(self, query: MontageBatch, key: MontageBatch) -> Output:
        """One step: every tile against the full images of the other view, over all ranks."""
        targets = [self.targets(view) for view in (query, key)]  # no gradient, so first: the gather starts early
        directions = [
            contrast(self.predictions(view), self.sources(view), bank, self.config.temperature)
            for view, bank in zip((query, key), (targets[1], targets[0]), strict=True)
        ]
        losses, positive, negative = (torch.stack(values) for values in zip(*directions, strict=True))  # (V, L) each
        loss = total_loss(losses, self.config.loss_weights, self.config.temperature)
        return Output(loss, losses.detach(), positive.detach(), negative.detach())

    @torch.no_grad()
    def targets(self, view: MontageBatch) -> Tensor:
        """Momentum embeddings of all ranks' full images: (B, width), rank after rank."""
        if self.config.compute == "released":
            embeddings = self.target(view.images, view.canvases, view.regions(view.canvases), view.cells, "released")[0]
        else:
            full = view.canvases[:1]  # level 0
            embeddings = self.target(view.images[: full[0]], full, view.regions(full), view.cells, "matched")[0]
        return distributed.all_gather(embeddings)

    def predictions(self, view: MontageBatch) -> list[Tensor]:
        """Online predictions of the tiles of every level: per level (R, width)."""
        images = view.images
        if view.queries != view.canvases:
            images = torch.cat([c[:q] for c, q in zip(images.split(view.canvases), view.queries, strict=True)])
        boxes = view.regions(view.queries)
        embeddings = self.online(images, view.queries, boxes, view.cells, self.config.compute)
        return [predict(z) for predict, z in zip(self.predictors, embeddings, strict=True)]

    def sources(self, view: MontageBatch) -> list[Tensor]:
        """Row in the bank of targets of each tile's own image: per level (R,) int64."""
        offset = distributed.rank() * len(view.index)
        rows = [q * r * r for q, r in zip(view.queries, view.ratios, strict=True)]
        return [view.sources[view.tiles(i)][: rows[i]] + offset for i in range(len(rows))]
