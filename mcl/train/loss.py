"""Multi-level InfoNCE over gathered targets."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl.ops import cross_entropy


def info_nce(predictions: Tensor, rows: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of picking one's own target among all, by cosine.

    Args:
        predictions: (R, D), any length.
        rows: (R,) row of each prediction's own target in the bank.
        bank: (B, D) normalised targets.
        temperature: divides the cosines.

    Returns:
        Cross-entropy, mean cosine with one's own target, mean cosine with the others; each ().
    """
    cosines = F.normalize(predictions, dim=1) @ bank.t()  # (R, B)
    loss = cross_entropy(cosines / temperature, rows)
    positives = cosines.gather(1, rows[:, None]).mean()
    others = (cosines.sum() - positives * len(cosines)) / (cosines.numel() - len(cosines))
    return loss, positives, others


def contrast(
    predictions: Sequence[Tensor], rows: Sequence[Tensor], bank: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`info_nce` of every level against one bank; fp16 and bf16 are computed in fp32.

    Returns:
        Losses, positive and negative cosines, each (L,).
    """
    with torch.autocast(bank.device.type, enabled=False):
        bank = F.normalize(_upcast(bank), dim=1)
        levels = [info_nce(_upcast(p), r, bank, temperature) for p, r in zip(predictions, rows, strict=True)]
        losses, positives, negatives = (torch.stack(values) for values in zip(*levels, strict=True))
        return losses, positives, negatives


def total_loss(losses: Tensor, weights: Sequence[float], temperature: float) -> Tensor:
    """Sum over directions and levels of weight * 2 T * cross-entropy; `losses` is (V, L)."""
    weighted = [weight * level for weight, level in zip(weights, losses.sum(0).unbind(), strict=True)]
    return torch.stack(weighted).sum() * (2 * temperature)


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
