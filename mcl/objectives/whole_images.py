"""Base class of pre-training methods for whole images, which share MCL's trainer, loader and backbones."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dali_pipelines.batch import MontageBatch
from dali_pipelines.source import Source
from mcl.config import Config, ConfigError
from mcl.models import GlobalEncoder
from mcl.models.heads import MLP
from mcl.objectives.objective import Objective
from mcl.train.loss import upcast


class WholeImages(Objective):
    """One embedding per image, from the spatial mean of C5, and a momentum network; neither FPN nor region head.

    There is one level, whose canvases are the images. Scores are the mean cosines of an image with its own target and
    with other targets.
    """

    scores = ("positive", "negative")
    unused: ClassVar[tuple[str, ...]] = (
        "augment.shared_crop",
        "model.assembly",
        "model.compute",
        "model.targets",
        "model.label_smoothing",
    )

    def __init__(self, config: Config, classes: Sequence[str] = ()) -> None:
        super().__init__(config, classes)
        self.online = GlobalEncoder(config.model, self.projector, config.trainer.recompute)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def projector(self, inputs: int) -> MLP:
        """Builds the projector, which maps (n, inputs) to (n, width)."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: Config, source: Source | None = None) -> None:
        if config.montage.levels > 1:
            raise ConfigError(
                f"montage.ratios: {list(config.montage.ratios)}, but objective={config.objective} uses single whole "
                "images; set montage.ratios=[1], montage.images_per_canvas=[1] and model.loss_weights=[1]"
            )
        super().check(config, source)


def of_images(embeddings: Sequence[Tensor], views: Sequence[MontageBatch]) -> Tensor:
    """Joins the embeddings of a view's micro-batches: (N, width), in the order of its images."""
    rows, shown = torch.cat(list(embeddings)), torch.cat([view.tile_images for view in views])
    return torch.empty_like(rows).index_copy_(0, shown, rows)


def unit(rows: Tensor) -> Tensor:
    """Rows (n, width), normalised in fp32 or fp64."""
    return F.normalize(upcast(rows), dim=1)
