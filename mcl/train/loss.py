"""Losses of objectives, as functions of embeddings."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl.ops import cross_entropy

Comparison = tuple[Tensor, Tensor, Tensor]
"""Loss, mean cosine with the own target, mean cosine with the other targets; each ()."""

_HIDDEN = -1e9  # far below any logit, and finite, since apex multiplies the sum of all logits by its smoothing, 0


def info_nce(
    predictions: Tensor, rows: Tensor, bank: Tensor, temperature: float, hidden: Tensor | None = None
) -> Comparison:
    """InfoNCE: cross-entropy of selecting each prediction's own target among all targets, by cosine.

    Args:
        predictions: (R, D); need not be normalised.
        rows: (R,) row of each prediction's own target in the bank.
        bank: (B, D) normalised targets.
        temperature: divides the cosines.
        hidden: (B,) bool, rows of the bank that are not filled.
    """
    cosines = F.normalize(predictions, dim=1) @ bank.t()  # (R, B)
    logits = cosines / temperature
    count: int | Tensor = len(bank)
    if hidden is not None:
        logits, count = logits.masked_fill(hidden, _HIDDEN), (~hidden).sum()
    positives = cosines.gather(1, rows[:, None]).mean()
    return cross_entropy(logits, rows), positives, _others(cosines.sum(), positives, len(cosines), count)


def regression(predictions: Tensor, rows: Tensor, bank: Tensor) -> Comparison:
    """2 - 2 cos, the squared distance of normalised vectors from their own targets; arguments: :func:`info_nce`."""
    predictions = F.normalize(predictions, dim=1)
    positives = (predictions * bank[rows]).sum(1).mean()
    everything = predictions.sum(0) @ bank.sum(0)
    return 2 - 2 * positives, positives, _others(everything, positives, len(predictions), len(bank))


def _others(everything: Tensor, positives: Tensor, rows: int, count: int | Tensor) -> Tensor:
    """Mean cosine with other targets, from the sum over all targets and the mean over the own ones."""
    return (everything - positives * rows) / (rows * count - rows)


def assigned(targets: str, levels: int) -> list[list[int]]:
    """Levels whose targets each level is compared with, for ``model.targets``."""
    chosen: dict[str, Callable[[int, int], bool]] = {
        "top": lambda i, j: j == 0,
        "same_level": lambda i, j: j == i,
        "adjacent": lambda i, j: abs(j - i) <= 1,
        "all": lambda i, j: True,
    }
    return [[j for j in range(levels) if chosen[targets](i, j)] for i in range(levels)]


def over_levels(
    predictions: Sequence[Tensor],
    rows: Sequence[Tensor],
    banks: Sequence[Tensor],
    chosen: Sequence[Sequence[int]],
    compare: Callable[[Tensor, Tensor, Tensor], Comparison],
) -> Comparison:
    """Compares every level with the banks that are chosen for it, and averages over these; fp16 and bf16 use fp32.

    Args:
        predictions: predictions of each level.
        rows: rows of each level, as in :func:`info_nce`.
        banks: normalised targets of each level; an image has the same row in all of them.
        chosen: indices into `banks`, for each level.
        compare: loss of the predictions of a level with a bank.

    Returns:
        Losses and both cosines, each (L,).
    """
    with torch.autocast(banks[0].device.type, enabled=False):
        levels = []
        for p, r, own in zip(predictions, rows, chosen, strict=True):
            found = [compare(upcast(p), r, banks[j]) for j in own]
            levels.append(found[0] if len(found) == 1 else [torch.stack(v).mean(0) for v in zip(*found, strict=True)])
        losses, positives, negatives = (torch.stack(values) for values in zip(*levels, strict=True))
        return losses, positives, negatives


def total_loss(losses: Tensor, weights: Sequence[float], factor: float) -> Tensor:
    """Sum over directions and levels of weight * loss, times a factor; `losses` is (V, L)."""
    weighted = [weight * level for weight, level in zip(weights, losses.sum(0).unbind(), strict=True)]
    return torch.stack(weighted).sum() * factor


def queue_contrast(predictions: Tensor, own: Tensor, queue: Tensor, temperature: float) -> Comparison:
    """InfoNCE with a queue: cross-entropy of selecting each prediction's own target among it and the queue, by cosine.

    fp16 and bf16 are computed in fp32.

    Args:
        predictions: (R, D); need not be normalised.
        own: (R, D) normalised target of each prediction.
        queue: (Q, D) normalised targets of other images.
        temperature: divides the cosines.
    """
    with torch.autocast(own.device.type, enabled=False):
        predictions = F.normalize(upcast(predictions), dim=1)
        positives, negatives = (predictions * own).sum(1, keepdim=True), predictions @ queue.t()
        logits = torch.cat([positives, negatives], 1) / temperature
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return cross_entropy(logits, labels), positives.mean(), negatives.mean()


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of (R, C) logits against (R,) int64 labels, () in fp32 at least.

    Args:
        logits: (R, C).
        labels: (R,) int64.
        smoothing: label smoothing.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(upcast(logits), labels, label_smoothing=smoothing)


def supervised_contrast(
    anchors: Tensor, labels: Tensor, rows: Tensor, bank: Tensor, classes: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2), with cosines.

    Args:
        anchors: (R, D) normalised.
        labels: (R,) int64 classes of the anchors.
        rows: (R,) int64 rows of the anchors in the bank; no anchor is compared with itself.
        bank: (B, D) normalised.
        classes: (B,) int64 of the bank.
        temperature: divides the cosines.

    Returns:
        Loss, mean cosine with positives, mean cosine with negatives; each (), over anchors. An anchor without positives
        adds 0 to the first two, an anchor without negatives adds 0 to the last.
    """
    cosines = anchors @ bank.t()  # (R, B)
    self_ = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, rows[:, None], True)
    alike = labels[:, None] == classes
    positives, negatives = alike & ~self_, ~alike
    count = positives.sum(1)
    log_sum = (cosines / temperature).masked_fill(self_, -torch.inf).logsumexp(1)
    mean = (cosines * positives).sum(1) / count.clamp_min(1)
    loss = torch.where(count > 0, log_sum - mean / temperature, 0)
    others = (cosines * negatives).sum(1) / negatives.sum(1).clamp_min(1)
    return loss.mean(), mean.mean(), others.mean()


def upcast(x: Tensor) -> Tensor:
    """fp16 and bf16 to fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
