"""TensorBoard: charts with readable names, the configuration, and the pictures."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mcl.config import Config, to_dict

NAMES = {
    "retrieval": "Retrieval",
    "knn": "Nearest neighbours",
    "linear": "Linear classifier",
    "svm": "Support vector machines",
    "regions": "Objects",
}
"""Readable names of evaluations."""

PICTURES = {
    "montage": "Montages: every tile has to find its own image in the other view",
    "features": "Feature maps of the trained and of the untrained network",
}
"""Captions of pictures, by the first word of their file's name."""

# TensorBoard sorts groups by name, and opens the first two: evaluation and train.
_CHARTS = {
    "loss": "train/loss",
    "positive": "train/cosine/own",
    "negative": "train/cosine/others",
    "accuracy": "train/share classified rightly",
    "loss_level": "update/loss",
    "grad_norm": "update/gradient norm",
    "lr": "update/learning rate",
    "ema": "update/momentum of the target network",
    "skipped": "update/steps left out",
    "embedding_std": "variety/standard deviation of embeddings",
    "target_rank": "variety/effective rank of targets",
    "images_per_s": "work/images per second",
    "data_wait": "work/share of time waiting for images",
    "peak_memory_gb": "work/peak memory, GB",
    "reserved_memory_gb": "work/reserved memory, GB",
}
_SCORES = {
    "levels": "trained",
    "accuracy": "trained",
    "target": "momentum network",
    "random": "untrained",
    "linear_accuracy": "linear classifier, trained",
    "linear_target": "linear classifier, momentum network",
    "linear_random": "linear classifier, untrained",
}
_TIMES = ("saving", "forward", "backward", "optimizer", "graph")
_UNCHARTED = ("kind", "step", "epoch", "eta_s")


class TensorBoard:
    """Charts of a run's records.

    Args:
        config: configuration of the run.
        step: number of steps already done; values of later steps are dropped.
    """

    def __init__(self, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(config.run_folder / "tensorboard"), purge_step=step + 1)
        self._unchanged: dict[str, tuple[float, list[int]]] = {}  # numbers not drawn yet, first and last step
        self._drawn: set[str] = set()
        text = yaml.safe_dump(to_dict(config), sort_keys=False).replace("\n", "\n    ")
        self._writer.add_text("configuration", f"    {text}", step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds the numbers of a record to their charts."""
        for name, value in charted(record).items():
            self._draw(name, value, record["step"])

    def _draw(self, name: str, value: float, step: int) -> None:
        """Adds a number to its chart once it has changed; constants have no chart."""
        if name not in self._drawn:
            before, steps = self._unchanged.setdefault(name, (value, []))
            if value == before or not steps:
                steps[1:] = [step]
                return
            self._drawn.add(name)
            for same in steps:
                self._writer.add_scalar(name, before, same)
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Adds a note with all constants, and charts with one point for numbers that were recorded once."""
        rest = {name: own for name, own in self._unchanged.items() if name not in self._drawn}
        for name, (value, steps) in rest.items():
            if len(steps) == 1:
                self._writer.add_scalar(name, value, steps[0])
        if lines := [f"    {name}: {value:g}\n" for name, (value, steps) in rest.items() if len(steps) > 1]:
            self._writer.add_text(
                "numbers that never changed", "".join(lines), max(steps[-1] for _, steps in rest.values())
            )
        self._writer.close()


def charted(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a record by the names of charts, such as train/loss, train/cosine/own/level 0."""
    if record["kind"] == "eval":
        images = "held-out images" if record["split"] == "val" else "training images"
        of = f"evaluation/{NAMES[record['name']]}, {images}"
        words = {name: f"{of}/{word}" for name, word in _SCORES.items() if name in record}
    else:
        words = {name: f"train/{name.replace('_', ' ')}" for name in record if name not in _UNCHARTED}
        words |= {name: f"work/share of time in {name}" for name in _TIMES} | _CHARTS
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if name in words and isinstance(value, list):
            numbers |= {f"{words[name]}/level {i}": v for i, v in enumerate(value)}
        elif name in words and not isinstance(value, str):
            numbers[words[name]] = value
    return numbers


def show_picture(config: Config, path: Path, step: int) -> None:
    """Adds a picture to TensorBoard, if it is installed and enabled."""
    if config.log.tensorboard and find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(config.run_folder / "tensorboard")) as writer, Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(PICTURES[path.stem.split("_")[0]], pixels, step, dataformats="HWC")
