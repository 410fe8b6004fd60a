"""MCL: the tiles of every level select their own image among the targets of a momentum network."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dali_pipelines.batch import MontageBatch
from dali_pipelines.layout import join
from dali_pipelines.source import Source
from mcl import distributed
from mcl.config import Config, ConfigError
from mcl.distributed import Gather
from mcl.models import Encoder
from mcl.models.heads import predictor
from mcl.objectives.objective import Objective, Output
from mcl.train.loss import Comparison, assigned, info_nce, over_levels, regression, total_loss, upcast


class MCL(Objective):
    """Multi-level contrastive learning.

    The loss of a level is the mean of ``model.loss`` over its tiles and over the levels whose targets they are
    compared with (``model.targets``). The target of an image at a level is the normalised momentum embedding of its
    tile. If a level shows every image several times, the target is the normalised mean of these. So each level has one
    target per image, and other tiles of the same image are not negatives.

    The total is the sum over levels and both directions of weight * loss. With infonce it is multiplied by 2 T, so that
    no tile is pulled towards its own target more strongly than with cosine.

    With ``model.queue``, a view's bank also contains its latest targets of former steps, as negatives only. Rows of the
    queue that are not filled yet are ignored.

    The momentum network starts as a copy of the online network. It stays in training mode, so its BatchNorms use the
    statistics of its own batches. Scores are the mean cosines of a tile with the target of its own image and with the
    other targets: with infonce those of all processes and of the queue, with cosine those of its own process.
    """

    scores = ("positive", "negative")
    retrieves = True
    queue: Tensor  # (2, N, levels, width) normalised; views, latest targets
    queued: Tensor  # () int64, number of rows ever added to it

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        model, ratios = config.model, config.montage.ratios
        self.online = Encoder(model, ratios, config.trainer.recompute)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictors = nn.ModuleList(predictor(model.width, model.hidden) for _ in ratios)
        self._chosen = assigned(model.targets, len(ratios))
        self._levels = 1 + max(map(max, self._chosen))  # number of levels with targets, which are the first ones
        self._contrasts = model.loss == "infonce"
        self._compare: Callable[..., Comparison] = regression
        if self._contrasts:
            self._compare = partial(info_nce, temperature=model.temperature)
        if model.queue:
            self.register_buffer("queue", torch.zeros(2, model.queue, self._levels, model.width))
            self.register_buffer("queued", torch.tensor(0))

    @classmethod
    def check(cls, config: Config, source: Source | None = None) -> None:
        super().check(config, source)
        if config.model.queue and config.model.loss == "cosine":
            raise ConfigError(
                f"model.queue: {config.model.queue}, but model.loss=cosine has no negatives; set "
                "model.queue=0 or model.loss=infonce"
            )

    def forward(self, query: MontageBatch, key: MontageBatch, prepared: Sequence[Gather] | None = None) -> Output:
        """Compares every tile with targets of the other view; arguments: :meth:`Objective.forward`."""
        model, views = self.config.model, (query, key)
        gathered = prepared or self.prepare([views])
        embeddings = self.embeddings(views)
        predicted = self.predictions(embeddings)
        directions, targets = [], []
        for view, other in enumerate((1, 0)):
            banks, compare = self._unit(gathered[other].wait()), self._compare
            targets.append(banks)
            if model.queue:
                hidden = torch.arange(model.queue, device=banks.device) >= self.queued
                compare = partial(compare, hidden=torch.cat([hidden.new_zeros(len(banks)), hidden]))
                banks = torch.cat([banks, self.queue[other]])
            rows = self.positives(views[view])
            directions.append(over_levels(predicted[view], rows, banks.unbind(1), self._chosen, compare))
        losses, *scores = (torch.stack(values) for values in zip(*directions, strict=True))  # (V, L) each
        loss = total_loss(losses, model.loss_weights, 2 * model.temperature if self._contrasts else 1)
        detached = {name: values.detach() for name, values in zip(self.scores, scores, strict=True)}
        return Output(loss, losses.detach(), detached, [[z.detach() for z in view] for view in embeddings], targets)

    @torch.no_grad()
    def prepare(self, parts: Sequence[tuple[MontageBatch, MontageBatch]]) -> list[Gather]:
        """Starts to gather the targets of each view: (B, levels * width), all images of all ranks, in rank order.

        With cosine, only those of this process are used.
        """
        computed = [self.targets(views) for views in parts]
        banks = []
        with contextlib.nullcontext() if self._contrasts else distributed.alone():
            for side, views in enumerate(zip(*parts, strict=True)):
                levels = []
                for level in range(self._levels):
                    shown = torch.cat([view.tile_images[view.tiles(level)] for view in views])
                    embeddings = torch.cat([targets[side][level] for targets in computed])
                    levels.append(_of_images(embeddings, shown, len(views[0].index)))
                banks.append(Gather(torch.cat(levels, 1)))
        return banks

    @torch.no_grad()
    def finish(self, prepared: Sequence[Gather]) -> None:
        """Puts the step's targets into the queue, in place of the oldest ones."""
        if self.config.model.queue:
            latest = torch.stack([self._unit(gathered.wait()) for gathered in prepared], 1)
            enqueue(self.queue.transpose(0, 1), self.queued, latest)

    @torch.no_grad()
    def targets(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Momentum network's embeddings of the tiles of each view and level that has targets: (tiles, width)."""
        levels = self._levels if self.config.model.compute == "matched" else None
        embeddings: list[list[Tensor]] = self.target(*(view.first(view.canvas_counts[:levels]) for view in views))
        return embeddings

    def embeddings(self, views: Sequence[MontageBatch]) -> list[list[Tensor]]:
        """Online embeddings of the tiles of each view and level: (R, width)."""
        embeddings: list[list[Tensor]] = self.online(*(view.first(view.query_counts) for view in views))
        return embeddings

    def predictions(self, embeddings: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Predictions from online embeddings: per view and level, (R, width)."""
        predicted = []
        for predict, own in zip(self.predictors, zip(*embeddings, strict=True), strict=True):
            counts = [len(z) for z in own]
            predicted.append(predict(join(own), counts).split(counts))
        return [list(of_view) for of_view in zip(*predicted, strict=True)]

    def positives(self, view: MontageBatch) -> list[Tensor]:
        """Rows of the tiles' own images in the bank of targets: per level (R,) int64."""
        offset = distributed.rank() * len(view.index) if self._contrasts else 0
        rows = [q * r * r for q, r in zip(view.query_counts, view.ratios, strict=True)]
        return [view.tile_images[view.tiles(i)][: rows[i]] + offset for i in range(len(rows))]

    @torch.no_grad()
    def matches(self, query: MontageBatch, key: MontageBatch) -> Tensor:
        """See :meth:`Objective.matches`; if a level is compared with several levels, the mean over these."""
        banks = [self._unit(bank.wait()).unbind(1) for bank in self.prepare([(query, key)])]
        views, hits = (query, key), []
        predictions = self.predictions(self.embeddings(views))
        for view, predicted, bank in zip(views, predictions, reversed(banks), strict=True):
            for p, rows, chosen in zip(predicted, self.positives(view), self._chosen, strict=True):
                nearest = [(F.normalize(upcast(p), dim=1) @ bank[j].t()).argmax(1) for j in chosen]
                hits.append(torch.stack([(found == rows).float().mean() for found in nearest]).mean())
        return torch.stack(hits).view(len(views), -1)

    def _unit(self, bank: Tensor) -> Tensor:
        """Maps (B, levels * width) to normalised (B, levels, width), in fp32 or fp64."""
        return F.normalize(upcast(bank).unflatten(1, (self._levels, -1)), dim=2)


def enqueue(queue: Tensor, queued: Tensor, latest: Tensor) -> None:
    """Replaces the oldest rows of a queue by the latest ones and counts them, in place.

    Args:
        queue: (Q, ...).
        queued: () int64, number of rows ever added to it.
        latest: (B, ...), of which at most the last Q are used.
    """
    latest = latest[-len(queue) :]
    places = (queued + torch.arange(len(latest), device=latest.device)) % len(queue)
    queue.index_copy_(0, places, latest)
    queued += len(latest)


def _of_images(embeddings: Tensor, shown: Tensor, images: int) -> Tensor:
    """Averages normalised embeddings of tiles over each image: (tiles, width) to (images, width).

    Args:
        embeddings: embeddings of the tiles.
        shown: image of each tile; every image has the same number of tiles.
        images: number of images.
    """
    if len(embeddings) == images:
        return torch.empty_like(embeddings).index_copy_(0, shown, embeddings)
    rows = embeddings[shown.argsort(stable=True)]
    return F.normalize(upcast(rows), dim=1).view(images, -1, rows.shape[1]).mean(1).to(rows.dtype)
