"""MCL: online and momentum encoder, predictors, and the two ways to compute their loss."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from mcl import distributed
from mcl.config import ModelConfig
from mcl.distributed import Gather
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
            counts = [len(b) for b in boxes]
            tiles = self.tiles(features, canvases, boxes, cells, [self.fpn for _ in levels])
            return list(self.head(tiles, counts).split(counts))
        maps = self.fpn(features, levels)
        everything = [all_tiles(r, STRIDE * cells, len(images), images.device) for r in self.ratios]
        populations = self.pool(maps, everything, cells).split([len(b) for b in everything])
        embeddings = {i: self.head(populations[i]) for i in reversed(levels)}  # finest map first
        bounds = list(itertools.accumulate(canvases, initial=0))
        return [embeddings[i][bounds[i] * r**2 : bounds[i + 1] * r**2] for i, r in enumerate(self.ratios)]

    def tiles(
        self,
        features: Sequence[Tensor],
        canvases: Sequence[int],
        boxes: Sequence[Tensor],
        cells: int,
        fpns: Sequence[nn.Module],
    ) -> Tensor:
        """Pooled from the backbone's maps of all canvases, each level's own through its FPN; as :meth:`pool`.

        Levels follow each other, level 0 first, since this is the order in which running statistics are updated.
        """
        levels = zip(*(Levels.apply(f, tuple(canvases)) for f in features), strict=True)
        maps = [fpn(level, [i])[0] for i, (fpn, level) in enumerate(zip(fpns, levels, strict=True))]
        return self.pool(maps, boxes, cells)

    def pool(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], cells: int) -> Tensor:
        """(R, width, cells, cells), the tiles of all levels, level 0 first, in one launch."""
        index = torch.cat([b.new_full((len(b),), i, dtype=torch.int64) for i, b in enumerate(boxes)])
        strides = [STRIDE / r for r in self.ratios[: len(maps)]]
        return region_pool(maps, strides, torch.cat(list(boxes)), index, cells)


class Levels(torch.autograd.Function):
    """Cuts a map (K, C, H, W) into the canvases of each level.

    The gradient of slices would be a sum of whole maps, one per level, mostly zeros and not channels_last.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, canvases: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        pieces: tuple[Tensor, ...] = x.split(canvases)
        ctx.like = [(p.shape, p.dtype, p.device) for p in pieces]
        return pieces

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        pieces = [_zeros(*like) if grad is None else grad for grad, like in zip(grads, ctx.like, strict=True)]
        return torch.cat(pieces), None


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_()


@dataclass(frozen=True)
class Output:
    """Of one step: V = 2 directions (query view first), L levels. All but `loss` are detached."""

    loss: Tensor  # () total, with gradient
    losses: Tensor  # (V, L) cross-entropy before weights and the factor 2 T
    positive: Tensor  # (V, L) mean cosine between a tile and its own image's target
    negative: Tensor  # (V, L) mean cosine between a tile and the other targets

    def detach(self) -> "Output":
        return replace(self, loss=self.loss.detach())

    @classmethod
    def mean(cls, outputs: Sequence["Output"]) -> "Output":
        """Of equal parts of a step."""
        if len(outputs) == 1:
            return outputs[0]
        values = [torch.stack([getattr(o, f.name) for o in outputs]).mean(0) for f in fields(cls)]
        return cls(*values)


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

    def compile_parts(self) -> None:
        """Backbones and heads through ``torch.compile``, in place, when they are first called."""
        for encoder in (self.online, self.target):
            encoder.backbone.compile()
            encoder.head.compile()

    def forward(self, query: MontageBatch, key: MontageBatch, banks: Sequence[Gather] | None = None) -> Output:
        """One step: every tile against the full images of the other view, over all ranks.

        Args:
            query, key: both views.
            banks: targets of the query and of the key view, where these are only a part of the step's. Otherwise the
                views' own are computed, and gathered while the online network works.
        """
        of_query, of_key = banks or self.banks([(query, key)])
        predictions = [self.predictions(view) for view in (query, key)]
        directions = [
            contrast(predicted, self.sources(view), bank.wait(), self.config.temperature)
            for predicted, view, bank in zip(predictions, (query, key), (of_key, of_query), strict=True)
        ]
        losses, positive, negative = (torch.stack(values) for values in zip(*directions, strict=True))  # (V, L) each
        loss = total_loss(losses, self.config.loss_weights, self.config.temperature)
        return Output(loss, losses.detach(), positive.detach(), negative.detach())

    @torch.no_grad()
    def banks(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> list[Gather]:
        """Momentum embeddings of the full images of all ranks, on their way: per view (B, width), rank after rank.

        Args:
            parts: both views of a step, or of all its parts (:meth:`~mcl.montage.MontageBatch.part`).
        """
        banks = []
        for views in zip(*parts, strict=True):
            embeddings = torch.cat([self.targets(view) for view in views])
            shown = torch.cat([view.sources[view.tiles(0)] for view in views])  # the image of each row
            banks.append(Gather(torch.empty_like(embeddings).index_copy_(0, shown, embeddings)))
        return banks

    @torch.no_grad()
    def targets(self, view: MontageBatch) -> Tensor:
        """Momentum embeddings of the canvases of level 0, (canvases, width)."""
        images, canvases = view.images, view.canvases
        if self.config.compute == "matched":
            images, canvases = images[: canvases[0]], canvases[:1]
        embeddings: list[Tensor] = self.target(
            images, canvases, view.regions(canvases), view.cells, self.config.compute
        )
        return embeddings[0]

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
