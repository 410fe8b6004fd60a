"""The pre-trainings that MCL is compared with: supervised, and MoCo v2 of lightly's parts.

Each has a ``backbone``; a ``transform`` of Pillow images to what ``loss`` takes, collated; ``prepare``, to be called
before each step.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms as t
from torch import Tensor, nn

from benchmarks.transfers.protocol import ProtocolError, Work
from mcl.config import Config
from mcl.models.backbones import Backbone


class Supervised(nn.Module):
    """The backbone, pooled, and a linear classifier.

    Args:
        config: of MCL's pre-training: its backbone, size of images, crops, flips and normalisation.
        classes: how many.
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        augment = config.augment
        self.backbone = Backbone(config.model.backbone)
        self.classifier = nn.Linear(self.backbone.channels[0], classes)
        self.transform = t.Compose(
            [
                t.RandomResizedCrop(config.montage.canvas, augment.crop_scale, augment.crop_ratio),
                t.RandomHorizontalFlip(augment.flip),
                t.ToTensor(),
                t.Normalize(augment.mean, augment.std),
            ]
        )

    def prepare(self, step: int, steps: int) -> None:
        """Nothing."""

    def loss(self, images: Any, labels: Tensor) -> Tensor:
        """Cross-entropy of images (n, 3, S, S) and their classes (n,)."""
        return F.cross_entropy(self.classifier(_pooled(self.backbone, images)), labels)


class MoCo(nn.Module):
    """MoCo v2: a query against its key of the momentum network and a bank of earlier keys.

    Keys are not shuffled for BatchNorm: in one process that changes nothing.

    Args:
        config: of MCL's pre-training: its backbone and size of images.
        moco: values of the protocol whose names start so.

    Raises:
        ProtocolError: lightly is not installed.
    """

    def __init__(self, config: Config, moco: Mapping[str, float]) -> None:
        try:
            from lightly.loss import NTXentLoss
            from lightly.models.modules import MoCoProjectionHead
            from lightly.transforms.moco_transform import MoCoV2Transform
        except ImportError:
            raise ProtocolError("moco needs lightly: pip install -r benchmarks/requirements.txt") from None
        super().__init__()
        width, hidden = int(moco["moco_width"]), int(moco["moco_hidden"])
        self.backbone = Backbone(config.model.backbone)
        self.head = MoCoProjectionHead(self.backbone.channels[0], hidden, width)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.criterion = NTXentLoss(moco["moco_temperature"], (int(moco["moco_bank"]), width))
        self.transform = MoCoV2Transform(input_size=config.montage.canvas)
        self._momentum = moco["moco_momentum"]

    def prepare(self, step: int, steps: int) -> None:
        """Moves the momentum network towards the other."""
        from lightly.models.utils import update_momentum
        from lightly.utils.scheduler import cosine_schedule

        momentum = cosine_schedule(step, steps, self._momentum, 1)
        update_momentum(self.backbone, self.key_backbone, momentum)
        update_momentum(self.head, self.key_head, momentum)

    def loss(self, images: Any, labels: Tensor) -> Tensor:
        """InfoNCE of a list of two views, (n, 3, S, S) each; the keys then go into the bank."""
        query, key = images
        with torch.no_grad():
            keys = self.key_head(_pooled(self.key_backbone, key))
        loss: Tensor = self.criterion(self.head(_pooled(self.backbone, query)), keys)
        return loss


def _pooled(backbone: Backbone, images: Tensor) -> Tensor:
    """(n, channels): the mean of C5."""
    maps: list[Tensor] = backbone(images)
    return maps[0].mean((2, 3))


def make(kind: str, work: Work) -> Supervised | MoCo:
    """An untrained one.

    Args:
        kind: supervised or moco.

    Raises:
        ProtocolError: see :class:`MoCo`.
    """
    config = work.config(seed=0)
    if kind == "supervised":
        return Supervised(config, len(work.classes))
    return MoCo(config, {key: value for key, value in work.protocol.plain().items() if key.startswith("moco_")})
