"""Classifies photographs by frozen features, with nearest neighbours and a linear probe, for sets as large as ImageNet.

Every process keeps the features of its own share (:class:`~mcl.evaluation.features.Features`) on the CPU, and copies
chunks of them to its device. Besides its share a process needs less than 4 GB of memory with 2,048 channels and 1,000
classes: kNN needs 1 GB, for 4,096 photographs and 16,384 neighbours at a time; L-BFGS is used only if it needs less
than 1 GB; mini-batches need four copies of the weights of all learning rates, 0.3 GB.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl import distributed
from mcl.distributed import Gather
from mcl.evaluation.features import Features, Progress

QUERIES = 4096
"""Photographs of all processes that are classified by kNN at a time."""
NEIGHBOURS = 16384
"""Features with which they are compared at a time."""
LBFGS_BYTES = 1 << 30
"""Limit for features, logits and their gradients on a device up to which the linear probe is fitted by L-BFGS."""

_KNN_TEMPERATURE = 0.07
_PROBE_DECAY = 1e-3
_PROBE_STEPS = 200
_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
_EPOCHS, _BATCH, _MOMENTUM = 30, 1024, 0.9


def knn(
    train: Features,
    test: Features,
    k: int,
    classes: int,
    device: torch.device,
    same: bool = False,
    progress: Progress = lambda: None,
) -> Tensor:
    """Predicts classes by a vote of the k nearest neighbours by cosine, weighted exp(cosine / 0.07) (arXiv 1805.01978).

    Every process compares the photographs of all processes with its own features, one chunk after another. Processes
    then exchange the nearest features that they found.

    Args:
        train, test: features of this process's share.
        same: whether both are of the same source; then no photograph votes for itself.

    Returns:
        (m,) int64, for the photographs of this process.
    """
    world, rank = distributed.world_size(), distributed.rank()
    rows = max(1, QUERIES // world)
    guesses = [torch.empty(0, dtype=torch.int64)]
    chunks = -(-_most(len(train.index)) // NEIGHBOURS)
    for start in range(0, _most(len(test.index)), rows):
        own = test.select(slice(start, start + rows))
        queries = Gather(_padded(F.normalize(own.values, dim=1), rows).to(device)).wait()
        asking = Gather(_padded(own.index, rows).to(device)).wait() if same else None
        cosines, labels = _nearest(queries, asking, train, k, chunks, progress)
        cosines, labels = (Gather(x).wait().view(world, world, rows, k)[:, rank] for x in (cosines, labels))
        cosines, at = cosines.transpose(0, 1).flatten(1).topk(k)  # (rows, k) of (rows, world * k)
        labels = labels.transpose(0, 1).flatten(1).gather(1, at)
        votes = torch.zeros(rows, classes).scatter_add_(1, labels.cpu(), (cosines / _KNN_TEMPERATURE).exp().cpu())
        guesses.append(votes.argmax(1)[: len(own.index)])
    return torch.cat(guesses)


def _nearest(
    queries: Tensor, asking: Tensor | None, train: Features, k: int, chunks: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Cosines and labels of the k nearest features of this process, (Q, k) each; missing ones have a cosine of -inf."""
    best = queries.new_full((len(queries), k), -math.inf)
    labels = torch.zeros_like(best, dtype=torch.int64)
    for chunk in range(chunks):
        some = train.select(slice(chunk * NEIGHBOURS, (chunk + 1) * NEIGHBOURS))
        cosines = queries @ F.normalize(some.values.to(queries.device), dim=1).t()
        if asking is not None:
            cosines.masked_fill_(asking[:, None] == some.index.to(queries.device), -math.inf)
        found, at = cosines.topk(min(k, len(some.index)), dim=1)
        best, at_best = torch.cat([best, found], 1).topk(k, dim=1)
        labels = torch.cat([labels, some.labels.to(queries.device)[at]], 1).gather(1, at_best)
        progress()
    return best, labels


def linear(
    train: Features,
    test: Features,
    classes: int,
    device: torch.device,
    seed: int = 0,
    progress: Progress = lambda: None,
) -> Tensor:
    """Predicts classes by multinomial logistic regression on standardised features (L2 1e-3) of all processes.

    The regression is fitted by L-BFGS if memory allows (:data:`LBFGS_BYTES`). Otherwise it is fitted by mini-batches
    with momentum, for eight learning rates at once, and the result with the smallest loss is used.

    Args:
        train, test: features of this process's share.
        seed: seed of the order of mini-batches.

    Returns:
        (m,) int64, for the photographs of this process.
    """
    total = int(_total(torch.tensor(len(train.index), device=device)))
    mean = _total(_sum(train.values).to(device)) / total
    std = (_total(_sum(train.values, mean.cpu()).to(device)) / max(1, total - 1)).sqrt().float().clamp_min(1e-6)
    mean = mean.float()
    needed = 4 * _most(len(train.index)) * (train.values.shape[1] + 3 * classes)
    if needed <= LBFGS_BYTES:
        x = (train.values.to(device) - mean) / std
        weight, bias = _by_lbfgs(x, train.labels.to(device), total, classes, progress)
    else:
        weight, bias = _by_sgd(train, mean, std, classes, seed, progress)
    weight, bias = weight / std, bias - weight @ (mean / std)
    guesses = [F.linear(x.to(device), weight, bias).argmax(1).cpu() for x in test.values.split(NEIGHBOURS)]
    return torch.cat(guesses)


def _by_lbfgs(x: Tensor, labels: Tensor, total: int, classes: int, progress: Progress) -> tuple[Tensor, Tensor]:
    """Weight (classes, D) and bias (classes,). All processes take the same steps, since they have the same sums."""
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe", history_size=10)

    def closure() -> Tensor:
        progress()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels, reduction="sum") / total
        of_weight, of_bias = torch.autograd.grad(loss, (weight, bias))
        sums = _total(torch.cat([of_weight.flatten(), of_bias, loss.detach()[None]]))
        weight.grad = sums[: weight.numel()].view_as(weight) + _PROBE_DECAY * weight.detach()
        bias.grad = sums[weight.numel() : -1].clone()
        return sums[-1] + _PROBE_DECAY / 2 * weight.detach().square().sum()

    solver.step(closure)
    return weight.detach(), bias.detach()


@torch.no_grad()
def _by_sgd(
    train: Features, mean: Tensor, std: Tensor, classes: int, seed: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """As :func:`_by_lbfgs`, for the same loss. Shape letters: G learning rates, b rows of a batch, C classes."""
    device, rates, channels = mean.device, len(_RATES), len(mean)
    weights = torch.zeros(rates, classes, channels + 1, device=device)  # the last column is the bias
    velocity, losses = torch.zeros_like(weights), torch.zeros(rates, device=device)
    decayed = torch.ones(channels + 1, device=device).index_fill_(0, torch.tensor([channels], device=device), 0)
    rows = max(1, _BATCH // distributed.world_size())
    steps = -(-_most(len(train.index)) // rows)
    generator = torch.Generator().manual_seed(seed + distributed.rank())
    for epoch in range(_EPOCHS):
        order = torch.randperm(len(train.index), generator=generator)
        for step in range(steps):
            own = train.select(order[step * rows : (step + 1) * rows])
            x = F.pad((own.values.to(device) - mean) / std, (0, 1), value=1.0)  # (b, D + 1)
            truth = F.one_hot(own.labels.to(device), classes)[:, None]  # (b, 1, C)
            logits = (x @ weights.view(-1, channels + 1).t()).view(-1, rates, classes)  # (b, G, C)
            logs = logits.log_softmax(2)
            gradient = (logs.exp() - truth).flatten(1).t() @ x  # (G C, D + 1)
            loss = -(logs * truth).sum((0, 2))
            sums = _total(torch.cat([gradient.flatten(), loss, x.new_tensor([len(x)])]))
            gradient, loss = sums[: gradient.numel()].view_as(weights) / sums[-1], sums[-1 - rates : -1] / sums[-1]
            if epoch == _EPOCHS - 1:
                losses += loss / steps
            velocity.mul_(_MOMENTUM).add_(gradient + _PROBE_DECAY * decayed * weights)
            falling = (1 + math.cos(math.pi * (epoch * steps + step) / (_EPOCHS * steps))) / 2
            weights -= falling * torch.tensor(_RATES, device=device)[:, None, None] * velocity
            progress()
    losses += _PROBE_DECAY / 2 * (decayed * weights).square().sum((1, 2))
    best = weights[losses.nan_to_num(math.inf, math.inf).argmin()]
    return best[:, :-1], best[:, -1]


def _most(n: int) -> int:
    """The largest of all processes' numbers."""
    most: int = max(distributed.gather_objects(n))
    return most


def _total(x: Tensor) -> Tensor:
    """The sum over all processes."""
    return distributed.add_up(x) if distributed.world_size() > 1 else x


def _sum(values: Tensor, mean: Tensor | None = None) -> Tensor:
    """(D,) float64 sum of rows (n, D), or of their squared distances from a mean, without copying all rows at once."""
    parts = (part.double() if mean is None else (part - mean).square() for part in values.split(NEIGHBOURS))
    return sum((part.sum(0) for part in parts), torch.zeros(values.shape[1], dtype=torch.float64))


def _padded(x: Tensor, rows: int) -> Tensor:
    """Pads `x` to `rows` rows, so that all processes have the same number; with zeros, integers with -1."""
    fill = x.new_full((rows - len(x), *x.shape[1:]), 0 if x.is_floating_point() else -1)
    return torch.cat([x, fill])
