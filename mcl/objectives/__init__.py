"""Pre-training methods, by their names in the configuration key ``objective``."""

from collections.abc import Sequence

from mcl.config import Config
from mcl.objectives.byol import BYOL
from mcl.objectives.moco_v2 import MoCoV2
from mcl.objectives.multi_level import MCL
from mcl.objectives.objective import Objective, Output
from mcl.objectives.supervised import Supervised
from mcl.objectives.supervised_contrastive import SupervisedContrastive

__all__ = ["MCL", "OBJECTIVES", "Objective", "Output", "build"]

OBJECTIVES: dict[str, type[Objective]] = {
    "mcl": MCL,
    "supervised": Supervised,
    "supervised_contrastive": SupervisedContrastive,
    "moco_v2": MoCoV2,
    "byol": BYOL,
}


def build(config: Config, classes: Sequence[str] = ()) -> Objective:
    """The model of a run, with initial weights; `classes` are the names of its images' classes."""
    return OBJECTIVES[config.objective](config, classes)
