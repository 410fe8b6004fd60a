"""MoCo v2: the query of an image selects the image's own key among keys of former steps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.source import Source
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.distributed import Gather
from mcl.models.heads import MLP
from mcl.objectives.multi_level import enqueue
from mcl.objectives.objective import Output
from mcl.objectives.whole_images import WholeImages, of_images, unit
from mcl.train.loss import queue_contrast, total_loss


class MoCoV2(WholeImages):
    """Momentum contrast with an MLP (arXiv 2003.04297): cross-entropy of selecting an image's own key, by cosine.

    The online network sees only the query view, the momentum network only the key view. Negatives are the latest
    ``model.queue`` keys of all processes, initially random vectors; the other keys of the same step are not negatives.
    BatchNorm uses statistics over all processes. The authors' code normalises on each GPU separately, and therefore
    shuffles keys among GPUs.
    """

    unused = (*WholeImages.unused, "model.loss")
    queue: Tensor  # (model.queue, width) normalised
    queued: Tensor  # () int64, number of keys ever added to it

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        self.register_buffer("queue", F.normalize(torch.randn(config.model.queue, config.model.width), dim=1))
        self.register_buffer("queued", torch.tensor(0))

    def projector(self, inputs: int) -> MLP:
        model = self.config.model
        return MLP(nn.Linear(inputs, model.hidden), nn.ReLU(inplace=True), nn.Linear(model.hidden, model.width))

    @classmethod
    def check(cls, config: Config, source: Source | None = None) -> None:
        super().check(config, source)
        if not config.model.queue:
            raise ConfigError(
                "model.queue: 0, but objective=moco_v2 takes its negatives from the queue; set model.queue=65536"
            )

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Gather | None = None) -> Output:
        gathered = prepared or self.prepare([(query, key)])
        view = query.first(query.query_counts)
        (predicted,) = self.online(view)
        keys = unit(gathered.wait())
        own = keys[view.tile_images + distributed.rank() * len(query.index)]
        loss, *scores = queue_contrast(predicted, own, self.queue, self.config.model.temperature)
        losses = loss.view(1, 1)
        detached = {name: value.detach().view(1, 1) for name, value in zip(self.scores, scores, strict=True)}
        total = total_loss(losses, self.config.model.loss_weights, 1)
        return Output(total, losses.detach(), detached, [[predicted.detach()]], [keys[:, None]])

    @torch.no_grad()
    def prepare(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> Gather:
        """Starts to gather the keys (B, width) of all images of all ranks, in the order of ranks."""
        views = [key for _, key in parts]
        return Gather(of_images([self.target(view)[0] for view in views], views))

    @torch.no_grad()
    def finish(self, prepared: Gather) -> None:
        """Puts the step's keys into the queue, in place of the oldest ones."""
        enqueue(self.queue, self.queued, unit(prepared.wait()))
