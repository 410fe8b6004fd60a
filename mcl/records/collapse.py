"""Whether representations collapse: all images get the same one, or ones that differ in few directions only.

Both figures come from one small matrix of the vectors' products, which is added up over the processes: they are those
of the whole batch, in any number of processes. They are computed when a record is read, from the last step's output:
a step itself computes nothing for them.
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
"""Times 1 / sqrt(D). Below it two images have a mean cosine above 15/16."""

LEAST_RANK = 0.125
"""Times the largest possible rank. Healthy runs of the demo stay above 0.3, collapsed ones fall below 0.1."""

PATIENCE = 2
"""Records in a row that are as low, before it is said."""

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
    "they collapse, and the network learns little more. Start a new run with a lower optim.base_lr or a longer "
    "optim.warmup_epochs, and with model.loss=infonce if it is cosine; see docs/evaluation.md"
)


def figures(output: Output) -> Record:
    """Figures of a step's vectors, scaled to unit length, those of all views together; all processes call this.

    Returns:
        ``embedding_std``, for each level the mean over dimensions of the standard deviation over the batch: 1 / sqrt(D)
        at most, and 0 where all are the same. ``target_rank``, for each level with targets their effective rank
        (RankMe, arXiv 2210.02885, without its 1e-7): from 1 to min(vectors, D). NaN where a vector is not finite.
    """
    stds = [_std(_products(rows)) for rows in zip(*output.embeddings, strict=True)]
    ranks = [_rank(_products(rows)) for rows in zip(*(bank.unbind(1) for bank in output.targets), strict=True)]
    return {name: values for name, values in zip(COLLAPSE, (stds, ranks), strict=True) if values}


def _products(rows: Iterable[Tensor]) -> Tensor:
    """(1 + D, 1 + D) float64, the products of unit vectors behind a 1, which gives their number and their sum."""
    unit = F.pad(F.normalize(torch.cat(list(rows)).double(), dim=1), (1, 0), value=1)
    products = unit.t() @ unit
    return distributed.add_up(products) if distributed.world_size() > 1 else products


def _std(products: Tensor) -> float:
    means, squares = products[0, 1:] / products[0, 0], products.diagonal()[1:] / products[0, 0]
    return float((squares - means**2).clamp_min(0).sqrt().mean())


def _rank(products: Tensor) -> float:
    """Rows that every process has count as often, which leaves the rank alone."""
    if not products.isfinite().all():  # eigvalsh refuses these
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
        # Where no BatchNorm ends the projector, as in MCL, new networks give all images much the same.
        self._was_healthy = dict.fromkeys(COLLAPSE, config.objective == "mcl")

    def __call__(self, record: Record) -> None:
        """Takes a training record in."""
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
