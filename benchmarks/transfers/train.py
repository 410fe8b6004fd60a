"""Pre-trains by another method than MCL: ``python -m benchmarks.transfers.train moco --seed 0 --work runs/transfer``.

Writes ``pretrain/<method>-<seed>/`` in the work folder: ``checkpoints/``, one per epoch, from the last of which the
same command continues; at the end ``losses.json``, the mean of each epoch, and ``backbone.pth`` for ``mcl finetune``.
What an epoch draws is a function of seed and epoch, so a run that was cut and continued computes what one that was not
does.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mcl.allocator import keep_freed_memory
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.transfers import learners
from benchmarks.transfers.learners import MoCo, Supervised
from benchmarks.transfers.protocol import ROOT, Work, write
from dali_pipelines.source import open_source
from mcl.config import OptimConfig
from mcl.export import files
from mcl.export.mmdet import rename
from mcl.train import checkpoint
from mcl.train.optim import build_optimizer, learning_rate, set_learning_rate

WEIGHTS, LOSSES = "backbone.pth", "losses.json"


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


def train(
    learner: Supervised | MoCo, photos: Photos, optim: OptimConfig, batch: int, epochs: int, seed: int, folder: Path
) -> list[float]:
    """Trains, or continues, and writes the run's files.

    Args:
        batch: images of a step; what does not fill one is left out of an epoch.
        folder: of the run.

    Returns:
        Mean loss of every epoch.

    Raises:
        FloatingPointError: the loss is not finite.
        CheckpointError: see :mod:`mcl.train.checkpoint`.
    """
    learner.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(optim, learner)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    per_epoch, losses = len(photos) // batch, list[float]()
    state = checkpoint.latest(folder / "checkpoints")
    if state is not None:
        _restore(learner, state["model"])
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
        checkpoint.save(
            folder / "checkpoints",
            {
                "step": len(losses) * per_epoch,
                "model": _tensors(learner),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
            },
            keep=2,
        )
    write(folder / LOSSES, json.dumps(losses) + "\n")
    _export(learner, folder)
    return losses


def _tensors(learner: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers; a state dict would lack lightly's bank of keys."""
    return {name: tensor.detach() for name, tensor in [*learner.named_parameters(), *learner.named_buffers()]}


def _restore(learner: nn.Module, saved: dict[str, Tensor]) -> None:
    for name, tensor in _tensors(learner).items():
        tensor.copy_(saved[name])


def _seed(*key: int) -> None:
    """Of all generators that transforms draw from."""
    words = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(words)  # noqa: NPY002  # lightly draws from the global one
    random.seed(words.tobytes())
    torch.manual_seed(int(words[0]))


def _export(learner: Supervised | MoCo, folder: Path) -> None:
    """The backbone under MMDetection's names."""
    weights = {str(rename(f"backbone.body.{k}", 0)): v for k, v in learner.backbone.state_dict().items()}
    source = folder / "checkpoints" / checkpoint.LAST
    files.write(folder / WEIGHTS, source, lambda file: files.save_openmmlab(weights, {}, file))


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("method", choices=["supervised", "moco"])
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--work", type=Path, required=True, help="work folder of benchmarks.transfer")
    chosen = options.parse_args(arguments)
    keep_freed_memory()
    work = Work.open(ROOT / chosen.work)
    config = work.config(chosen.seed)
    torch.manual_seed(chosen.seed)
    learner = learners.make(chosen.method, work)
    photos = Photos(ROOT / work.images, learner.transform)
    folder = ROOT / work.folder / "pretrain" / f"{chosen.method}-{chosen.seed}"
    train(learner, photos, config.optim, config.trainer.global_batch, config.trainer.epochs, chosen.seed, folder)


if __name__ == "__main__":
    main()
