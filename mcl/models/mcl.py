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
from mcl.models.heads import RegionHead, cut_tiles, predictor
from mcl.montage import Geometry, MontageBatch


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

    def forward(self, images: Tensor, canvases: Sequence[int], compute: str) -> list[Tensor]:
        """Embeddings of the tiles of every level.

        Args:
            images: (K, 3, S, S), canvases of all levels, level 0 first.
            canvases: canvases per level.
            compute: matched, where FPN and head see only each level's own canvases, or released, where they see every
                canvas at every level. The embeddings differ only by BatchNorm's statistics.

        Returns:
            Per level, (canvases[level] * ratio^2, width).
        """
        features = self.backbone(images)
        bounds = list(itertools.accumulate(canvases, initial=0))
        levels = range(len(canvases))
        if compute == "released":
            maps = self.fpn(features, levels)
            everything = {
                i: self.head(cut_tiles(maps[i], self.ratios[i])) for i in reversed(levels)
            }  # finest map first
            return [everything[i][bounds[i] * r**2 : bounds[i + 1] * r**2] for i, r in enumerate(self.ratios)]
        return [self.embed(features, bounds, i, self.fpn, self.head) for i in levels]

    def embed(self, features: list[Tensor], bounds: Sequence[int], level: int, fpn: FPN, head: RegionHead) -> Tensor:
        """Embeddings of one level's tiles, through FPN and head on its own canvases: rows bounds[level] to the next."""
        (level_map,) = fpn([f[bounds[level] : bounds[level + 1]] for f in features], [level])
        embeddings: Tensor = head(cut_tiles(level_map, self.ratios[level]))
        return embeddings


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
            embeddings = self.target(view.images, view.canvases, "released")[0]
        else:
            embeddings = self.target(view.images[: view.canvases[0]], view.canvases[:1], "matched")[0]
        return distributed.all_gather(embeddings)

    def predictions(self, view: MontageBatch) -> list[Tensor]:
        """Online predictions of the tiles of every level: per level (R, width)."""
        images = view.images
        if view.queries != view.canvases:
            images = torch.cat([c[:q] for c, q in zip(images.split(view.canvases), view.queries, strict=True)])
        embeddings = self.online(images, view.queries, self.config.compute)
        return [predict(z) for predict, z in zip(self.predictors, embeddings, strict=True)]

    def sources(self, view: MontageBatch) -> list[Tensor]:
        """Row in the bank of targets of each tile's own image: per level (R,) int64."""
        offset = distributed.rank() * len(view.index)
        rows = [q * r * r for q, r in zip(view.queries, view.ratios, strict=True)]
        return [view.sources[view.tiles(i)][: rows[i]] + offset for i in range(len(rows))]
