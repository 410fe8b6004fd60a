"""The pre-trainings that MCL is compared with: supervised, and MoCo v2 of lightly's parts.

``python -m benchmarks.transfer_baselines moco --seed 0 --work runs/transfer`` writes ``pretrain/<method>-<seed>/`` in
the work folder: ``checkpoints/``, one per epoch, from the last of which the same command continues, and at the end
``backbone.pth`` for ``mcl finetune``. What an epoch draws is a function of seed and epoch, so a run that was cut and
continued computes what one that was not does.
"""

import argparse
import copy
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as t
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import ROOT
from benchmarks.transfer_protocol import Protocol, ProtocolError, Work
from dali_pipelines.source import open_source
from mcl.budget import count
from mcl.config import Config, to_dict
from mcl.exporters import files
from mcl.exporters.mmdet import rename
from mcl.models.backbones import Backbone
from mcl.train import checkpoint
from mcl.train.optim import build_optimizer, learning_rate, set_learning_rate

KINDS = ("supervised", "moco")
WEIGHTS = "backbone.pth"


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
        """Called before each step; nothing is to be done."""

    def loss(self, images: Any, labels: Tensor) -> Tensor:
        """Cross-entropy of images (n, 3, S, S) and their classes (n,)."""
        return F.cross_entropy(self.classifier(_pooled(self.backbone, images)), labels)


class MoCo(nn.Module):
    """MoCo v2: a query against its key of the momentum network and a bank of earlier keys.

    Keys are not shuffled for BatchNorm: in one process that changes nothing.

    Args:
        config: of MCL's pre-training: its backbone and size of images.
        protocol: its values that start with ``moco_``.

    Raises:
        ProtocolError: lightly is not installed.
    """

    def __init__(self, config: Config, protocol: Protocol) -> None:
        try:
            from lightly.loss import NTXentLoss
            from lightly.models.modules import MoCoProjectionHead
            from lightly.transforms.moco_transform import MoCoV2Transform
        except ImportError:
            raise ProtocolError("moco needs lightly: pip install -r benchmarks/requirements.txt") from None
        super().__init__()
        self.backbone = Backbone(config.model.backbone)
        self.head = MoCoProjectionHead(self.backbone.channels[0], protocol.moco_hidden, protocol.moco_width)
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.criterion = NTXentLoss(protocol.moco_temperature, (protocol.moco_bank, protocol.moco_width))
        self.transform = MoCoV2Transform(input_size=config.montage.canvas)
        self._momentum = protocol.moco_momentum

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
    """An untrained one: supervised or moco.

    Raises:
        ProtocolError: see :class:`MoCo`.
    """
    config = work.config(seed=0)
    return Supervised(config, len(work.classes)) if kind == "supervised" else MoCo(config, work.protocol)


def flops(kind: str, work: Work) -> float:
    """FLOPs of a training step per image, as ``mcl budget`` counts them.

    Args:
        kind: supervised, moco, mcl or mcl-released.
    """
    config = work.config(0, *(["model.compute=released"] if kind == "mcl-released" else []))
    batch = config.trainer.global_batch
    if kind.startswith("mcl"):
        return count.step(config, batch, 1).flops / batch
    with torch.device("meta"):
        learner = make(kind, work)
        pixels = torch.empty(batch, 3, config.montage.canvas, config.montage.canvas)
        labels = torch.zeros(batch, dtype=torch.int64)
    if isinstance(learner, MoCo):
        learner.criterion.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)  # which is read
    images = [pixels] * 2 if isinstance(learner, MoCo) else pixels
    return count.flops(lambda: learner.loss(images, labels)) / batch


class Photos(Dataset[tuple[Any, int]]):
    """Images of a list file, and the numbers of their classes."""

    def __init__(self, path: Path, transform: Callable[[Any], Any]) -> None:
        source = open_source(str(path), "list", allow_outside=True, index=str(path.parent / "index"))
        self._paths, self._labels, self._transform = source.names, source.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with Image.open(self._paths[i]) as image:
            return self._transform(image.convert("RGB")), self._labels[i]


def train(learner: Supervised | MoCo, work: Work, seed: int, folder: Path) -> list[float]:
    """Trains, or continues, and writes the run's files. Images that do not fill a batch are left out of an epoch.

    Args:
        folder: of the run.

    Returns:
        Mean loss of every epoch.

    Raises:
        FloatingPointError: the loss is not finite.
        CheckpointError: see :mod:`mcl.train.checkpoint`.
    """
    config, photos = work.config(seed), Photos(ROOT / work.images, learner.transform)
    optim, batch, epochs = config.optim, config.trainer.global_batch, config.trainer.epochs
    learner.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(optim, learner)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    per_epoch, losses = len(photos) // batch, list[float]()
    state = checkpoint.latest(folder / "checkpoints", {"optimizer": dict, "losses": list})
    if state is not None:
        for name, tensor in tensors(learner).items():
            tensor.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    for epoch in range(len(losses), epochs):
        _seed(seed, epoch)
        total = 0.0
        for position, (images, labels) in enumerate(DataLoader(photos, batch, shuffle=True, drop_last=True)):
            step = epoch * per_epoch + position
            learner.prepare(step, epochs * per_epoch)
            set_learning_rate(optimizer, learning_rate(optim, batch, step, epochs * per_epoch, per_epoch))
            optimizer.zero_grad()
            loss = learner.loss(images, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, optim.clip_norm or float("inf"))
            optimizer.step()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{folder}: the loss of epoch {epoch} is not finite; lower optim.base_lr")
        losses.append(total / per_epoch)
        print(f"epoch {epoch + 1} of {epochs}: loss {losses[-1]:.4f}", flush=True)
        state = {"config": to_dict(config), "step": len(losses) * per_epoch, "model": tensors(learner)}
        state |= {"optimizer": optimizer.state_dict(), "losses": losses}
        checkpoint.save(folder / "checkpoints", state, keep=2)
    weights = {str(rename(f"backbone.body.{k}", 0)): v for k, v in learner.backbone.state_dict().items()}
    source = folder / "checkpoints" / checkpoint.LAST
    files.write(folder / WEIGHTS, source, lambda file: files.save_openmmlab(weights, {}, file))
    return losses


def tensors(learner: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers; a state dict would lack lightly's bank of keys."""
    return {name: tensor.detach() for name, tensor in [*learner.named_parameters(), *learner.named_buffers()]}


def _seed(*key: int) -> None:
    """Of all generators that transforms draw from."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)  # noqa: NPY002  # lightly draws from the global one
    random.seed(words.tobytes())
    torch.manual_seed(int(words[0]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=KINDS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True, help="work folder of benchmarks.transfer")
    options = parser.parse_args(arguments)
    work = Work.open(ROOT / options.work)
    torch.manual_seed(options.seed)
    learner = make(options.method, work)
    train(learner, work, options.seed, ROOT / work.folder / "pretrain" / f"{options.method}-{options.seed}")


if __name__ == "__main__":
    main()
