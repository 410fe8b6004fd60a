"""Opens sources: finds images and their sizes, and reads them."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from dali_pipelines.settings import DataConfig
from dali_pipelines.source import listings, shards
from dali_pipelines.source.decoding import recode
from dali_pipelines.source.files import MISSING, Files, SourceError, is_remote, open_files
from dali_pipelines.source.headers import EXTENSIONS, read_header
from dali_pipelines.source.index import Image, Index, Progress
from dali_pipelines.source.names import Int64s, Names

Kind = Literal["auto", "folders", "flat", "list", "coco", "webdataset", "tfrecord"]
SHARDS = ("webdataset", "tfrecord")

CHUNK = 64  # files that a thread reads at a time
_HEADER = 1 << 14  # bytes of a file fetched at a time for its header
_MANY = 1 << 14  # names in memory at a time
_MOST_CLASSES = 100_000  # larger integers are names, such as dates, and not class numbers


@dataclass(frozen=True)
class Source:
    """n images: names, classes, sizes and bytes."""

    root: str
    kind: str  # never auto
    names: Sequence[str]  # (n) path of the file, or path of the shard, a slash and the name of the member
    labels: npt.NDArray[np.int64]  # (n,) class, -1 unknown
    sizes: npt.NDArray[np.int32]  # (n, 2) width, height, pixels as stored; 0, 0 for a bad image
    base: str  # folder that digest() removes from names
    read: Callable[[int], bytes] = field(repr=False)
    """Returns the bytes of an image; thread-safe. Raises an OSError with the reason if the image cannot be read."""
    classes: tuple[str, ...] = ()
    bad: dict[int, str] = field(default_factory=dict)  # found by reading headers: index -> reason
    by_pillow: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """(n,) images that DALI cannot decode, or decodes wrongly."""
    paths: Sequence[str] | None = None
    """Paths of local files, which any library can open; None if images must be read with `read`."""

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, i: int) -> bytes:
        """Image i in a form that all engines decode to the same pixels: its bytes, or a PPM of Pillow's pixels.

        Raises:
            OSError: the image cannot be read, or Pillow cannot decode it.
        """
        return recode(self.read(i)) if self.by_pillow[i] else self.read(i)

    def check_size(self, i: int, size: tuple[int, int]) -> None:
        """Compares the width and height of decoded image i with those of its header, which plans use.

        Raises:
            OSError: they differ.
        """
        if size != (planned := tuple(self.sizes[i].tolist())):
            now, then = ("{} x {}".format(*pair) for pair in (size, planned))
            raise OSError(f"it has changed since its header was read: {now} pixels now, {then} then")

    def digest(self) -> str:
        """Hash of the names below the root, in order. Sources with equal digests have the same images in one order."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        prefix, whole = self.base.rstrip("/") + "/", hashlib.sha256()
        for i in range(0, len(self), _MANY):
            part = "\n".join(name.removeprefix(prefix) for name in self.names[i : i + _MANY])
            whole.update(("\n" * (i > 0) + part).encode("utf-8", "surrogateescape"))
        return whole.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        self.digest()  # so that processes that unpickle it need not compute it
        return self.__dict__

    def fingerprint(self) -> str:
        """Hash of everything that plans depend on: names, classes, sizes, and which images are bad."""
        whole = hashlib.sha256(self.digest().encode())
        for array in (self.labels, self.sizes, np.array(sorted(self.bad), np.int64)):
            whole.update(array.tobytes())
        return whole.hexdigest()


def open_images(data: DataConfig, held_out: bool = False, progress: Progress | None = None) -> Source:
    """The images of ``data.root`` or ``data.val_root``. A bar shows the progress of reading headers.

    Raises:
        SourceError: see :func:`open_source`.
    """
    kind = data.source
    if held_out and kind == "coco":  # val_root has no annotations, which would only list its images
        kind = "flat"
    with tqdm(disable=None, delay=1, leave=False, unit=" files", desc="reading headers") as bar:

        def show(done: int, of: int, images: int) -> None:
            bar.total = of
            bar.update(done - bar.n)
            if progress is not None:
                progress(done, of, images)

        return open_source(
            data.val_root if held_out else data.root,
            kind,
            key="data.val_root" if held_out else "data.root",
            annotations="" if held_out else data.annotations,
            index=data.index,
            allow_outside=data.allow_outside,
            progress=show,
        )


def indexed_images(data: DataConfig) -> int:
    """Number of images that ``data.root`` had when it was last opened, read from its index; 0 if unknown."""
    kinds = get_args(Kind)[1:] if data.source == "auto" else (data.source,)
    indices = [Index(data.index, data.root, kind, data.annotations) for kind in kinds if data.root]
    present = [index for index in indices if os.path.exists(index.path)]
    return max(present, key=lambda index: os.path.getmtime(index.path)).images() if present else 0


def open_source(
    root: str,
    kind: Kind = "auto",
    *,
    threads: int = 0,
    key: str = "data.root",
    annotations: str = "",
    index: str = "",
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> Source:
    """Finds the images of `root` and their sizes. Sizes of unchanged files come from the index.

    Args:
        root: a folder, a list file, shards (a folder of shards, one shard, or a pattern); or a URL that fsspec reads.
        kind: kind of root. auto: with `annotations`, coco. A file is a shard if it is named like one, and otherwise a
            list. A folder is flat if it contains images directly; it holds shards if it contains shards and no folders;
            otherwise it has class folders.
        threads: number of threads that read files; 0: chosen by the number of cores, more for object stores.
        key: key of the configuration that errors name.
        annotations: COCO annotation file that lists the images of the folder.
        index: folder of index files; empty: the user's cache.
        allow_outside: whether lists and annotations may name files outside the folder.
        progress: called with the number of files read.

    Raises:
        SourceError: the root does not exist, has no images, or cannot be read.
    """
    try:
        return _open(root, kind, threads, annotations, index, allow_outside, progress)
    except OSError as error:
        raise SourceError(f"{key}: cannot read {error.filename or root} ({error.strerror or error})") from error
    except SourceError as error:
        raise SourceError(f"{key}: {error}") from error.__cause__


def _open(
    root: str, kind: str, threads: int, annotations: str, index: str, allow_outside: bool, progress: Progress | None
) -> Source:
    if not root:
        raise SourceError("not set; name a folder of images, a list file or shards")
    found = open_files(root, root).kind(root)
    if not found and not shards.is_pattern(root):
        raise SourceError(f"{root} does not exist")
    path = root.rstrip("/") or root if found == "folder" else root if is_remote(root) else os.path.abspath(root)
    base = path if found == "folder" else path.rpartition("/")[0] if found else shards.pattern_base(path)
    files = open_files(path, base)
    kind = _resolve(kind, root, found, files, annotations)
    place = Index(index, root, kind, annotations)
    if kind in SHARDS:
        return _open_shards(root, path, kind, files, place, threads, progress)

    threads = threads or files.threads
    if kind == "coco":
        names, classes = listings.coco(open_files(annotations, annotations), annotations, allow_outside)
    elif kind == "list":
        names, classes = listings.list_file(files, path, allow_outside)
    else:
        names, classes = listings.folders(files, kind == "flat", threads)
    if not names:
        raise SourceError(f"no images in {root} (looked for {', '.join(EXTENSIONS)}; data.source={kind})")

    def scan(path: str, size: int) -> list[Image]:
        with files.open(path, size, _HEADER) as file:
            return [Image("", 0, size, -1, read_header(file))]

    paths = dataclasses.replace(names, folder=base)
    stamps = stamps_of(files, paths, threads)
    table = place.update(paths, stamps, scan, threads=threads, chunk=CHUNK, progress=progress)
    labels, numbered = _number(classes)
    return Source(
        root=root,
        kind=kind,
        names=paths,
        labels=labels,
        sizes=table.sizes,
        base=base,
        read=functools.partial(_read_file, files, paths),
        classes=numbered,
        bad=table.bad,
        by_pillow=table.by_pillow,
        paths=paths if files.local else None,
    )


def _open_shards(
    root: str, path: str, kind: str, files: Files, place: Index, threads: int, progress: Progress | None
) -> Source:
    paths = Names.of(shards.find_shards(files, path, kind), files.base)
    threads = threads or min(8, files.threads)  # each reads a whole shard
    stamps = stamps_of(files, paths, threads)
    if missing := np.flatnonzero((stamps == MISSING).all(1)).tolist():
        raise SourceError(f"{paths[missing[0]]} does not exist ({len(missing)} of {len(paths)} shards of {root})")
    scan = functools.partial(shards.scan_shard, files, kind)
    table = place.update(paths, stamps, scan, threads=threads, chunk=1, progress=progress)
    if not len(table.labels):
        raise SourceError(f"no images in the {len(paths)} shards of {root} (data.source={kind})")
    shard = np.repeat(np.arange(len(paths)), table.counts)
    labels, classes = _number_integers(table.labels)
    return Source(
        root=root,
        kind=kind,
        names=Names.of(f"{paths[i]}/{name}" for i, name in zip(shard.tolist(), table.names, strict=True)),
        labels=labels,
        sizes=table.sizes,
        base=files.base,
        read=functools.partial(_read_member, files, paths, shard, table.extents),
        classes=classes,
        bad=table.bad,
        by_pillow=table.by_pillow,
    )


# ``Source.read`` is a partial of one of these functions, which can be pickled for other processes.


def _read_file(files: Files, paths: Names, i: int) -> bytes:
    return files.read(paths[i])


def _read_member(files: Files, paths: Names, shard: Int64s, extents: Int64s, i: int) -> bytes:
    path, (offset, length) = paths[shard[i]], extents[i].tolist()
    data = files.read(path, offset, offset + length)
    if len(data) < length or not length:
        raise OSError(f"{path} is truncated or damaged: {len(data)} of {length} bytes at {offset}")
    return data


def _resolve(kind: str, root: str, found: str, files: Files, annotations: str) -> str:
    """The kind of a source; raises an error if root cannot be of that kind."""
    if kind == "auto":
        kind = _recognise(root, found, files, annotations)
    wanted = {"list": "file", "folders": "folder", "flat": "folder", "coco": "folder"}.get(kind, found)
    if found != wanted:
        raise SourceError(f"{root} is a {found or 'pattern'}, but data.source is {kind}")
    if kind == "coco" and not annotations:
        raise SourceError("data.annotations is not set; name the COCO annotation file of these images")
    if kind != "coco" and annotations:
        raise SourceError(f"data.annotations is set, but data.source is {kind}; only coco reads it")
    return kind


def _recognise(root: str, found: str, files: Files, annotations: str) -> str:
    if annotations:
        return "coco"
    if found == "folder":
        names, folders = files.entries(files.base)
        if any(map(listings.is_image, names)):
            return "flat"
        kinds = [kind for kind in SHARDS if any(map(shards.NAMES[kind].search, names))]
        if folders or not kinds:
            return "folders"
        if len(kinds) > 1:
            raise SourceError(f"{root} holds shards of several kinds; set data.source to one of {', '.join(kinds)}")
        return kinds[0]
    for kind in SHARDS:
        if shards.NAMES[kind].search(root):
            return kind
    if not found:
        raise SourceError(f"{root} does not tell the kind of its shards; set data.source to one of {', '.join(SHARDS)}")
    return "list"


def stamps_of(files: Files, paths: Sequence[str], threads: int) -> Int64s:
    """(f, 2) stamps of all files, which tell whether a file has changed."""
    starts = range(0, len(paths), CHUNK)
    with ThreadPoolExecutor(threads) as pool:
        stamps = pool.map(lambda i: np.array(list(map(files.stamp, paths[i : i + CHUNK])), np.int64), starts)
        bar = tqdm(stamps, "checking", len(starts), unit=" files", unit_scale=CHUNK, disable=None, delay=1, leave=False)
        return np.concatenate([np.zeros((0, 2), np.int64), *bar])


def _number(names: Sequence[str]) -> tuple[Int64s, tuple[str, ...]]:
    """Class numbers and names. If all names are integers, these are the numbers; otherwise names are numbered in sorted
    order. "" is unknown, -1."""
    known = sorted(set(names) - {""})
    if known and all(name.isdecimal() and len(name) < 19 for name in known):
        return _number_integers(np.fromiter((int(name or -1) for name in names), np.int64, len(names)))
    number = {name: i for i, name in enumerate(known)} | {"": -1}
    return np.fromiter(map(number.__getitem__, names), np.int64, len(names)), tuple(known)


def _number_integers(labels: Int64s) -> tuple[Int64s, tuple[str, ...]]:
    if (most := labels.max(initial=-1)) < _MOST_CLASSES:
        return labels, tuple(map(str, range(most + 1)))
    known = np.unique(labels[labels >= 0])
    return np.where(labels < 0, -1, np.searchsorted(known, labels)), tuple(map(str, known.tolist()))
