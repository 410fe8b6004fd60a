"""MCL: tiles of every level find their own image among the targets of a momentum network."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.layout import join
from mcl import distributed
from mcl.config import Config
from mcl.distributed import Gather
from mcl.models import Encoder
from mcl.models.heads import predictor
from mcl.objectives.objective import Objective, Output
from mcl.train.loss import contrast, total_loss


class MCL(Objective):
    """Multi-level contrastive learning.

    The target encoder starts as a copy of the online one; it stays in training mode, so its BatchNorms use the
    statistics of its own batches. Scores are the mean cosines of a tile with its own image's target and with the
    others; losses are cross-entropies before weights and the factor 2 T.
    """

    scores = ("positive", "negative")
    retrieves = True

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        model, ratios = config.model, config.montage.ratios
        self.online = Encoder(model, ratios, config.trainer.recompute)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictors = nn.ModuleList(predictor(model.width, model.hidden) for _ in ratios)

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Sequence[Gather] | None = None) -> Output:
        """Every tile against the full images of the other view, over all ranks; `prepared` are the step's targets."""
        of_query, of_key = prepared or self.prepare([(query, key)])
        model = self.config.model
        directions = [
            contrast(predicted, self.positives(view), bank.wait(), model.temperature)
            for predicted, view, bank in zip(
                self.predictions([query, key]), (query, key), (of_key, of_query), strict=True
            )
        ]
        losses, *scores = (torch.stack(values) for values in zip(*directions, strict=True))  # (V, L) each
        loss = total_loss(losses, model.loss_weights, model.temperature)
        detached = {name: values.detach() for name, values in zip(self.scores, scores, strict=True)}
        return Output(loss, losses.detach(), detached)

    @torch.no_grad()
    def prepare(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> list[Gather]:
        """Momentum embeddings of the full images of all ranks, on their way: per view (B, width), rank after rank."""
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
        levels = 1 if self.config.model.compute == "matched" else None
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
