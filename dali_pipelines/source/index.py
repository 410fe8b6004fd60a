"""The index: what reading the files of a source revealed, kept in a file so that it need not be read again."""

import hashlib
import os
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dali_pipelines.source.files import MISSING, Stamp, is_remote, parallel
from dali_pipelines.source.headers import Header

Progress = Callable[[int, int, int], None]
"""Called with files read, files to read, images in those read."""

_FORMAT = 1
_SAVE_SECONDS = 5.0
_UNREAD: Stamp = (-1, -2)  # of no file: what could not be read is tried again at the next opening

Int64s = npt.NDArray[np.int64]


class Image(NamedTuple):
    """An image in a file."""

    name: str  # within its shard; empty for a plain file
    offset: int
    length: int  # bytes
    label: int  # -1 unknown
    header: Header


@dataclass(frozen=True)
class Table:
    """f files and their n images, in order: a plain file is one image, a shard holds any number."""

    files: list[str]
    stamps: Int64s  # (f, 2)
    counts: Int64s  # (f,) images in each
    names: list[str]  # (n) within the shard
    extents: Int64s  # (n, 2) offset, length
    labels: Int64s  # (n,)
    sizes: npt.NDArray[np.int32]  # (n, 2) width, height
    bad: dict[int, str]

    @classmethod
    def of(cls, files: list[str], stamps: Sequence[Stamp], images: Sequence[Sequence[Image]]) -> Self:
        flat = list(chain.from_iterable(images))
        return cls(
            files=files,
            stamps=np.array(stamps, np.int64).reshape(-1, 2),
            counts=np.array([len(each) for each in images], np.int64),
            names=[image.name for image in flat],
            extents=np.array([(image.offset, image.length) for image in flat], np.int64).reshape(-1, 2),
            labels=np.array([image.label for image in flat], np.int64),
            sizes=np.array(
                [(0, 0) if isinstance(image.header, str) else image.header for image in flat], np.int32
            ).reshape(-1, 2),
            bad={i: image.header for i, image in enumerate(flat) if isinstance(image.header, str)},
        )

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        starts = np.cumsum([0, *(len(table.names) for table in tables)]).tolist()
        return cls(
            files=list(chain.from_iterable(table.files for table in tables)),
            stamps=np.concatenate([table.stamps for table in tables]),
            counts=np.concatenate([table.counts for table in tables]),
            names=list(chain.from_iterable(table.names for table in tables)),
            extents=np.concatenate([table.extents for table in tables]),
            labels=np.concatenate([table.labels for table in tables]),
            sizes=np.concatenate([table.sizes for table in tables]),
            bad={start + i: why for start, table in zip(starts, tables, strict=False) for i, why in table.bad.items()},
        )

    def take(self, files: Int64s) -> Self:
        """The files of these numbers, in this order."""
        counts = self.counts[files]
        # Number of a file's first image here, less that of its first image there, for every image there.
        shift = (np.cumsum(self.counts) - self.counts)[files] - (np.cumsum(counts) - counts)
        rows = np.repeat(shift, counts) + np.arange(counts.sum())
        bad = np.zeros(len(self.names), bool)
        bad[list(self.bad)] = True
        return type(self)(
            files=[self.files[i] for i in files.tolist()],
            stamps=self.stamps[files],
            counts=counts,
            names=[self.names[i] for i in rows.tolist()],
            extents=self.extents[rows],
            labels=self.labels[rows],
            sizes=self.sizes[rows],
            bad={int(i): self.bad[int(rows[i])] for i in np.flatnonzero(bad[rows])},
        )


def index_file(folder: str, root: str, kind: str, annotations: str) -> Path:
    """Where the index of a source lies; `folder` is ``data.index``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = Path(folder) if folder else cache / "mcl" / "index"
    return place / f"{hashlib.sha256(_identity(root, kind, annotations).encode(*_TEXT)).hexdigest()[:24]}.npz"


def _identity(root: str, kind: str, annotations: str) -> str:
    paths = [path if not path or is_remote(path) else os.path.abspath(path) for path in (root, annotations)]
    return "\n".join([kind, *paths])


class Index:
    """An index file.

    Args:
        folder: ``data.index``.
        root, kind, annotations: of the source.
    """

    def __init__(self, folder: str, root: str, kind: str, annotations: str) -> None:
        self.path = index_file(folder, root, kind, annotations)
        self._identity = _identity(root, kind, annotations)
        self._writable = True

    def update(
        self,
        files: Sequence[str],
        stamps: Int64s,
        scan: Callable[[str, int], list[Image]],
        *,
        threads: int,
        chunk: int,
        progress: Progress | None = None,
    ) -> Table:
        """Reads the files that are new or have changed, and keeps the index file up to date.

        Args:
            files: names of the files, in the order wanted; one may occur several times.
            stamps: (f, 2) what they are now; those of missing files are ``MISSING``.
            scan: the images of a file, from its name and size; an OSError makes it bad until the next opening.
            threads: files read at a time.
            chunk: files that a thread takes at a time.

        Returns:
            The table of `files`.
        """
        known = self._load()
        rows = {name: i for i, name in enumerate(known.files)}
        found = np.array([rows.get(name, -1) for name in files], np.int64)
        fresh = found >= 0
        fresh[fresh] = (known.stamps[found[fresh]] == stamps[fresh]).all(1)
        kept = np.unique(found[fresh])
        if fresh.all() and len(kept) == len(known.files):
            return known.take(found)
        parts = [known.take(kept)]
        now = {files[i]: stamps[i] for i in np.flatnonzero(~fresh).tolist()}
        stale = list(now)
        chunks = [stale[i : i + chunk] for i in range(0, len(stale), chunk)]
        done, images, saved, pause = 0, 0, time.monotonic(), _SAVE_SECONDS

        def save() -> None:
            parts[:] = [Table.concatenate(parts)]
            self._save(parts[0])

        try:
            with closing(parallel(lambda names: _scan(names, now, scan), chunks, threads)) as results:
                for part in results:
                    parts.append(part)
                    done, images = done + len(part.files), images + len(part.names)
                    if progress is not None:
                        progress(done, len(stale), images)
                    if done < len(stale) and (begun := time.monotonic()) > saved + pause:
                        save()
                        saved = time.monotonic()
                        pause = max(_SAVE_SECONDS, 10 * (saved - begun))
        finally:
            save()
        rows = {name: i for i, name in enumerate(parts[0].files)}
        return parts[0].take(np.array([rows[name] for name in files], np.int64))

    def _load(self) -> Table:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return _unpack(arrays, self._identity)
        except (FileNotFoundError, NotADirectoryError):
            return Table.of([], [], [])
        except Exception as error:  # a damaged file makes zip and NumPy raise nearly anything
            warnings.warn(f"{self.path} cannot be used and is built anew ({error})", stacklevel=2)
            return Table.of([], [], [])

    def _save(self, table: Table) -> None:
        """Writes the file, or says that it cannot be written; a run can do without."""
        if not self._writable:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}.partial")  # others may write, too
            try:
                with open(partial, "xb") as file:
                    np.savez(file, allow_pickle=False, **_pack(table, self._identity))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, self.path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"the index of sizes cannot be kept in {self.path.parent} ({error.strerror}): every start reads all "
                "headers; set data.index to a folder that can be written",
                stacklevel=2,
            )


def _scan(names: list[str], stamps: Mapping[str, Int64s], scan: Callable[[str, int], list[Image]]) -> Table:
    seen: list[Stamp] = []
    images: list[list[Image]] = []
    for name in names:
        version, size = stamps[name].tolist()
        stamp = version, size
        try:
            found = [Image("", 0, 0, -1, "no such file")] if stamp == MISSING else scan(name, size)
        except OSError as error:
            found, stamp = [Image("", 0, 0, -1, f"cannot read it: {error.strerror or error}")], _UNREAD
        seen.append(stamp)
        images.append(found)
    return Table.of(names, seen, images)


# Any bytes may be a file name; arrays of NumPy's own strings would take the length of the longest for each.
_TEXT = ("utf-8", "surrogateescape")


def _pack(table: Table, identity: str) -> dict[str, npt.NDArray[Any]]:
    texts = {"identity": [identity], "files": table.files, "names": table.names, "reasons": list(table.bad.values())}
    arrays: dict[str, npt.NDArray[Any]] = {"format": np.array(_FORMAT), "bad": np.array(list(table.bad), np.int64)}
    for name, values in texts.items():
        encoded = [value.encode(*_TEXT) for value in values]
        arrays[name] = np.frombuffer(b"".join(encoded), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([len(each) for each in encoded], dtype=np.int64)
    for name in ("stamps", "counts", "extents", "labels", "sizes"):
        arrays[name] = getattr(table, name)
    return arrays


def _unpack(arrays: Mapping[str, npt.NDArray[Any]], identity: str) -> Table:
    if arrays["format"] != _FORMAT:
        raise ValueError("written by another version")

    def text(name: str) -> list[str]:
        whole, ends = arrays[name].tobytes(), arrays[f"{name}_ends"].tolist()
        return [whole[start:end].decode(*_TEXT) for start, end in zip([0, *ends], ends, strict=False)]

    if text("identity") != [identity]:
        raise ValueError("the index of other images")
    files, names = text("files"), text("names")
    f, n = len(files), len(names)
    numbers = {name: arrays[name] for name in ("stamps", "counts", "extents", "labels", "sizes")}
    shapes = {"stamps": (f, 2), "counts": (f,), "extents": (n, 2), "labels": (n,), "sizes": (n, 2)}
    if any(numbers[name].shape != shape for name, shape in shapes.items()) or numbers["counts"].sum() != n:
        raise ValueError("its parts do not fit together")
    bad = dict(zip(arrays["bad"].tolist(), text("reasons"), strict=True))
    return Table(files=files, names=names, bad=bad, **numbers)
