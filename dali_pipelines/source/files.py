"""Where files lie: on a disk, or in an object store that fsspec reaches."""

import contextlib
import errno
import functools
import glob
import hashlib
import io
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, cast

Stamp = tuple[int, int]
"""Version (modification time or hash of an ETag) and size in bytes: a file with the same stamp is the same file."""

_HALF = 1 << 63  # stamps are kept in 64 bits

MISSING: Stamp = (-1, -1)
"""Stamp of a file that is not there."""


class SourceError(ValueError):
    """Images that cannot be used; the message names the folder or file and the remedy."""


class Local:
    """Files on a disk; the methods are thread-safe.

    Args:
        base: folder that names are relative to, without a slash at its end.
    """

    local = True
    """Whether other libraries can open the paths, too."""
    threads = min(32, len(os.sched_getaffinity(0)) + 4)
    """Threads to read many files with: what ThreadPoolExecutor takes for reading, of the cores of this process."""
    block = 1 << 16
    """Bytes fetched at a time where a shard is read from one end to the other."""

    def __init__(self, base: str) -> None:
        self.base = base

    def kind(self, path: str) -> Literal["file", "folder", ""]:
        """What the path is; "" if nothing is there."""
        return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else ""

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders in a folder, each sorted; without those that start with a dot."""
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else files).append(entry.name)
        return sorted(files), sorted(folders)

    def glob(self, pattern: str) -> list[str]:
        """Paths that match, sorted."""
        return sorted(glob.glob(pattern))

    def stamp(self, path: str) -> Stamp:
        """The stamp of a file, ``MISSING`` if it is not there."""
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return MISSING
        except OSError:
            return -1, 0  # it is there, and reading it will say what is wrong
        return (status.st_mtime_ns + _HALF) % (2 * _HALF) - _HALF, status.st_size  # dates before 1678 and after 2262

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (default: the rest), fewer where the file ends before."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def open(self, path: str, size: int, block: int) -> BinaryIO:
        """A file of `size` bytes, of which at least `block` bytes are fetched at a time."""
        return open(path, "rb", buffering=block)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        found = entry.is_dir()
    except OSError:  # a link to itself, for instance; who reads it will be told
        return False
    if found and entry.is_symlink():
        target, place = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
        if os.path.commonpath([target, place]) == target:
            raise SourceError(f"{entry.path} is a link to a folder that it lies in; remove it")
    return found


class Remote:
    """Files in an object store, or wherever else fsspec reads; the methods are those of :class:`Local`.

    Raises:
        SourceError: no such protocol, or its package is not installed.
    """

    local = False
    threads = 64  # a request waits tens of milliseconds
    block = 8 << 20

    def __init__(self, root: str, base: str) -> None:
        import fsspec
        from fsspec.registry import known_implementations

        self.base = base
        protocol = root.split("://")[0].split("::")[0]
        try:
            self._fs, inner = fsspec.url_to_fs(root)
        except ImportError as error:
            package = known_implementations.get(protocol, {}).get("class", "fsspec").split(".")[0]
            remedy = "" if package == "fsspec" else f"; pip install {package}"
            raise SourceError(f"{root} cannot be read without another package: {error}{remedy}") from error
        except ValueError as error:
            raise SourceError(f"{root}: {error}") from error
        self._base = inner.rstrip("/").removesuffix(root[len(base) :])  # `base` as the file system knows it
        self._fs.invalidate_cache()  # fsspec shares one file system, and what it has listed, among all who ask for it
        self._root = root
        self._lock = threading.Lock()
        self._stamps: dict[str, dict[str, Stamp]] = {}  # of the folders listed so far

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self._root, self.base)

    def kind(self, path: str) -> Literal["file", "folder", ""]:
        try:
            found = self._call(self._fs.info, path)
        except FileNotFoundError:
            return ""
        return "folder" if found["type"] == "directory" else "file"

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        files: dict[str, Stamp] = {}
        folders: list[str] = []
        for entry in self._call(self._fs.ls, folder, detail=True):
            path = entry["name"].rstrip("/")
            name = path.rsplit("/", 1)[-1]
            if name.startswith(".") or path == self._inner(folder).rstrip("/"):  # some stores list the folder itself
                continue
            if entry["type"] == "directory":
                folders.append(name)
            else:
                files[name] = (_version(entry), entry.get("size") or 0)
        self._stamps[folder] = files
        return sorted(files), sorted(folders)

    def glob(self, pattern: str) -> list[str]:
        found = self._call(self._fs.glob, pattern)
        return sorted(self.base + path[len(self._base) :] for path in found)

    def stamp(self, path: str) -> Stamp:
        folder, _, name = path.rpartition("/")
        with self._lock:
            if folder not in self._stamps:  # one request for the folder instead of one per file
                try:
                    self.entries(folder)
                except FileNotFoundError:
                    self._stamps[folder] = {}
        return self._stamps[folder].get(name, MISSING)

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""
        return cast(bytes, self._call(self._fs.cat_file, path, start=start, end=end))

    def open(self, path: str, size: int, block: int) -> BinaryIO:
        return io.BufferedReader(RangeFile(functools.partial(self.read, path), size), block)

    def _inner(self, path: str) -> str:
        """The path as the file system knows it."""
        if path.startswith(self.base):
            return cast(str, self._base + path[len(self.base) :])
        return cast(str, self._fs._strip_protocol(path))

    def _call(self, method: Callable[..., Any], path: str, **options: Any) -> Any:
        try:
            return method(self._inner(path), **options)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from None
        except Exception as error:  # every store has exceptions of its own
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def _version(entry: dict[str, Any]) -> int:
    """A number that changes whenever an object is written."""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    value = next((entry[key] for key in keys if entry.get(key)), "")
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=7).digest(), "big")


Files = Local | Remote


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of `path`, which holds the old content or all of the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # others may write, too
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # gone by now, or nothing can be removed from its folder
            partial.unlink()


def open_files(root: str, base: str) -> Files:
    """The place where `root` lies; `base` is the folder that names are relative to."""
    return Remote(root, base) if is_remote(root) else Local(base)


def is_remote(path: str) -> bool:
    return "://" in path


class RangeFile(io.RawIOBase):
    """A file of `size` bytes, of which `read(start, end)` fetches what is asked for."""

    mode = "rb"

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        data = self._read(self._position, end) if self._position < end else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:  # at once: a request takes long
        return self.read(max(0, self._size - self._position))
