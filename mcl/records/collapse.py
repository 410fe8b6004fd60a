"""Detects a collapse of representations: all images get the same one, or they differ in few directions only.

Both figures are computed from a small matrix of products of vectors, which is summed over processes. So they are those
of the whole batch, whatever the number of processes. They are computed from the output of the last step when a record
is made, so that steps take no longer.
"""

from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mcl import distributed
from mcl.config import Config
from mcl.objectives import Output
from mcl.records.metrics import COLLAPSE, Record, log

LEAST_STD = 0.25
"""Smallest healthy standard deviation, in units of 1 / sqrt(D). Below it, two images have a mean cosine above 15/16."""

LEAST_RANK = 0.125
"""Smallest healthy rank, as a fraction of the largest possible one. Healthy runs of the demo stay above 0.3, collapsed
ones fall below 0.1."""

PATIENCE = 2
"""Number of low records in a row after which the warning is given."""

_SAID = dict(
    zip(
        COLLAPSE,
        (
            "the embeddings of level {} are nearly the same for all images (standard deviation {:.2g}, "
            "{:.2g} if they were spread evenly)",
            "the targets of level {} differ in few directions only (effective rank {:.1f} of {:.0f})",
        ),
        strict=True,
    )
)
_REMEDY = (
    "they collapse, and the network hardly learns any more. Start a new run with a lower optim.base_lr or a longer "
    "optim.warmup_epochs, and with model.loss=infonce if it is cosine; see docs/evaluation.md"
)


def figures(output: Output) -> Record:
    """Figures of a step's vectors, scaled to unit length, of all views together; all processes must call this.

    Returns:
        ``embedding_std``: for each level, the mean over dimensions of the standard deviation over the batch. It is at
        most 1 / sqrt(D), and 0 if all vectors are equal. ``target_rank``: for each level with targets, their effective
        rank (RankMe, arXiv 2210.02885, without its 1e-7), from 1 to min(vectors, D). NaN if a vector is not finite.
    """
    stds = [_std(_products(rows)) for rows in zip(*output.embeddings, strict=True)]
    ranks = [_rank(_products(rows)) for rows in zip(*(bank.unbind(1) for bank in output.targets), strict=True)]
    return {name: values for name, values in zip(COLLAPSE, (stds, ranks), strict=True) if values}


def _products(rows: Iterable[Tensor]) -> Tensor:
    """(1 + D, 1 + D) float64: products of unit vectors with a 1 in front, which adds their number and their sum."""
    unit = F.pad(F.normalize(torch.cat(list(rows)).double(), dim=1), (1, 0), value=1)
    products = unit.t() @ unit
    return distributed.add_up(products) if distributed.world_size() > 1 else products


def _std(products: Tensor) -> float:
    means, squares = products[0, 1:] / products[0, 0], products.diagonal()[1:] / products[0, 0]
    return float((squares - means**2).clamp_min(0).sqrt().mean())


def _rank(products: Tensor) -> float:
    """Rows that all processes have are counted once per process, which does not change the rank."""
    if not products.isfinite().all():  # eigvalsh raises an error for these
        return float("nan")
    singular = torch.linalg.eigvalsh(products[1:, 1:]).clamp_min(0).sqrt()
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


class CollapseWarning:
    """Warns once of each figure that is too low in :data:`PATIENCE` records in a row."""

    def __init__(self, config: Config) -> None:
        width = config.model.width
        rank = min(2 * config.trainer.global_batch, width)
        self._healthy = dict(zip(COLLAPSE, (width**-0.5, rank), strict=True))
        self._least = dict(zip(COLLAPSE, (LEAST_STD * width**-0.5, LEAST_RANK * rank), strict=True))
        self._in_a_row: Counter[str] = Counter()
        # Without a BatchNorm at the end of the projector, as in MCL, a new network's embeddings are nearly the same.
        self._was_healthy = dict.fromkeys(COLLAPSE, config.objective == "mcl")

    def __call__(self, record: Record) -> None:
        """Checks a training record."""
        for name, least in self._least.items():
            values = record.get(name, [])
            low = [level for level, value in enumerate(values) if value < least]
            self._was_healthy[name] |= bool(values) and not low
            if self._in_a_row[name] == PATIENCE or not self._was_healthy[name]:
                continue
            self._in_a_row[name] = self._in_a_row[name] + 1 if low else 0
            if self._in_a_row[name] == PATIENCE:
                said = _SAID[name].format(", ".join(map(str, low)), min(values), self._healthy[name])
                log.warning("step %d: %s: %s", record["step"], said, _REMEDY)
