"""Shards: files that hold many images. Each shard is read once as a whole, to find the positions of its images.

Nothing is extracted to disk, so names in a shard are never used as paths.
"""

import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, BinaryIO

from PIL.ContainerIO import ContainerIO

from dali_pipelines.source.files import Files, SourceError
from dali_pipelines.source.headers import EXTENSIONS, Header, read_header
from dali_pipelines.source.index import Image

_Span = tuple[int, int]  # first byte, and the byte after the last

NAMES = {
    "webdataset": re.compile(r"\.tar$|\.tgz$|\.tar\.\w+$", re.IGNORECASE),
    "tfrecord": re.compile(r"\.tfrec(ord)?s?(\.gz)?$|-\d{5}-of-\d{5}(\.gz)?$", re.IGNORECASE),
}
"""File names of shards of each kind, including compressed ones, which are refused with a reason."""

_COMPRESSED_NAME = re.compile(r"\.(tgz|gz|zst|xz|bz2|lz4|zip)$", re.IGNORECASE)
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh")  # gzip, zstd, xz, bzip2
_MAGIC = re.compile(r"[*?\[{]")
_MAX_SHARDS = 1_000_000
_MISNAMED = "a sample's name ends at its first dot, and no field of this one is an image; rename it to have one dot"
_DAMAGED = "the shard is truncated or damaged here; the rest of it cannot be read"


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern: a glob, or braces in WebDataset's notation."""
    return _MAGIC.search(path) is not None


def pattern_base(pattern: str) -> str:
    """The folder in front of the first path component that contains a pattern."""
    return _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]


def expand_braces(pattern: str) -> list[str]:
    """Expands ``{0000..0146}`` and ``{a,b}``, in the order written.

    Raises:
        SourceError: the braces have another form, or stand for more than a million paths.
    """
    paths = [""]
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        values = _alternatives(part, pattern) if i % 2 else [part]
        if len(paths) * len(values) > _MAX_SHARDS:
            raise SourceError(f"{pattern} stands for more than {_MAX_SHARDS} shards")
        paths = [path + value for path in paths for value in values]
    return paths


def _alternatives(body: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", body)
    if numbers is None and "," not in body:
        raise SourceError(
            f"{pattern}: {{{body}}} is neither a range such as {{0000..0146}} nor a choice such as {{a,b}}"
        )
    if numbers is None:
        return body.split(",")
    first, last = map(int, numbers.groups())
    if abs(last - first) >= _MAX_SHARDS:
        raise SourceError(f"{pattern} stands for more than {_MAX_SHARDS} shards")
    step = 1 if first <= last else -1
    return [f"{i:0{len(numbers[1])}}" for i in range(first, last + step, step)]


def find_shards(files: Files, root: str, kind: str) -> list[str]:
    """Shards of a folder, a file or a pattern, relative to the base: sorted, or in the order of the braces.

    Raises:
        SourceError: a shard is compressed.
    """
    found = files.kind(root)
    if found == "folder":
        paths = [f"{files.base}/{name}" for name in files.entries(root)[0] if NAMES[kind].search(name)]
    elif found == "file":
        paths = [root]
    else:
        paths = [path for part in expand_braces(root) for path in (files.glob(part) if is_pattern(part) else [part])]
    for path in paths:
        if _COMPRESSED_NAME.search(path):
            raise _compressed(path)
    return [path[len(files.base) + 1 :] for path in paths]


def _compressed(path: str) -> SourceError:
    return SourceError(
        f"{path} is compressed, so that single images cannot be read from it; decompress the shards (their images are "
        "compressed already)"
    )


def scan_shard(files: Files, kind: str, path: str, size: int) -> list[Image]:
    """The images of a shard of `size` bytes, in order.

    Raises:
        SourceError: the file is not a shard of this kind, or is compressed, or cannot be read.
    """
    try:
        with files.open(path, size, files.block) as file:
            if file.read(8).startswith(_COMPRESSED):
                raise _compressed(path)
            file.seek(0)
            return list((_tar_images if kind == "webdataset" else _tfrecord_images)(file, path, size))
    except OSError as error:
        raise SourceError(f"cannot read {path} ({error.strerror or error})") from error


def _header(file: IO[bytes], length: int) -> Header | str:
    return read_header(file) if length else "empty"


# -------------------------------------------------------------------------------------------------- WebDataset


@dataclass
class _Sample:
    """Members of a tar file whose paths are equal up to the first dot in the last component."""

    found: list[Image] = field(default_factory=list)
    label: int = -1
    problem: str = ""
    misnamed: Image | None = None
    """The first member with an image's extension but another dot before it, which is not an image for WebDataset."""

    def image(self) -> Image | None:
        problem = self.problem
        if not self.found:
            return self.misnamed
        if len(self.found) > 1:
            problem = f"{len(self.found)} images in one sample; keep one of them"
        image = self.found[0]._replace(label=self.label)
        return image._replace(header=problem) if problem else image


def _tar_images(file: BinaryIO, path: str, size: int) -> Iterator[Image]:
    """The images of a tar file, or of several that were concatenated with `cat`; each ends with blocks of zeros."""
    start = end = 0
    while start < size or not end:
        samples: dict[str, _Sample] = {}
        try:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None and tar.offset > end:  # a forged size could lead back
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all in memory
                    end = tar.offset
                    _add_member(samples, member, file, size)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            if not end:
                raise SourceError(f"{path} is not a tar file ({error})") from None
        yield from filter(None, (sample.image() for sample in samples.values()))
        if not end:
            raise SourceError(f"{path} is an empty tar file; create it again or remove it")
        behind = _skip_zeros(file, end)
        if behind == end < size:
            yield Image(f"byte {behind}", behind, 0, -1, _DAMAGED)
            return
        start = end = behind


def _skip_zeros(file: BinaryIO, start: int) -> int:
    """Position of the first block at or after `start` that is not all zeros; `start` is the position of a block."""
    file.seek(start)
    while blocks := file.read(1 << 20):
        if rest := blocks.lstrip(b"\0"):
            return start + (len(blocks) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        start += len(blocks)
    return start


def _add_member(samples: dict[str, _Sample], member: tarfile.TarInfo, file: BinaryIO, size: int) -> None:
    folder, name = posixpath.split(member.name)
    stem, _, extension = name.partition(".")
    extension = f".{extension.lower()}"
    if not stem or member.isdir() or not extension.endswith((*EXTENSIONS, ".cls")):
        return
    sample = samples.setdefault(posixpath.join(folder, stem), _Sample())
    if extension not in (*EXTENSIONS, ".cls"):
        if sample.misnamed is None and extension.endswith(EXTENSIONS):
            sample.misnamed = Image(member.name, member.offset_data, member.size, -1, _MISNAMED)
        return
    if not member.isreg() or member.sparse:
        sample.problem = "a link or sparse file in the tar; store the file itself"
    elif member.offset_data + member.size > size:
        sample.problem = "the shard is truncated: it ends within this sample"
    elif extension == ".cls":
        file.seek(member.offset_data)
        text = file.read(min(member.size, 64)).strip()
        if re.fullmatch(rb"-1|\d{1,18}", text):
            sample.label = int(text)
        else:
            sample.problem = f"its class {text.decode(errors='replace')!r} is not an integer"
    if extension != ".cls":
        header = sample.problem or _header(ContainerIO(file, member.offset_data, member.size), member.size)
        sample.found.append(Image(member.name, member.offset_data, member.size, -1, header))


# ---------------------------------------------------------------------------------------------------- TFRecord


def _tfrecord_images(file: BinaryIO, path: str, size: int) -> Iterator[Image]:
    """The images of a TFRecord file. A record is its length (8 bytes), a checksum (4), the data, and a checksum (4)."""
    start, number = 0, 0
    while start < size:
        file.seek(start)
        frame = file.read(12)
        end = start + 16 + int.from_bytes(frame[:8], "little")
        if len(frame) == 12 and _masked_crc32c(frame[:8]) != int.from_bytes(frame[8:], "little"):
            if not number:
                raise SourceError(f"{path} is not a TFRecord file")
            yield Image(str(number), start, 0, -1, _DAMAGED)
            return
        if len(frame) < 12 or end > size:
            yield Image(str(number), start, 0, -1, "the shard is truncated: it ends within this record")
            return
        yield _example_image(file, str(number), (start + 12, end - 4))
        start, number = end, number + 1
    if not number:
        raise SourceError(f"{path} is empty; create it again or remove it")


def _example_image(file: BinaryIO, name: str, record: _Span) -> Image:
    """The image of a tf.train.Example: {1: Features {1: entries {1: name, 2: Feature {1: bytes, 3: integers}}}}."""
    found: list[_Span] = []
    label = -1
    try:
        for entry in _spans(file, record, 1, 1):
            key = b"".join(_bytes(file, span) for span in _spans(file, entry, 1))
            if key == b"image/encoded":
                found = list(_spans(file, entry, 2, 1, 1))
            elif key == b"image/class/label":
                for integers in _spans(file, entry, 2, 3):
                    label = next(_integers(file, integers), -1)
    except ValueError:
        return Image(name, record[0], 0, -1, "not a tf.train.Example")
    if len(found) != 1:
        return Image(name, record[0], 0, label, f"{len(found)} values of image/encoded in the record, instead of 1")
    ((start, end),) = found
    header = (
        _header(ContainerIO(file, start, end - start), end - start) if label >= -1 else f"its class {label} is negative"
    )
    return Image(name, start, end - start, max(label, -1), header)


def _fields(file: BinaryIO, message: _Span) -> Iterator[tuple[int, int | _Span]]:
    """Field numbers and values of a protobuf message: integers, or positions of bytes. Skips fixed-size fields."""
    position, end = message
    while position < end:
        tag, position = _varint(file, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _varint(file, position)
            yield number, value
        elif wire_type == 2:
            length, position = _varint(file, position)
            yield number, (position, position + length)
            position += length
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position > end:
            raise ValueError("a field extends beyond its message")


def _spans(file: BinaryIO, message: _Span, number: int, *path: int) -> Iterator[_Span]:
    """Positions of the fields at a path of field numbers."""
    for found, value in _fields(file, message):
        if found == number and isinstance(value, tuple):
            yield from _spans(file, value, *path) if path else (value,)


def _integers(file: BinaryIO, message: _Span) -> Iterator[int]:
    """The values of an Int64List, packed or not."""
    for number, value in _fields(file, message):
        if number == 1:
            position, end = value if isinstance(value, tuple) else (0, 0)
            values = [] if isinstance(value, tuple) else [value]
            while position < end:
                integer, position = _varint(file, position)
                values.append(integer)
            yield from (v - (1 << 64) if v >> 63 else v for v in values)


def _varint(file: BinaryIO, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    file.seek(position)
    value = 0
    for i, byte in enumerate(file.read(10)):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value & (1 << 64) - 1, position + i + 1
    raise ValueError("a number of more than 64 bits")


def _bytes(file: BinaryIO, span: _Span) -> bytes:
    file.seek(span[0])
    return file.read(min(span[1] - span[0], 64))  # longer than any name that is looked for


def _masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), masked as in TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
