"""Supervised contrastive pre-training: all tiles of a class attract each other, over levels, views and processes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dali_pipelines.batch import MontageBatch
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.models import Encoder
from mcl.objectives.objective import Objective, Output
from mcl.objectives.supervised import weighted
from mcl.train.loss import supervised_contrast, upcast


class SupervisedContrastive(Objective):
    """Supervised contrastive learning of tiles (arXiv 2004.11362, with the sum outside of the logarithm).

    Every tile of both views is an anchor; its positives are all other tiles of its class, of every level, view and
    process, its negatives all tiles of other classes. Both sides of a comparison get gradients. There is no momentum
    network.
    Scores are mean cosines with positives and with negatives.
    """

    scores = ("positive", "negative")
    labelled = True
    unused = ("model.targets", "model.loss", "model.queue", "model.label_smoothing")

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        self.online = Encoder(config.model, config.montage.ratios, config.trainer.recompute)

    @classmethod
    def check(cls, config: Config, source: Any = None) -> None:
        super().check(config, source)
        if config.trainer.accumulate != 1:
            raise ConfigError(
                "trainer.accumulate: objective=supervised_contrastive compares all tiles of a step with each other, so "
                "a step cannot be split; set trainer.accumulate=1, and trainer.recompute=true to save memory"
            )

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Any = None) -> Output:
        views = [view.first(view.query_counts) for view in (query, key)]
        made = self.online(*views)
        embeddings = [z for levels in made for z in levels]
        counts = [len(z) for z in embeddings]
        labels = torch.cat([truth for view in views for truth in view.tile_labels()])
        with torch.autocast(labels.device.type, enabled=False):
            own = F.normalize(torch.cat([upcast(z) for z in embeddings]), dim=1)
            bank, classes = distributed.gather_with_gradient(own), distributed.Gather(labels).wait()
            rows = torch.arange(len(own), device=own.device) + distributed.rank() * len(own)
            values = [
                torch.stack(supervised_contrast(*anchors, bank, classes, self.config.model.temperature))
                for anchors in zip(own.split(counts), labels.split(counts), rows.split(counts), strict=True)
            ]
        losses, positive, negative = torch.stack(values).view(len(views), -1, 3).unbind(2)  # (V, L) each
        scores = {"positive": positive.detach(), "negative": negative.detach()}
        seen = [[z.detach() for z in levels] for levels in made]
        return Output(weighted(losses, self.config.model.loss_weights), losses.detach(), scores, seen)
