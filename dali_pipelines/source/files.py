"""Access to files on a disk, or in an object store through fsspec."""

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
"""Version (modification time or hash of an ETag) and size in bytes. A file whose stamp is the same has not changed."""

_HALF = 1 << 63  # stamps are kept in 64 bits

MISSING: Stamp = (-1, -1)
"""Stamp of a file that does not exist."""


class SourceError(ValueError):
    """Images that cannot be used; the message names the folder or file and the remedy."""


class Local:
    """Files on a disk; the methods are thread-safe.

    Args:
        base: folder to which names are relative, without a trailing slash.
    """

    local = True
    """Whether other libraries can open the paths."""
    threads = min(32, len(os.sched_getaffinity(0)) + 4)
    """Number of threads for reading many files: the default of ThreadPoolExecutor, for the cores of this process."""
    block = 1 << 16
    """Bytes fetched at a time when a whole shard is read."""

    def __init__(self, base: str) -> None:
        self.base = base

    def kind(self, path: str) -> Literal["file", "folder", ""]:
        """Kind of a path; "" if it does not exist."""
        return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else ""

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Sorted names of the files and of the folders in a folder, without names that start with a dot."""
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    (folders if _is_folder(entry) else files).append(entry.name)
        return sorted(files), sorted(folders)

    def glob(self, pattern: str) -> list[str]:
        """Sorted paths that match a pattern."""
        return sorted(glob.glob(pattern))

    def stamp(self, path: str) -> Stamp:
        """The stamp of a file; ``MISSING`` if it does not exist."""
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return MISSING
        except OSError:
            return -1, 0  # it exists; the error is reported when it is read
        return (status.st_mtime_ns + _HALF) % (2 * _HALF) - _HALF, status.st_size  # wraps dates outside 1678 .. 2262

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes `start` to `end` (default: the rest); fewer if the file ends earlier."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def open(self, path: str, size: int, block: int) -> BinaryIO:
        """Opens a file of `size` bytes; at least `block` bytes are fetched at a time."""
        return open(path, "rb", buffering=block)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        found = entry.is_dir()
    except OSError:  # a link to itself, for instance; the error is reported when it is read
        return False
    if found and entry.is_symlink():
        target, place = os.path.realpath(entry.path), os.path.realpath(os.path.dirname(entry.path))
        if os.path.commonpath([target, place]) == target:
            raise SourceError(f"{entry.path} is a link to a folder that it lies in; remove it")
    return found


class Remote:
    """Files in an object store, or in any other place that fsspec reads; the methods are those of :class:`Local`.

    Raises:
        SourceError: the protocol is unknown, or its package is not installed.
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
        self._base = inner.rstrip("/").removesuffix(root[len(base) :])  # the file system's own path of `base`
        self._fs.invalidate_cache()  # fsspec caches file systems and their listings in the process
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
        """The file system's own form of a path."""
        if path.startswith(self.base):
            return cast(str, self._base + path[len(self.base) :])
        return cast(str, self._fs._strip_protocol(path))

    def _call(self, method: Callable[..., Any], path: str, **options: Any) -> Any:
        try:
            return method(self._inner(path), **options)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from None
        except Exception as error:  # every store has its own exceptions
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}", path) from error


def _version(entry: dict[str, Any]) -> int:
    """A number that changes whenever an object is written."""
    keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    value = next((entry[key] for key in keys if entry.get(key)), "")
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=7).digest(), "big")


Files = Local | Remote


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when it has been written; `path` never has partial content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # another process may write, too
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # already renamed, or the folder is read-only
            partial.unlink()


def open_files(root: str, base: str) -> Files:
    """Access to the files of `root`; `base` is the folder to which names are relative."""
    return Remote(root, base) if is_remote(root) else Local(base)


def is_remote(path: str) -> bool:
    return "://" in path


class RangeFile(io.RawIOBase):
    """A file of `size` bytes; `read(start, end)` fetches a range of them."""

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

    def readall(self) -> bytes:  # in a single request
        return self.read(max(0, self._size - self._position))
