"""The index: what reading the files of a source revealed, kept in a file so that it need not be read again."""

import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dali_pipelines.source.files import MISSING, Stamp, is_remote, replacing
from dali_pipelines.source.headers import Header

Progress = Callable[[int, int, int], None]
"""Called with files read, files to read, images in those read."""

_FORMAT = 3  # another number where files of before would be misread, or what is decided by headers has changed
_SAVE_SECONDS = 5.0
_UNREAD: Stamp = (-1, -2)  # of no file: what could not be read is tried again at the next opening

Int64s = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]

FILE = np.dtype([("name", object), ("stamp", np.int64, 2), ("images", np.int64)])
"""A file of a source, and the number of images in it."""

ENTRY = np.dtype(
    [
        ("name", object),
        ("extent", np.int64, 2),
        ("label", np.int64),
        ("size", np.int32, 2),
        ("by_pillow", np.bool_),
        ("problem", object),
    ]
)
"""An image of a file; its size is 0, 0 where there is a problem."""


class Image(NamedTuple):
    """An image in a file."""

    name: str  # within its shard; empty for a plain file
    offset: int
    length: int  # bytes
    label: int  # -1 unknown
    header: Header | str  # or why it cannot be used

    def found(self) -> tuple[tuple[int, int], bool, str]:
        """The last fields of ENTRY."""
        if isinstance(self.header, str):
            return (0, 0), False, self.header
        return self.header.size, self.header.by_pillow, ""


class Table(NamedTuple):
    """f files and their n images, in order: a plain file is one image, a shard holds any number."""

    files: Records  # (f,) of FILE
    entries: Records  # (n,) of ENTRY

    @classmethod
    def of(cls, files: Sequence[tuple[str, Stamp, Sequence[Image]]]) -> Self:
        """From names and stamps of files, and the images in them."""
        entries = [
            (image.name, (image.offset, image.length), image.label, *image.found())
            for *_, found in files
            for image in found
        ]
        return cls(np.array([(*file, len(found)) for *file, found in files], FILE), np.array(entries, ENTRY))

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        """(n, 2) width, height, pixels; 0, 0 for a bad image."""
        return self.entries["size"].copy()

    @property
    def bad(self) -> dict[int, str]:
        """Why images cannot be used."""
        return {i: problem for i, problem in enumerate(self.entries["problem"]) if problem}

    def take(self, files: Int64s) -> Self:
        """The files of these numbers, in this order."""
        counts = self.files["images"][files]
        # Number of a file's first image here, less that of its first image there, for every image there.
        shift = (np.cumsum(self.files["images"]) - self.files["images"])[files] - (np.cumsum(counts) - counts)
        return type(self)(self.files[files], self.entries[np.repeat(shift, counts) + np.arange(counts.sum())])


def index_file(folder: str, root: str, kind: str, annotations: str) -> Path:
    """Where the index of a source lies; `folder` is ``data.index``. Where there is no home folder, its ~ remains."""
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
        root, kind, annotations: of the source.
    """

    def __init__(self, folder: str, root: str, kind: str, annotations: str) -> None:
        self.path = index_file(folder, root, kind, annotations)
        self._identity = _identity(root, kind, annotations)
        self._writable = True

    def images(self) -> int:
        """How many images it holds, as they were when it was written; 0 where there is no file."""
        return len(self._load().entries)

    def update(
        self,
        files: Sequence[str],
        paths: Sequence[str],
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
            paths: where they lie.
            stamps: (f, 2) what they are now; those of missing files are ``MISSING``.
            scan: the images of a file, from its path and size; an OSError makes it bad until the next opening.
            threads: files read at a time.
            chunk: files that a thread takes at a time.

        Returns:
            The table of `files`.
        """
        known = self._load()
        rows = {name: i for i, name in enumerate(known.files["name"])}
        found = np.array([rows.get(name, -1) for name in files], np.int64)
        fresh = found >= 0
        fresh[fresh] = (known.files["stamp"][found[fresh]] == stamps[fresh]).all(1)
        kept = np.unique(found[fresh])
        if fresh.all() and len(kept) == len(known.files):
            return known.take(found)
        parts = [known.take(kept)]
        now = {files[i]: (paths[i], tuple(stamps[i].tolist())) for i in np.flatnonzero(~fresh).tolist()}
        stale = list(now)
        chunks = [stale[i : i + chunk] for i in range(0, len(stale), chunk)]
        done, images, saved, pause = 0, 0, time.monotonic(), _SAVE_SECONDS

        def save() -> Table:
            parts[:] = [Table(*map(np.concatenate, zip(*parts, strict=True)))]
            self._save(parts[0])
            return parts[0]

        pool = ThreadPoolExecutor(threads)
        try:
            for future in as_completed([pool.submit(_scan, names, now, scan) for names in chunks]):
                part = future.result()
                parts.append(part)
                done, images = done + len(part.files), images + len(part.entries)
                if progress is not None:
                    progress(done, len(stale), images)
                if done < len(stale) and (begun := time.monotonic()) > saved + pause:
                    save()
                    saved = time.monotonic()
                    pause = max(_SAVE_SECONDS, 10 * (saved - begun))
        finally:
            pool.shutdown(cancel_futures=True)
            whole = save()
        rows = {name: i for i, name in enumerate(whole.files["name"])}
        return whole.take(np.array([rows[name] for name in files], np.int64))

    def _load(self) -> Table:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                if arrays["format"] != _FORMAT:
                    raise ValueError("written by another version")
                if arrays["identity"] != self._identity:
                    raise ValueError("the index of other images")
                table = Table(_unpack("files", FILE, arrays), _unpack("entries", ENTRY, arrays))
            if table.files["images"].sum() != len(table.entries):
                raise ValueError("its parts do not fit together")
            return table
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # a damaged file makes zip and NumPy raise nearly anything
            warnings.warn(f"{self.path} cannot be used and is built anew ({error})", stacklevel=2)
        return Table.of([])

    def _save(self, table: Table) -> None:
        """Writes the file, or says that it cannot be written; a run can do without."""
        if not self._writable:
            return
        try:
            if self.path.parts[0] == "~":
                raise FileNotFoundError(errno.ENOENT, "there is no home folder")
            with replacing(self.path) as file:
                columns = _pack("files", table.files) | _pack("entries", table.entries)
                np.savez(file, allow_pickle=False, format=_FORMAT, identity=self._identity, **columns)
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"the index of sizes cannot be kept in {self.path.parent} ({error.strerror}): every start reads all "
                "headers; set data.index to a folder that can be written",
                stacklevel=2,
            )


def _scan(names: list[str], now: Mapping[str, tuple[str, Stamp]], scan: Callable[[str, int], list[Image]]) -> Table:
    files = []
    for name in names:
        path, stamp = now[name]
        try:
            found = [Image("", 0, 0, -1, "no such file")] if stamp == MISSING else scan(path, stamp[1])
        except OSError as error:
            found, stamp = [Image("", 0, 0, -1, f"cannot read it: {error.strerror or error}")], _UNREAD
        files.append((name, stamp, found))
    return Table.of(files)


def _pack(part: str, records: Records) -> dict[str, npt.NDArray[Any]]:
    """A column for every field; texts as JSON: NumPy's own strings would all take the length of the longest."""
    columns = {f"{part}_{name}": records[name] for name in records.dtype.names or ()}
    return {
        name: np.frombuffer(json.dumps(column.tolist()).encode(), np.uint8) if column.dtype.hasobject else column
        for name, column in columns.items()
    }


def _unpack(part: str, dtype: np.dtype[np.void], arrays: Mapping[str, npt.NDArray[Any]]) -> Records:
    columns = []
    for name in dtype.names or ():
        column = arrays[f"{part}_{name}"]
        columns.append(np.array(json.loads(column.tobytes()), object) if dtype[name].hasobject else column)
    return np.rec.fromarrays(columns, dtype).view(np.ndarray)
