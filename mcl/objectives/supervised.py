"""Supervised montage pre-training: classifies the tiles of every level by the classes of their images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from mcl.config import Config
from mcl.models import Encoder
from mcl.models.heads import MLP
from mcl.objectives.objective import Objective, Output
from mcl.train.loss import smoothed_cross_entropy


class Supervised(Objective):
    """Cross-entropy of one classifier, shared by all levels, on the pooled region features of tiles of both views.

    The loss is the sum over levels of weight times the mean of both views. There is neither a momentum network nor a
    projector. The only score is the share of tiles that are classified correctly.
    """

    scores = ("accuracy",)
    labelled = True
    unused = ("model.targets", "model.loss", "model.queue")

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        self.online = Encoder(config.model, config.montage.ratios, config.trainer.recompute)
        self.online.head.projector = MLP()  # the identity: features are classified, not embeddings
        self.classifier = nn.Linear(config.model.width, max(1, len(classes)))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Any = None) -> Output:
        views = [view.first(view.query_counts) for view in (query, key)]
        model = self.config.model
        values = []
        for view, levels in zip(views, self.online(*views), strict=True):
            for features, truth in zip(levels, view.tile_labels(), strict=True):
                logits = self.classifier(features)
                loss = smoothed_cross_entropy(logits, truth, model.label_smoothing)
                values.append(torch.stack([loss, (logits.argmax(1) == truth).to(loss.dtype).mean()]))
        losses, accuracy = torch.stack(values).view(len(views), -1, 2).unbind(2)  # (V, L) each
        return Output(weighted(losses, model.loss_weights), losses.detach(), {"accuracy": accuracy.detach()})


def weighted(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over levels of weight times the mean of both views; `losses` is (V, L)."""
    return torch.stack([weight * level for weight, level in zip(weights, losses.mean(0), strict=True)]).sum()
