"""Class of a photograph from frozen features: nearest neighbours, and a linear probe."""

import torch
import torch.nn.functional as F
from torch import Tensor

_KNN_TEMPERATURE = 0.07
_PROBE_DECAY = 1e-3
_PROBE_STEPS = 200


def knn(train: Tensor, labels: Tensor, test: Tensor, k: int, classes: int, same: bool = False) -> Tensor:
    """Classes by a vote of the k nearest neighbours by cosine, weighted exp(cosine / 0.07) (arXiv 1805.01978).

    Args:
        train: (n, D) features. labels: (n,) int64.
        test: (m, D) features.
        same: test is train: no photograph votes for itself.

    Returns:
        (m,) int64.
    """
    cosines = F.normalize(test, dim=1) @ F.normalize(train, dim=1).t()  # (m, n)
    if same:
        cosines.fill_diagonal_(-2)
    weights, nearest = cosines.topk(min(k, len(train) - same), dim=1)
    votes = torch.zeros(len(test), classes).scatter_add_(1, labels[nearest], (weights / _KNN_TEMPERATURE).exp())
    return votes.argmax(1)


def linear(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """Classes by multinomial logistic regression on standardised features (L-BFGS, L2 1e-3).

    Returns:
        (m,) int64.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    x, y = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + _PROBE_DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return F.linear(y, weight, bias).argmax(1).detach()
