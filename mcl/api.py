"""The verbs of ``mcl`` as functions, which raise the errors that the command line prints."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from mcl import commands, exporters, finetune
from mcl import config as configuration
from mcl.config import Config
from mcl.evaluation.embedding import Embedding
from mcl.evaluation.embedding import read as read_embedding
from mcl.exporters import Report
from mcl.finetune import THRESHOLD
from mcl.models.backbones import Backbone
from mcl.records.metrics import EVALUATIONS, Record, read
from mcl.train import checkpoint

if TYPE_CHECKING:
    from mcl.finetune.pictures import Detections


def load_config(config: str | Path | Config, /, **keys: Any) -> Config:
    """A configuration with some keys set.

    Args:
        config: a preset's name, the path of a YAML file, or a configuration.
        keys: values by key; a dictionary sets several keys of a section, as in ``data={"root": "photos"}``. Dotted
            names need ``**{"data.root": "photos"}``.

    Raises:
        ConfigError: no such preset, file or key, or an illegal value.
    """
    values = dict(_by_dotted_key(keys))
    return configuration.override(config, values) if isinstance(config, Config) else configuration.load(config, values)


def _by_dotted_key(keys: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from _by_dotted_key(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", os.fspath(value) if isinstance(value, os.PathLike) else value


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: Config

    @property
    def folder(self) -> Path:
        """The folder that :func:`pretrain` wrote."""
        return self.config.run_folder

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, for :func:`evaluate`, :func:`export` and :func:`load_backbone`."""
        return self.folder / "checkpoints" / checkpoint.LAST

    @property
    def report(self) -> Path:
        """HTML page with curves, scores and pictures."""
        return self.folder / "report.html"

    @property
    def records(self) -> list[Record]:
        """Records of ``metrics.jsonl``, in the order of steps."""
        return read(self.folder / "metrics.jsonl")

    @property
    def evaluations(self) -> list[Record]:
        """Records of ``evaluations.jsonl``: evaluations of the run and later ones by :func:`evaluate`."""
        return read(self.folder / EVALUATIONS)


def pretrain(config: str | Path | Config, /, **keys: Any) -> Run:
    """Trains, or continues the run in the configuration's folder, on all GPUs, or on the CPU if there are none.

    Args:
        config: a preset's name, the path of a YAML file, or a configuration.
        keys: see :func:`load_config`.

    Returns:
        The finished run.

    Raises:
        ConfigError, SourceError, CheckpointError: wrong input, before any work starts.
        ProcessError: one of several processes failed.
        NonFiniteLossError: the loss became infinite or NaN.
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was saved; a ``KeyboardInterrupt``.
    """
    cfg = load_config(config, **keys)
    commands.run(cfg)
    return Run(cfg)


def evaluate(
    name: Literal["retrieval", "knn", "linear", "svm", "regions"], checkpoint_file: str | Path, /, **keys: Any
) -> list[Record]:
    """Scores a checkpoint and a randomly initialised network.

    Args:
        name: name of the evaluation; ``mcl evaluate --help`` describes each.
        checkpoint_file: checkpoint of mcl.
        keys: see :func:`load_config`, for example to name the current folders of the images.

    Returns:
        A record for data.root, with ``split`` train, and one for data.val_root, if that is set, with ``split`` val.

    Raises:
        CheckpointError, ConfigError, SourceError: wrong input.
    """
    return commands.evaluate(name, Path(checkpoint_file), dict(_by_dotted_key(keys)))


def embed(
    checkpoint_file: str | Path,
    images: str | Path,
    out: str | Path,
    /,
    *,
    features: str = "c5",
    plot: Literal["", "pca", "umap"] = "",
    **keys: Any,
) -> Embedding:
    """Writes a row of features for each image. An incomplete file is continued.

    Args:
        checkpoint_file: checkpoint of mcl.
        images: folder, list file or shards, as for ``data.root``.
        out: file to write, ``.npy`` (with a ``.json`` of the same name) or ``.parquet``.
        features: one of :data:`mcl.evaluation.embedding.FEATURES`.
        plot: projection for a map of the images, which is written with a page of nearest neighbours; empty: none.
        keys: see :func:`load_config`.

    Raises:
        CheckpointError, ConfigError, SourceError, BadDataError: wrong input.
        EmbeddingError: a file cannot be written.
    """
    for _ in commands.embed(
        Path(checkpoint_file), os.fspath(images), Path(out), features, plot, dict(_by_dotted_key(keys))
    ):
        pass
    return read_embedding(Path(out))


def export(
    checkpoint_file: str | Path,
    to: str,
    /,
    *,
    parts: Sequence[str] = (),
    network: Literal["online", "target"] = "online",
    statistics: str | Path = "",
    verify: bool = False,
    output: str | Path | None = None,
    **keys: Any,
) -> Report:
    """Writes the weights of a checkpoint for another library.

    Args:
        checkpoint_file: checkpoint of mcl.
        to: the library that will read them, one of those that ``mcl export --help`` lists.
        parts: backbone, fpn or head; empty: all parts that the library has.
        network: online, or target, the momentum network.
        statistics: folder of images from which BatchNorm statistics are computed, or none; empty: data.root for
            libraries that freeze them.
        verify: load the weights into the library's own model first, and compare features.
        output: file or folder to write; None: in ``exports/`` of the run folder.
        keys: see :func:`load_config`, for example to name the current folder of the images in data.root.

    Raises:
        CheckpointError, ConfigError, SourceError: see :func:`mcl.exporters.export`.
    """
    return exporters.export(
        Path(checkpoint_file),
        to,
        parts=parts,
        network=network,
        statistics_of=str(statistics),
        check=verify,
        output=None if output is None else Path(output),
        overrides=dict(_by_dotted_key(keys)),
    )


def detect(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    threshold: float = THRESHOLD,
) -> list["Detections"]:
    """Draws the detections of a fine-tuned detector into PNG files.

    Args:
        run: run folder of ``mcl finetune``, whose newest checkpoint is used, or a checkpoint in it.
        images: files or folders; images that cannot be read are skipped with a warning.
        output: folder of the pictures; None: ``detections/`` of the run folder.
        threshold: lowest score that is drawn, from 0 to 1.

    Raises:
        ConfigError: no such run, an illegal threshold, or MMDetection is not installed.
        SourceError: no such image, or none can be read.
        CheckpointError: the checkpoint cannot be read.
    """
    paths = [images] if isinstance(images, str | Path) else images
    found = finetune.detect(Path(run), [Path(p) for p in paths], None if output is None else Path(output), threshold)
    return list(found)


class FeatureMaps(nn.Module):
    """A backbone that returns feature maps by stride.

    Attributes:
        channels: channels of the maps, by stride.
        mean: RGB mean with which images from 0 to 1 are normalised.
        std: RGB standard deviation with which images from 0 to 1 are normalised.
    """

    def __init__(self, backbone: Backbone, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.mean, self.std = tuple(mean), tuple(std)
        self.channels = dict(zip((4, 8, 16, 32), reversed(backbone.channels), strict=True))

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Maps normalised images (n, 3, h, w) to maps (n, channels[s], h / s, w / s) for s in 4, 8, 16, 32."""
        return dict(zip(self.channels, reversed(self.backbone(images)), strict=True))


def load_backbone(checkpoint_file: str | Path) -> FeatureMaps:
    """The trained backbone of a checkpoint, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    model, cfg = checkpoint.load_model(checkpoint_file)
    return FeatureMaps(model.online.backbone, cfg.augment.mean, cfg.augment.std).eval()
