"""FLOPs of the pre-trainings, counted as :mod:`mcl.budget.count` does, forward and backward."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.transfers import learners
from benchmarks.transfers.learners import MoCo
from benchmarks.transfers.protocol import Work
from mcl.budget import count
from mcl.models import layers


def per_image(kind: str, work: Work) -> float:
    """FLOPs of a training step per image.

    Args:
        kind: a pre-training, as of :data:`benchmarks.transfers.methods.PRETRAININGS`.
    """
    config = work.config(0, *(["model.compute=released"] if kind == "mcl-released" else []))
    batch = config.trainer.global_batch
    if kind.startswith("mcl"):
        return count.step(config.model, config.montage, batch, 1, config.trainer.precision).flops / batch
    with torch.device("meta"):
        learner = learners.make(kind, work)
        pixels = torch.empty(batch, 3, config.montage.canvas, config.montage.canvas)
        labels = torch.zeros(batch, dtype=torch.int64)
    layers.use(learner, ours=False)  # what is counted does not depend on the device
    if isinstance(learner, MoCo):
        learner.criterion.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)  # which is read
    with FlopCounterMode(display=False) as counter:
        learner.loss([pixels] * 2 if isinstance(learner, MoCo) else pixels, labels).backward()
    return float(counter.get_total_flops()) / batch


def supervised_epochs(kind: str | None, work: Work) -> float:
    """Epochs of supervised training, at the same size of images, that have as many FLOPs as a pre-training."""
    return work.protocol.epochs * per_image(kind, work) / per_image("supervised", work) if kind else 0.0
