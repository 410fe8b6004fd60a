"""What is compared: which pre-training a method has, which parts of it are loaded, and the commands of both."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transfers.protocol import Work
from benchmarks.transfers.train import WEIGHTS
from mcl.train import checkpoint

_BACKBONE, _FPN, _HEAD = r"backbone\.", r"neck\.", r"roi_head\.bbox_head\.shared_convs\."

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""Of the commands: a core for each."""

PRETRAININGS = ("mcl", "moco", "supervised", "mcl-released")


@dataclass(frozen=True)
class Method:
    pretraining: str | None  # None: from scratch
    parts: tuple[str, ...] = (_BACKBONE,)  # pretrained.names
    once: bool = False  # with the first seed alone


METHODS = {
    "random": Method(None, ()),
    "mcl-all": Method("mcl", (_BACKBONE, _FPN, _HEAD)),
    "mcl-backbone": Method("mcl"),
    "moco": Method("moco"),
    "supervised": Method("supervised"),
    "mcl-fpn": Method("mcl", (_BACKBONE, _FPN)),
    "mcl-released": Method("mcl-released", (_BACKBONE, _FPN, _HEAD), once=True),
}
"""In the order in which they run, within a seed."""


@dataclass(frozen=True)
class Cell:
    """A method with a seed, which is that of pre-training and fine-tuning."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def pretraining(self) -> str | None:
        """Name of its pre-training, which several cells may have in common."""
        kind = METHODS[self.method].pretraining
        return f"{kind}-{self.seed}" if kind else None


def cells(methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """In the order in which they run: seed after seed."""
    return [
        Cell(name, seed)
        for seed in seeds
        for name, method in METHODS.items()
        if name in methods and (seed == seeds[0] or not method.once)
    ]


def pretrain(cell: Cell, work: Work) -> list[str]:
    """Arguments of Python for the pre-training of a cell that has one; paths are relative to the checkout."""
    kind = METHODS[cell.method].pretraining
    if kind in ("moco", "supervised"):
        return ["-m", "benchmarks.transfers.train", kind, "--seed", str(cell.seed), "--work", str(work.folder)]
    return [
        *("-m", "mcl", "pretrain", work.protocol.preset, *work.words(cell.seed)),
        *(f"name={cell.pretraining}", f"output={work.folder / 'pretrain'}"),
        *("model.compute=released",) * (kind == "mcl-released"),
        *("trainer.device=cpu", "trainer.threads=1", "data.threads=1", "trainer.checkpoint_epochs=1"),
        f"trainer.log_every={work.steps_per_epoch}",  # so that the last record is the mean of the last epoch
        *("evaluation.at_end=[]", "log.tensorboard=false", "log.preview=false"),
    ]


def finetune(cell: Cell, work: Work) -> list[str]:
    """Arguments of Python for the fine-tuning of a cell; paths are relative to the checkout."""
    start = []
    if cell.pretraining:
        names = ",".join(f"'{part}'" for part in METHODS[cell.method].parts)
        start = [f"weights={weights(cell, work)}", f"pretrained.names=[{names}]"]
    return [
        *("-m", "mcl", "finetune", work.protocol.detector, *work.protocol.finetuning, *start),
        *(f"data.root={work.protocol.detection}", f"randomness.seed={cell.seed}"),
        *(f"name={cell.name}", f"output={work.folder / 'finetune'}"),
    ]


def shell(arguments: Sequence[str]) -> str:
    """A command as a shell takes it, in the checkout."""
    return " ".join([*(f"{key}={value}" for key, value in ENVIRONMENT.items()), shlex.join(["python", *arguments])])


def weights(cell: Cell, work: Work) -> Path:
    """What a pre-training leaves for the fine-tuning."""
    assert cell.pretraining is not None
    kind = METHODS[cell.method].pretraining
    file = WEIGHTS if kind in ("moco", "supervised") else f"checkpoints/{checkpoint.LAST}"
    return work.folder / "pretrain" / cell.pretraining / file
