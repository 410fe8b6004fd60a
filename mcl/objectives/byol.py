"""BYOL: each view of an image predicts the momentum network's embedding of the other view, without negatives."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.layout import join
from mcl.config import Config
from mcl.models.heads import MLP
from mcl.models.norm import BatchNorm
from mcl.objectives.objective import Output
from mcl.objectives.whole_images import WholeImages, of_images, unit
from mcl.train.loss import over_levels, regression, total_loss


class BYOL(WholeImages):
    """Bootstrap your own latent (arXiv 2006.07733): the sum over both directions of 2 - 2 cos.

    The loss has no negatives. The score ``negative`` is the mean cosine with other images of the same process; it is
    close to ``positive`` if the embeddings have collapsed.
    """

    unused = (*WholeImages.unused, "model.temperature", "model.queue")

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        self.predictor = self._mlp(config.model.width)

    def projector(self, inputs: int) -> MLP:
        return self._mlp(inputs)

    def _mlp(self, inputs: int) -> MLP:
        hidden = self.config.model.hidden
        first = nn.Linear(inputs, hidden, bias=False)
        return MLP(first, BatchNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, self.config.model.width))

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: list[Tensor] | None = None) -> Output:
        targets = prepared or self.prepare([(query, key)])
        views = [view.first(view.query_counts) for view in (query, key)]
        embeddings = self.online(*views)
        counts = [len(z) for z in embeddings]
        predicted = self.predictor(join(embeddings), counts).split(counts)
        directions = [
            over_levels([p], [view.tile_images], [target], [[0]], regression)
            for p, view, target in zip(predicted, views, reversed(targets), strict=True)
        ]
        losses, *scores = (torch.stack(values) for values in zip(*directions, strict=True))  # (2, 1) each
        detached = {name: values.detach() for name, values in zip(self.scores, scores, strict=True)}
        total = total_loss(losses, self.config.model.loss_weights, 1)
        seen = [[z.detach()] for z in embeddings]
        return Output(total, losses.detach(), detached, seen, [target[:, None] for target in targets])

    @torch.no_grad()
    def prepare(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> list[Tensor]:
        """Targets of each view, (N, width) normalised, for the images of this process only."""
        computed = [self.target(*views) for views in parts]
        return [
            unit(of_images(embeddings, views))
            for embeddings, views in zip(zip(*computed, strict=True), zip(*parts, strict=True), strict=True)
        ]
