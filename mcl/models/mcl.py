"""MCL: online and momentum encoder, predictors, and the two ways to compute their loss."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.geometry import STRIDE, Geometry
from dali_pipelines.layout import cut, join
from mcl import distributed
from mcl.config import ModelConfig
from mcl.distributed import Gather
from mcl.models.backbones import Backbone
from mcl.models.fpn import FPN, Groups
from mcl.models.heads import RegionHead, predictor
from mcl.ops import region_pool
from mcl.train.loss import contrast, total_loss


class Encoder(nn.Module):
    """Backbone, FPN and region head: canvases to one embedding per tile.

    Args:
        config: names and widths, and ``compute``: matched, where FPN and head see only each level's own canvases, or
            released, where they see every canvas at every level. The embeddings differ only by BatchNorm's statistics.
        ratios: tiles per canvas side, per level.
        recompute: activation checkpointing of the backbone.
    """

    def __init__(self, config: ModelConfig, ratios: Sequence[int], recompute: bool = False) -> None:
        super().__init__()
        self.compute = config.compute
        self.ratios = tuple(ratios)
        self.backbone = Backbone(config.backbone, recompute)
        depths = [r.bit_length() - 1 for r in ratios]  # a map twice as fine per doubling of the ratio
        self.fpn = FPN(self.backbone.channels, config.width, depths)
        self.head = RegionHead(config.width, config.head_convs, config.hidden)

    def forward(self, *views: MontageBatch) -> list[list[Tensor]]:
        """Embeddings of the tiles of views with equal numbers of canvases, which BatchNorm sees one by one.

        Returns:
            Per view and level, (R, width).
        """
        return self._matched(views) if self.compute == "matched" else self._released(views)

    def _matched(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """All views together: products of few rows are slow."""
        canvases = views[0].canvas_counts
        levels = [*range(len(canvases))] * len(views)
        features = self.backbone(join([view.pixels for view in views]), [sum(canvases)] * len(views))
        maps = self.fpn(features, levels, canvases * len(views))
        regions = [boxes for view in views for boxes in view.regions()]
        counts = [len(boxes) for boxes in regions]
        embeddings = self.head(self.pool(maps, levels, regions, views[0].cells), counts).split(counts)
        return [list(embeddings[i : i + len(canvases)]) for i in range(0, len(regions), len(canvases))]

    def _released(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Every tile of every map goes through the head, view after view, the finest map first."""
        counts, ratios = [len(view.pixels) for view in views], views[0].ratios
        maps = self.fpn(self.backbone(join([view.pixels for view in views]), counts), range(len(ratios)), views=counts)
        bounds = list(itertools.accumulate(views[0].canvas_counts, initial=0))
        embeddings = []
        for own in zip(*(Groups.apply(x, tuple(counts)) for x in maps), strict=True):
            every = [self.head(cut(x, ratio)) for x, ratio in zip(own[::-1], ratios[::-1], strict=True)][::-1]
            embeddings.append([every[i][bounds[i] * r**2 : bounds[i + 1] * r**2] for i, r in enumerate(ratios)])
        return embeddings

    def pool(self, maps: Sequence[Tensor], levels: Sequence[int], boxes: Sequence[Tensor], cells: int) -> Tensor:
        """(R, width, cells, cells), the tiles of each map, whose level is given, map after map; in one launch."""
        index = torch.cat([b.new_full((len(b),), i, dtype=torch.int64) for i, b in enumerate(boxes)])
        strides = [STRIDE / self.ratios[level] for level in levels]
        return region_pool(maps, strides, torch.cat(list(boxes)), index, cells)


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

    The target encoder starts as a copy of the online one and is updated by :func:`mcl.train.ema.update` alone; it stays
    in training mode, so its BatchNorms use the statistics of its own batches.

    Args:
        config: section ``model`` of the configuration.
        geometry: section ``montage``.
        recompute: activation checkpointing of the online backbone.
    """

    def __init__(self, config: ModelConfig, geometry: Geometry, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.online = Encoder(config, geometry.ratios, recompute)
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
        predictions = self.predictions([query, key])
        directions = [
            contrast(predicted, self.positives(view), bank.wait(), self.config.temperature)
            for predicted, view, bank in zip(predictions, (query, key), (of_key, of_query), strict=True)
        ]
        losses, positive, negative = (torch.stack(values) for values in zip(*directions, strict=True))  # (V, L) each
        loss = total_loss(losses, self.config.loss_weights, self.config.temperature)
        return Output(loss, losses.detach(), positive.detach(), negative.detach())

    @torch.no_grad()
    def banks(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> list[Gather]:
        """Momentum embeddings of the full images of all ranks, on their way: per view (B, width), rank after rank.

        Args:
            parts: both views of a step, or of all its parts (:meth:`~dali_pipelines.batch.MontageBatch.part`).
        """
        banks = []
        computed = zip(*(self.targets(views) for views in parts), strict=True)
        for embeddings_of_parts, views in zip(computed, zip(*parts, strict=True), strict=True):
            embeddings = torch.cat(embeddings_of_parts)
            shown = torch.cat([view.tile_images[view.tiles(0)] for view in views])  # the image of each row
            banks.append(Gather(torch.empty_like(embeddings).index_copy_(0, shown, embeddings)))
        return banks

    @torch.no_grad()
    def targets(self, views: Sequence[MontageBatch]) -> list[Tensor]:
        """Momentum embeddings of the canvases of level 0 of each view, (canvases, width)."""
        levels = 1 if self.config.compute == "matched" else None
        return [embeddings[0] for embeddings in self.target(*(v.first(v.canvas_counts[:levels]) for v in views))]

    def predictions(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Online predictions of the tiles of each view and level: (R, width)."""
        levels = zip(*self.online(*(view.first(view.query_counts) for view in views)), strict=True)
        predicted = []
        for predict, embeddings in zip(self.predictors, levels, strict=True):
            counts = [len(z) for z in embeddings]
            predicted.append(predict(join(embeddings), counts).split(counts))
        return [list(of_view) for of_view in zip(*predicted, strict=True)]

    def positives(self, view: MontageBatch) -> list[Tensor]:
        """Row in the bank of targets of each tile's own image: per level (R,) int64."""
        offset = distributed.rank() * len(view.index)
        rows = [q * r * r for q, r in zip(view.query_counts, view.ratios, strict=True)]
        return [view.tile_images[view.tiles(i)][: rows[i]] + offset for i in range(len(rows))]
