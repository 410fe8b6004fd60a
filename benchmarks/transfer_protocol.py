"""What decides the results of :mod:`benchmarks.transfer`, and the folder in which it works."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.common import ROOT, portable
from dali_pipelines.source.listings import is_image
from mcl import config
from mcl.config import Config
from mcl.records.metrics import rewrite

PLACES = (
    *("ancient_ruin", "building", "castle", "garden_or_plant", "indoor", "landscape", "palace", "road_or_pitch"),
    *("temple_or_church", "tower", "waterside"),
)
"""Classes with photographs that are backgrounds of the detection set."""

_SINCE = {
    "augment": ("shared_crop",),
    "model": ("assembly", "init", "targets", "loss", "queue", "label_smoothing"),
    "optim": ("final_ema",),
}
"""Keys of sections that are younger than kept results; they are digested where they are not as by default."""
_OF_PRESET = ("montage", "augment", "model", "optim")
_OF_DETECTOR = (
    *("model", "optim_wrapper", "param_scheduler", "train_cfg", "global_batch", "auto_scale_lr", "custom_hooks"),
    *("train_dataloader", "val_dataloader"),
)
"""Sections of a configuration that decide a result."""


class ProtocolError(ValueError):
    """Results or work of another protocol; the message names the file and the remedy."""


@dataclass(frozen=True)
class Protocol:
    """Paths are relative to the checkout; words are those of ``mcl pretrain`` and ``mcl finetune``."""

    images: str = "data/photos4k"
    """Folder of class folders, to pre-train on."""
    without: tuple[str, ...] = PLACES
    """Classes that are left out."""
    at_most: int = 0
    """Images, drawn evenly from the sorted ones; 0: all."""
    preset: str = "mcl/presets/mcl_r18_fpn_demo.yaml"
    epochs: int = 10
    pretraining: tuple[str, ...] = (
        "montage.cells=2",
        "trainer.global_batch=32",
        "trainer.precision=fp32",
        "optim.name=adamw",
        "optim.base_lr=8.0e-3",
        "optim.weight_decay=1.0e-2",
        "optim.warmup_epochs=1",
        "optim.clip_norm=5.0",
    )
    """For all methods, as far as they have these keys."""
    moco_temperature: float = 0.2
    moco_bank: int = 2048
    """Keys of earlier images."""
    moco_momentum: float = 0.99
    """At the first step; it rises to 1 along a half cosine."""
    moco_hidden: int = 512
    moco_width: int = 128
    """Of the embedding."""
    detection: str = "data/cutouts"
    """COCO-format folder, to fine-tune on."""
    detector: str = "mcl/finetune/configs/mask_rcnn_r18_fpn_mini.py"
    finetuning: tuple[str, ...] = (
        "train_cfg.max_iters=1200",
        "train_cfg.val_interval=400",
        "custom_hooks.2.interval=400",
        "global_batch=8",
        "optim_wrapper.optimizer.lr=0.06",
        "param_scheduler.1.milestones=[900,1100]",
        "train_dataloader.dataset.dataset.pipeline.2.scales=[[320,112],[320,128],[320,144]]",
        "val_dataloader.dataset.pipeline.1.scale=[320,128]",
    )
    """The file says the same; here it is on record, and stays when the file changes."""

    def plain(self) -> dict[str, Any]:
        """As JSON gives it back."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @functools.cached_property
    def configurations(self) -> dict[str, str]:
        """Digests of what the files `preset` and `detector` come to, with the words, as far as it decides a result."""
        from mcl.finetune import settings  # needs MMEngine, which a table of results does not

        preset = config.to_dict(config.load(ROOT / self.preset, self.pretraining))
        usual = config.to_dict(config.Config())
        for name, young in _SINCE.items():
            section = preset[name]
            preset[name] = {k: v for k, v in section.items() if k not in young or v != usual[name][k]}
        detector = settings.load(ROOT / self.detector, self.finetuning).to_dict()
        return {self.preset: _digest(preset, _OF_PRESET), self.detector: _digest(detector, _OF_DETECTOR)}

    def check(self, result: Mapping[str, Any], file: Path) -> None:
        """Refuses a result that was made by another protocol, or with other configuration files.

        Raises:
            ProtocolError: it was; names the first entry that differs.
        """
        before = _entries(result["protocol"], result["configurations"])
        now = _entries(self.plain(), self.configurations)
        differing = [key for key in {**now, **before} if now.get(key) != before.get(key)]
        if differing:
            key = differing[0]
            raise ProtocolError(
                f"{file}: of another protocol: {key} is {before.get(key)!r} there and {now.get(key)!r} now "
                f"({len(differing)} entries differ); move it away, or give another folder"
            )


def _entries(protocol: Mapping[str, Any], configurations: Mapping[str, str]) -> dict[str, Any]:
    """What decides a result. Configuration files are known by their names, for they may be moved."""
    files = {Path(file).name: digest for file, digest in configurations.items()}
    return {**protocol, **{key: Path(protocol[key]).name for key in ("preset", "detector")}, **files}


def _digest(values: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    text = json.dumps({key: values[key] for key in keys}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Work:
    """The work folder: ``protocol.json``, the list ``images.txt``, runs in ``pretrain/`` and ``finetune/``, and what
    is known of commands in ``commands/``.

    Args:
        folder: made where it is not there.
        protocol: what is done in it.

    Raises:
        ProtocolError: it holds work of another protocol, or on other images.
    """

    def __init__(self, folder: Path, protocol: Protocol) -> None:
        self.folder, self.protocol = portable(folder), protocol
        self.images = self.folder / "images.txt"
        self.classes, lines = _list_images(protocol, ROOT / self.folder)
        (ROOT / self.folder).mkdir(parents=True, exist_ok=True)
        for name, text in (("protocol.json", json.dumps(protocol.plain(), indent=1) + "\n"), ("images.txt", lines)):
            path = ROOT / self.folder / name
            if not path.exists():
                rewrite(path, text)
            elif path.read_text() != text:
                raise ProtocolError(f"{path}: of another protocol, or on other images; move {folder} away")

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The folder with the protocol that it was made with."""
        record = json.loads((folder / "protocol.json").read_text())
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(folder, Protocol(**values))

    def words(self, seed: int) -> list[str]:
        """Words for ``mcl pretrain``, but for the name of the run."""
        return [
            *self.protocol.pretraining,
            f"trainer.epochs={self.protocol.epochs}",
            f"trainer.seed={seed}",
            f"data.root={self.images}",
            "data.source=list",
            "data.allow_outside=true",
            "data.val_root=",
            f"data.index={self.folder / 'index'}",
        ]

    def config(self, seed: int, *words: str) -> Config:
        """The configuration of a pre-training; batch, optimiser and size of images are those of all methods."""
        return config.load(ROOT / self.protocol.preset, [*self.words(seed), *words])


def _list_images(protocol: Protocol, folder: Path) -> tuple[list[str], str]:
    """Classes, and the lines of a list in `folder`."""
    root = ROOT / protocol.images
    if not root.is_dir():
        raise ProtocolError(f"{root} does not exist; make data")
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name not in protocol.without)
    files = [(path, name) for name in classes for path in sorted((root / name).iterdir()) if is_image(path.name)]
    if protocol.at_most:
        files = [files[i * len(files) // protocol.at_most] for i in range(min(protocol.at_most, len(files)))]
    names = sorted({name for _, name in files})
    return names, "".join(f"{os.path.relpath(path, folder)}\t{name}\n" for path, name in files)
