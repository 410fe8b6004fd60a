"""Writes features of images to a file: one row per image, in the order of the source.

Until the file is complete, rows are in ``FILE.partial`` and their number is in ``FILE.partial.json``, so that an
interrupted call can continue. Batches contain the same images after an interruption, so the file is bit-identical on
the same device, engine and libraries.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from dali_pipelines.reference import decode
from dali_pipelines.source import Source
from dali_pipelines.source.files import replacing
from mcl.config import Config, ConfigError
from mcl.evaluation.features import BATCH, Pooled, photos
from mcl.finetune.console import shown
from mcl.records.metrics import log

Floats = npt.NDArray[np.float32]

FEATURES = ("c5", "c4", "c3", "c2", "p5", "p4", "p3", "p2", "projector")
"""Spatial means of the backbone's stages and of the FPN's maps, and the projector's embedding of the whole image."""

KINDS = (".npy", ".parquet")
_SAVE = 30.0  # seconds between two saves of the state
_ROWS = 4096  # rows per row group of Parquet
_EXAMPLES = 5  # bad images that are logged


class EmbeddingError(RuntimeError):
    """Features cannot be written; the message names the file and the remedy."""


class Projected(nn.Module):
    """The region head's embedding of a whole image, computed as for a canvas of level 0."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        if getattr(encoder, "fpn", None) is None:
            raise ConfigError("features: projector needs a model with an FPN; use one of c2 to c5")
        self.backbone, self.fpn, self.head = encoder.backbone, encoder.fpn, encoder.head

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, S, S) to (n, width)."""
        embeddings: Tensor = self.head(self.fpn(self.backbone(pixels), [0])[0])
        return embeddings


@dataclass(frozen=True)
class Embedding:
    """A file of features with one row for each of n images."""

    path: Path
    features: str
    """One of :data:`FEATURES`."""
    size: int
    """Side of the network's input, pixels."""
    root: str
    """Root of the source."""
    names: list[str]
    """(n) names, relative to the root's folder."""
    labels: list[int]
    """(n) indices into `classes`, -1 unknown."""
    classes: list[str]
    bad: dict[str, str]
    """Reasons why images cannot be decoded, by name; their rows are NaN, in Parquet null."""
    key: str
    """Hash of network, images and settings."""

    def rows(self) -> Floats:
        """(n, D) features; a ``.npy`` file is mapped into memory."""
        if self.path.suffix == ".npy":
            mapped: Floats = np.load(self.path, mmap_mode="r")
            return mapped
        column = _parquet().parquet.read_table(self.path, columns=["features"])["features"].combine_chunks()
        rows: Floats = column.values.to_numpy(zero_copy_only=False).reshape(len(self.names), -1)
        return rows


def check(path: Path) -> None:
    """Checks the ending of a file, and that the libraries that write it are installed.

    Raises:
        ConfigError: the ending is neither .npy nor .parquet, or it is .parquet and pyarrow is not installed.
    """
    if path.suffix not in KINDS:
        raise ConfigError(f"--out: {path}: the name must end in {' or '.join(KINDS)}")
    if path.suffix == ".parquet":
        _parquet()


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"--out: Parquet needs pyarrow ({error}); pip install pyarrow, or write to a .npy file"
        ) from None
    return pyarrow


@torch.no_grad()
def embed(encoder: nn.Module, config: Config, source: Source, device: torch.device, path: Path, name: str) -> Embedding:
    """Writes features of all images of a source, or continues an incomplete file; a complete file is not changed.

    BatchNorm uses the statistics of training, as exported weights do, so that the features of an image do not depend on
    other images.

    Args:
        encoder: the network; it is moved to `device`, and put into float32 and evaluation mode.
        path: ``.npy``, with a ``.json`` file beside it, or ``.parquet``.
        name: one of :data:`FEATURES`.

    Raises:
        ConfigError: see :func:`check`; or the encoder does not have these features.
        BadDataError: no image can be decoded.
        EmbeddingError: the file cannot be written; finished rows are kept.
    """
    check(path)
    network = (Projected(encoder) if name == "projector" else Pooled(encoder, name)).to(device, torch.float32).eval()
    key = _key(name, network, config, source)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if (there := read(path)).key == key and not _state(path).exists():
            without = f", without {len(there.bad)} bad images; remove it to try these again" if there.bad else ""
            log.info("%s: already exists%s", path, without)
            return there
    try:
        bad = _compute(network, config, source, device, path, key)
        prefix = source.base.rstrip("/") + "/"
        made = Embedding(
            path=path,
            features=name,
            size=config.montage.final.canvas,
            root=source.root,
            names=[image.removeprefix(prefix) for image in source.names],
            labels=source.labels.tolist(),
            classes=list(source.classes),
            bad={source.names[i].removeprefix(prefix): reason for i, reason in sorted(bad.items())},
            key=key,
        )
        _finish(made)
    except OSError as error:
        raise EmbeddingError(
            f"{path}: cannot be written ({error.strerror or error}); free disk space or correct the folder's "
            "permissions, and run the same command again to continue"
        ) from error
    return made


def read(path: Path) -> Embedding:
    """Describes a file of features.

    Raises:
        OSError, ValueError, TypeError, KeyError: the file was not written by :func:`embed`.
    """
    if path.suffix == ".npy":
        about = json.loads(path.with_suffix(".json").read_bytes())
        path.stat()
    else:
        with _parquet().parquet.ParquetFile(path) as file:
            about = json.loads(file.schema_arrow.metadata[b"mcl"])
            table = file.read(columns=["name", "class"])
        numbers = {name: i for i, name in enumerate(about["classes"])}
        about["labels"] = [numbers.get(name, -1) for name in table["class"].to_pylist()]
        about["names"] = table["name"].to_pylist()
    return Embedding(path=path, **about)


def _key(name: str, network: nn.Module, config: Config, source: Source) -> str:
    seen = (name, config.montage.final.canvas, config.augment.mean, config.augment.std, source.fingerprint())
    whole = hashlib.sha256(repr(seen).encode())
    for entry, tensor in network.state_dict().items():
        whole.update(entry.encode())
        whole.update(tensor.cpu().contiguous().numpy().data)
    return whole.hexdigest()


def _compute(
    network: nn.Module, config: Config, source: Source, device: torch.device, path: Path, key: str
) -> dict[int, str]:
    """Fills the partial file; returns the numbers of images that cannot be decoded, and the reasons."""
    side = config.montage.final.canvas
    shape = len(source), network(torch.zeros(1, 3, side, side, device=device)).shape[1]
    first, bad = _done(path, key)
    rows, done, saved = _map(_partial(path), shape, new=not first), first, time.monotonic()
    if first:
        log.info("%s: continues after %d of %d images", path, first, len(source))

    def save() -> None:
        rows.flush()
        with replacing(_state(path)) as file:
            file.write(json.dumps({"key": key, "rows": done, "bad": bad}).encode())

    try:
        with shown("features", "images") as show:
            for pixels, index in photos(config, source, device, first=first // BATCH):
                batch = range(done, min(done + BATCH, len(source)))
                if len(index):
                    rows[index] = network(pixels).cpu()
                for i in sorted({*batch} - {*index.tolist()}):
                    rows[i], bad[i] = np.nan, _reason(source, i)
                done = batch.stop
                show(done - first, len(source) - first)
                if time.monotonic() > saved + _SAVE:
                    save()
                    saved = time.monotonic()
    finally:
        save()
    for i, reason in sorted(bad.items())[:_EXAMPLES]:
        log.warning("no features of %s: %s", source.names[i], reason)
    return bad


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _state(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.json")


def _done(path: Path, key: str) -> tuple[int, dict[int, str]]:
    """Number of finished rows for the same features of the same images, and the bad images among them."""
    try:
        state = json.loads(_state(path).read_bytes())
        if state["key"] == key and _partial(path).exists():
            return state["rows"], {int(i): reason for i, reason in state["bad"].items()}
    except (OSError, ValueError, KeyError):
        pass
    return 0, {}


def _map(file: Path, shape: tuple[int, int], new: bool) -> np.memmap[Any, np.dtype[np.float32]]:
    """Maps rows to a file. Disk space is allocated in advance, since a full disk would kill a process that writes to
    mapped memory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = open_memmap(file, "w+" if new else "r+", np.float32, shape)
        with open(file, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError:
        if new:
            file.unlink(missing_ok=True)
        raise
    return rows


def _reason(source: Source, i: int) -> str:
    """Why image i cannot be decoded."""
    if i in source.bad:
        return source.bad[i]
    try:
        decode(source, i)
    except OSError as error:
        return str(error)
    return "cannot be decoded"


def _finish(made: Embedding) -> None:
    """Replaces the partial file by the final one. The file is complete only when its state file has been removed."""
    about = {field.name: getattr(made, field.name) for field in fields(made) if field.name != "path"}
    if made.path.suffix == ".npy":
        with replacing(made.path.with_suffix(".json")) as file:
            file.write(json.dumps(about, indent=0).encode())
        os.replace(_partial(made.path), made.path)
    else:
        _write_parquet(made, about, np.load(_partial(made.path), mmap_mode="r"))
        _partial(made.path).unlink()
    _state(made.path).unlink()


def _write_parquet(made: Embedding, about: dict[str, Any], rows: Floats) -> None:
    """Writes the columns name, class (null if unknown) and features (a list of fixed size, null for a bad image)."""
    pa, width = _parquet(), rows.shape[1]
    metadata = {"mcl": json.dumps({name: value for name, value in about.items() if name not in ("names", "labels")})}
    types = {"name": pa.string(), "class": pa.string(), "features": pa.list_(pa.float32(), width)}
    schema = pa.schema(list(types.items()), metadata)
    names = [name.encode("utf-8", "backslashreplace").decode() for name in made.names]
    classes = [[*made.classes, None][label] for label in made.labels]
    with replacing(made.path) as file, pa.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            bad = pa.array(np.isnan(rows[part, 0]))
            features = pa.FixedSizeListArray.from_arrays(pa.array(rows[part].ravel()), width, mask=bad)
            writer.write_table(pa.table([names[part], classes[part], features], schema=schema))
