"""What :mod:`benchmarks.transfer` compares: methods, their costs, and everything else that decides a result."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Result, portable
from dali_pipelines.source.listings import is_image
from mcl import config
from mcl.budget import count
from mcl.config import Config
from mcl.records.metrics import rewrite

PLACES = (
    *("ancient_ruin", "building", "castle", "garden_or_plant", "indoor", "landscape", "palace", "road_or_pitch"),
    *("temple_or_church", "tower", "waterside"),
)
"""Classes with photographs that are backgrounds of the detection set."""

ALL = ("backbone", "fpn", "head")
_WHOLE = ("montage.ratios=[1]", "montage.images_per_canvas=[1]", "model.loss_weights=[1.0]", "model.head_convs=0")
_CLASSES = ("objective=supervised", "augment.gray=0", "augment.blur=[0,0]", "augment.solarize=[0,0]")


@dataclass(frozen=True)
class Method:
    """A pre-training, in words for ``mcl pretrain``, and the parts of it that a detector gets."""

    words: tuple[str, ...] = ()
    parts: tuple[str, ...] = ALL
    schedule: tuple[tuple[float, int], ...] = ()
    """montage.schedule, with fractions of the run in place of epochs."""
    of: str = ""
    """The method whose pre-training it is; empty: its own."""
    trains: bool = True
    """False: its checkpoint has the initial weights."""


_BUDGET = Method(("montage.queries=[4,1,1,1]", "montage.cells=2"), schedule=((0.82, 3),))
METHODS = {
    "random": Method(parts=("backbone",), trains=False),
    "supervised": Method((*_CLASSES, *_WHOLE), ("backbone",)),
    "moco_v2": Method(
        (
            *("objective=moco_v2", *_WHOLE, "model.width=128", "model.hidden=512", "model.queue=2048"),
            *("augment.saturation=0.4", "augment.blur=[0.5,0.5]", "augment.solarize=[0,0]"),
            *("optim.ema=0.99", "optim.final_ema=0.99"),
        ),
        ("backbone",),
    ),
    "mcl": Method(),
    "budget": _BUDGET,
    "mcl-backbone": Method(parts=("backbone",), of="mcl"),
    "mcl-fpn": Method(parts=("backbone", "fpn"), of="mcl"),
    "budget-backbone": replace(_BUDGET, parts=("backbone",), of="budget"),
    "queries": replace(_BUDGET, words=_BUDGET.words[:1], schedule=()),
    "canvases": replace(_BUDGET, words=_BUDGET.words[1:]),
    "stack": Method(("model.assembly=stack",)),
    "same_level": Method(("model.targets=same_level",)),
    "adjacent": Method(("model.targets=adjacent",)),
    "all": Method(("model.targets=all",)),
    "released": Method(("model.compute=released",)),
    "shared_crop": Method(("augment.shared_crop=true",)),
    "cosine": Method(("model.loss=cosine",)),
    "byol": Method(
        (
            *("objective=byol", *_WHOLE, "model.width=128", "model.hidden=512", "model.temperature=1"),
            "optim.ema=0.99",
        ),
        ("backbone",),
    ),
    "mcl_supervised": Method(_CLASSES),
}

_DECIDING = ("objective", "montage.", "augment.", "model.", "optim.", "trainer.epochs", "trainer.global_batch")
_DECIDING += ("trainer.precision", "data.tile_sampling", "evaluation.k", "evaluation.region_cells")
"""Beginnings of the keys that decide a result."""
_DETECTOR = (
    *("model", "optim_wrapper", "param_scheduler", "train_cfg", "global_batch", "auto_scale_lr", "custom_hooks"),
    *("train_dataloader", "val_dataloader"),
)
"""Sections of a detector's configuration that do."""


class ProtocolError(ValueError):
    """Results or work of another protocol; the message names the file and the remedy."""


@dataclass(frozen=True)
class Cell:
    """A method, what its pre-training may cost, and a seed: that of pre-training, probe and fine-tuning."""

    method: str
    cost: float
    """Of a supervised run: times :attr:`Protocol.unit`. 0 without a pre-training."""
    seed: int

    @property
    def name(self) -> str:
        return self._named(self.method)

    @property
    def pretraining(self) -> str:
        """Name of its pre-training. Cells may have it in common."""
        return self._named(METHODS[self.method].of or self.method)

    def _named(self, method: str) -> str:
        return f"{method}-{self.cost:g}x-{self.seed}" if self.cost else f"{method}-{self.seed}"


@dataclass(frozen=True)
class Protocol:
    """Paths are relative to the checkout; words are those of ``mcl pretrain`` and ``mcl finetune``."""

    images: str = "data/photos4k"
    """Folder of class folders, to pre-train on."""
    without: tuple[str, ...] = PLACES
    """Classes that are left out."""
    at_most: int = 1216
    """Images, drawn evenly from the sorted ones; 0: all."""
    unit: float = 10.2
    """Epochs of the supervised run that costs 1, an image at a time, as ``mcl budget`` counts it."""
    preset: str = "mcl/presets/mcl_r18_fpn_demo.yaml"
    pretraining: tuple[str, ...] = (
        "montage.cells=3",
        "trainer.global_batch=32",
        "trainer.precision=fp32",
        "optim.name=adamw",
        "optim.base_lr=8.0e-3",
        "optim.weight_decay=1.0e-2",
        "optim.clip_norm=5.0",
        "evaluation.region_cells=6",
    )
    """For all methods; their own words come after these."""
    warmup: float = 0.1
    """Of the run."""
    detection: str = "data/cutouts"
    """COCO-format folder, to fine-tune on."""
    detector: str = "mcl/finetune/configs/mask_rcnn_r18_fpn_mini.py"
    finetuning: tuple[str, ...] = (
        "train_cfg.max_iters=400",
        "train_cfg.val_interval=400",
        "custom_hooks.2.interval=400",
        "param_scheduler.1.milestones=[300,367]",
    )

    def words(self, method: str, epochs: int = 1) -> list[str]:
        """Words of a pre-training that decide its result, but for its seed."""
        stages = [[max(1, round(share * epochs)), cells] for share, cells in METHODS[method].schedule]
        return [
            *(*self.pretraining, *METHODS[method].words),
            *(f"montage.schedule={json.dumps(stages)}", f"trainer.epochs={epochs}"),
            f"optim.warmup_epochs={self.warmup * epochs:g}",
        ]

    def config(self, method: str, epochs: int = 1) -> Config:
        return config.load(ROOT / self.preset, self.words(method, epochs))

    def spent(self, method: str, epochs: int) -> float:
        """Epochs of supervised training, at the preset's size of images, that cost as many FLOPs as a pre-training."""
        montage = self.config(method, epochs).montage
        each = [self._flops(method, montage.at(epoch).cells) for epoch in range(epochs)]
        plain = self.config("random")
        return sum(each) / count.supervised(plain.model.backbone, plain.montage.canvas)

    @functools.lru_cache  # noqa: B019  # there is one protocol
    def _flops(self, method: str, cells: int) -> float:
        """Of a training step, per image."""
        cfg = config.override(self.config(method), ["montage.schedule=[]", f"montage.cells={cells}"])
        return count.step(cfg, cfg.trainer.global_batch, 1).flops / cfg.trainer.global_batch

    @functools.lru_cache  # noqa: B019
    def epochs(self, cell: Cell) -> int:
        """Whole epochs, at least one, whose cost is nearest to the cell's; 0 without a pre-training."""
        if not METHODS[cell.method].trains:
            return 0
        wanted, epochs = cell.cost * self.unit, 1
        while (next_one := self.spent(cell.method, epochs + 1)) <= wanted:
            epochs += 1
        return epochs + (next_one - wanted < wanted - self.spent(cell.method, epochs))

    def deciding(self, cell: Cell, finetuned: bool) -> dict[str, Any]:
        """All that decides a cell's measures, as JSON gives it back.

        Args:
            finetuned: whether a detector's AP is among them.
        """
        cfg = self.config(cell.method, self.epochs(cell) or 1)
        plain = {key.name: config.value(cfg, key.name) for key in config.all_keys()}
        kept = {key: value for key, value in plain.items() if key.startswith(_DECIDING) and key != "model.init"}
        own = {"images": self.images, "without": self.without, "at_most": self.at_most}
        own |= {"parts": METHODS[cell.method].parts, **kept}
        if finetuned:
            own |= {Path(self.detector).name: self._detector, "detection": self.detection}
        values: dict[str, Any] = json.loads(json.dumps(own))
        return values

    @functools.cached_property
    def _detector(self) -> str:
        from mcl.finetune import settings  # needs MMEngine, which the probe does not

        values = settings.load(ROOT / self.detector, self.finetuning).to_dict()
        text = json.dumps({key: values[key] for key in _DETECTOR}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, cell: Cell, result: Result, file: Path) -> None:
        """Refuses a result of another protocol. Keys that are younger than it had their defaults.

        Raises:
            ProtocolError: names the first entry that differs.
        """
        before: Mapping[str, Any] = result["protocol"]
        now = self.deciding(cell, "finetuning" in result["measures"])
        defaults = json.loads(json.dumps({key.name: key.default for key in config.all_keys()}))
        differing = [key for key in {**now, **before} if now.get(key) != before.get(key, defaults.get(key))]
        if differing:
            key = differing[0]
            raise ProtocolError(
                f"{file}: of another protocol: {key} is {before.get(key)!r} there and {now.get(key)!r} now "
                f"({len(differing)} entries differ); move it away, or give another folder"
            )


class Work:
    """The work folder: the list ``images.txt``, runs in ``pretrain/`` and ``finetune/``, scores in ``probe/``, and what
    is known of commands in ``commands/``.

    Args:
        folder: made where it is not there.
        protocol: what is done in it.
        sets: COCO-format folders of the region probe, by name.

    Raises:
        ProtocolError: it holds work on other images, or there are none.
    """

    def __init__(self, folder: Path, protocol: Protocol, sets: Mapping[str, str]) -> None:
        self.folder, self.protocol, self.sets = portable(folder), protocol, sets
        self.images = self.folder / "images.txt"
        path, lines = ROOT / self.images, list_images(protocol, ROOT / self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text() != lines:
            raise ProtocolError(f"{path}: of another protocol, or on other images; move {folder} away")
        rewrite(path, lines)


def list_images(protocol: Protocol, folder: Path) -> str:
    """The lines of a list in `folder`.

    Raises:
        ProtocolError: there is no such folder of images.
    """
    root = ROOT / protocol.images
    if not root.is_dir():
        raise ProtocolError(f"{root} does not exist; make data")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in protocol.without)
    files = [(path, name) for name in classes for path in sorted((root / name).iterdir()) if is_image(path.name)]
    if protocol.at_most:
        files = [files[i * len(files) // protocol.at_most] for i in range(min(protocol.at_most, len(files)))]
    return "".join(f"{os.path.relpath(path, folder)}\t{name}\n" for path, name in files)
