"""The index: a file that keeps what has been read from the files of a source, so that they are not read again."""

import dataclasses
import errno
import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dali_pipelines.source.files import MISSING, Stamp, is_remote, replacing
from dali_pipelines.source.headers import Header
from dali_pipelines.source.names import Int64s, Names, spread

Progress = Callable[[int, int, int], None]
"""Called with the number of files read, files to read, and images in the files read."""

_FORMAT = 4  # to be raised if older files would be misread, or if headers are judged differently
_SAVE_SECONDS = 5.0
_UNREAD: Stamp = (-1, -2)  # no file has this stamp, so files that could not be read are tried again next time


class Image(NamedTuple):
    """An image in a file."""

    name: str  # within its shard; empty for a plain file
    offset: int
    length: int  # bytes
    label: int  # -1 unknown
    header: Header | str  # header, or why the image cannot be used


class Table(NamedTuple):
    """f files and their n images, in order. A plain file has one image, a shard any number."""

    files: Names  # (f,)
    stamps: Int64s  # (f, 2)
    counts: Int64s  # (f,) images in the file
    names: Names  # (n,) within the file
    extents: Int64s  # (n, 2) offset, length in the file, bytes
    labels: Int64s  # (n,)
    sizes: npt.NDArray[np.int32]  # (n, 2) width, height, pixels; 0, 0 for an image that cannot be used
    by_pillow: npt.NDArray[np.bool_]  # (n,)
    problems: Names  # (n,) why the image cannot be used; empty if it can

    @classmethod
    def of(cls, files: Sequence[tuple[str, Stamp, Sequence[Image]]]) -> Self:
        """Creates a table from names and stamps of files, and the images in them."""
        images = [image for *_, found in files for image in found]
        headers = [Header((0, 0), 1, False) if isinstance(i.header, str) else i.header for i in images]
        return cls(
            Names.of(name for name, *_ in files),
            np.array([stamp for _, stamp, _ in files], np.int64).reshape(-1, 2),
            np.array([len(found) for *_, found in files], np.int64),
            Names.of(image.name for image in images),
            np.array([(image.offset, image.length) for image in images], np.int64).reshape(-1, 2),
            np.array([image.label for image in images], np.int64),
            np.array([header.size for header in headers], np.int32).reshape(-1, 2),
            np.array([header.by_pillow for header in headers], np.bool_),
            Names.of(i.header if isinstance(i.header, str) else "" for i in images),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Concatenates the files of tables."""
        columns: Iterator[Any] = zip(*parts, strict=True)
        return cls._make((Names if isinstance(c[0], Names) else np).concatenate(c) for c in columns)

    @property
    def bad(self) -> dict[int, str]:
        """Images that cannot be used, and why: index -> reason."""
        return {i: self.problems[i] for i in np.flatnonzero(np.diff(self.problems.offsets)).tolist()}

    def take(self, rows: Int64s) -> Self:
        """The files with the given numbers, in the given order, with their images."""
        images = spread((np.cumsum(self.counts) - self.counts)[rows], self.counts[rows])
        columns: list[Any] = [_take(c, rows) for c in self[:3]] + [_take(c, images) for c in self[3:]]
        return type(self)(*columns)


def _take(column: Any, rows: Int64s) -> Any:
    return column.take(rows) if isinstance(column, Names) else column[rows]


def index_file(folder: str, root: str, kind: str, annotations: str) -> Path:
    """Path of a source's index; `folder` is ``data.index``. Without a home folder, the path starts with ~."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    place = Path(folder) if folder else cache / "mcl" / "index"
    digest = hashlib.sha256(_identity(root, kind, annotations).encode("utf-8", "surrogateescape")).hexdigest()
    return place / f"{digest[:24]}.npz"


def _identity(root: str, kind: str, annotations: str) -> str:
    paths = [path if not path or is_remote(path) else os.path.abspath(path) for path in (root, annotations)]
    return "\n".join([kind, *paths])


class Index:
    """An index file.

    Args:
        folder: ``data.index``.
        root, kind, annotations: those of the source.
    """

    def __init__(self, folder: str, root: str, kind: str, annotations: str) -> None:
        self.path = index_file(folder, root, kind, annotations)
        self._identity = _identity(root, kind, annotations)
        self._writable = True

    def images(self) -> int:
        """Number of images when the index was written; 0 if there is no index file."""
        return len(self._load().labels)

    def update(
        self,
        files: Names,
        stamps: Int64s,
        scan: Callable[[str, int], list[Image]],
        *,
        threads: int,
        chunk: int,
        progress: Progress | None = None,
    ) -> Table:
        """Reads the files that are new or have changed, and keeps the index file up to date.

        Args:
            files: (f,) paths, in the order of the result; a file may occur several times. The index keeps the paths
                without the folder.
            stamps: (f, 2) current stamps; ``MISSING`` for missing files.
            scan: returns the images of a file, given its path and size; after an OSError the file is bad until the next
                opening.
            threads: number of threads that read files.
            chunk: number of files that a thread takes at a time.

        Returns:
            The table of `files`.
        """
        known = self._load()
        if files.same(known.files) and np.array_equal(stamps, known.stamps):
            return known
        found = _rows(files, known.files)
        fresh = found < len(known.files)
        fresh[fresh] = (known.stamps[found[fresh]] == stamps[fresh]).all(1)
        _, first, again = np.unique(found, return_index=True, return_inverse=True)  # one entry per distinct file
        order = np.argsort(first)
        first, again = first[order], np.argsort(order)[again]
        if fresh.all() and len(first) == len(known.files):
            return known.take(found)

        stale = first[~fresh[first]]
        parts, places = [known.take(found[first[fresh[first]]])], [first[fresh[first]]]
        chunks = [stale[i : i + chunk] for i in range(0, len(stale), chunk)]
        done, images, saved, pause = 0, 0, time.monotonic(), _SAVE_SECONDS

        def save() -> Table:
            order = np.argsort(np.concatenate(places))
            places[:] = [np.concatenate(places)[order]]
            parts[:] = [Table.concatenate(parts).take(order)]
            self._save(parts[0])
            return parts[0]

        pool = ThreadPoolExecutor(threads)
        try:
            tasks = {pool.submit(_scan, files, stamps, rows, scan): rows for rows in chunks}
            for task in as_completed(tasks):
                parts.append(task.result())
                places.append(tasks.pop(task))
                done, images = done + len(places[-1]), images + len(parts[-1].labels)
                if progress is not None:
                    progress(done, len(stale), images)
                if done < len(stale) and (begun := time.monotonic()) > saved + pause:
                    save()
                    saved = time.monotonic()
                    pause = max(_SAVE_SECONDS, 10 * (saved - begun))
        finally:
            pool.shutdown(cancel_futures=True)
            whole = save()
        return whole.take(again)

    def _load(self) -> Table:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                if arrays["format"] != _FORMAT:
                    raise ValueError("it was written by another version")
                if arrays["identity"] != self._identity:
                    raise ValueError("it is the index of other images")
                table = Table(*(_unpack(name, arrays) for name in Table._fields))
            by_file, by_image = table[:3], table[3:]
            if {*map(len, by_file)} != {len(table.counts)} or {*map(len, by_image)} != {table.counts.sum()}:
                raise ValueError("its parts do not fit together")
            return table
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # on a damaged file zip and NumPy raise many types of errors
            warnings.warn(f"{self.path} cannot be used and is created again ({error})", stacklevel=2)
        return Table.of([])

    def _save(self, table: Table) -> None:
        """Writes the file, or warns that it cannot be written; a run works without it."""
        if not self._writable:
            return
        try:
            if self.path.parts[0] == "~":
                raise FileNotFoundError(errno.ENOENT, "there is no home folder")
            with replacing(self.path) as file:
                np.savez(file, allow_pickle=False, format=_FORMAT, identity=self._identity, **_pack(table))
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"the index of sizes cannot be kept in {self.path.parent} ({error.strerror}): every start reads all "
                "headers; set data.index to a folder that can be written",
                stacklevel=2,
            )


def _rows(files: Names, known: Names) -> Int64s:
    """(f,) number of each text in `known`; other texts get numbers from len(known) on, equal texts the same number."""
    rows = {name: i for i, name in enumerate(known)}
    texts = enumerate(dataclasses.replace(files, folder=None), len(known))
    return np.fromiter((rows.setdefault(name, i) for i, name in texts), np.int64, len(files))


def _scan(files: Names, stamps: Int64s, rows: Int64s, scan: Callable[[str, int], list[Image]]) -> Table:
    """Scans the files with the given numbers."""
    read = []
    for i in rows.tolist():
        stamp: Stamp = tuple(stamps[i].tolist())
        try:
            found = [Image("", 0, 0, -1, "no such file")] if stamp == MISSING else scan(files[i], stamp[1])
        except OSError as error:
            found, stamp = [Image("", 0, 0, -1, f"cannot read it: {error.strerror or error}")], _UNREAD
        read.append(("", stamp, found))
    return Table.of(read)._replace(files=dataclasses.replace(files, folder=None).take(rows))


def _pack(table: Table) -> dict[str, npt.NDArray[Any]]:
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, column in table._asdict().items():
        named = isinstance(column, Names)
        columns |= {name: column.content, f"{name}_offsets": column.offsets} if named else {name: column}
    return columns


def _unpack(name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
    return Names(arrays[name], arrays[f"{name}_offsets"]) if f"{name}_offsets" in arrays else arrays[name]
