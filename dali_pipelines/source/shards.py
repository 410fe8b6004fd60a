"""Shards: files that hold many images. Each is read once from one end to the other, for where its images lie.

Nothing is ever extracted, so the names in a shard are labels and no paths.
"""

import functools
import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO

from PIL.ContainerIO import ContainerIO

from dali_pipelines.source.files import Files, SourceError
from dali_pipelines.source.headers import EXTENSIONS, Header, read_header
from dali_pipelines.source.index import Image

NAMES = {
    "webdataset": re.compile(r"\.tar$|\.tgz$|\.tar\.\w+$", re.IGNORECASE),
    "tfrecord": re.compile(r"\.tfrec(ord)?s?(\.gz)?$|-\d{5}-of-\d{5}(\.gz)?$", re.IGNORECASE),
}
"""File names taken for shards of each kind; compressed ones are then refused, with a reason."""

_COMPRESSED_NAME = re.compile(r"\.(tgz|gz|zst|xz|bz2|lz4|zip)$", re.IGNORECASE)
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh")  # gzip, zstd, xz, bzip2
_MAGIC = re.compile(r"[*?\[{]")
_MAX_SHARDS = 1_000_000
_DAMAGED = "the shard is cut short or damaged here: what follows cannot be read"


def is_pattern(path: str) -> bool:
    """Whether a path stands for many: a glob, or braces as WebDataset writes them."""
    return _MAGIC.search(path) is not None


def pattern_base(pattern: str) -> str:
    """The folder in front of a pattern's first component that is one."""
    return _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]


def expand_braces(pattern: str) -> list[str]:
    """``{0000..0146}`` and ``{a,b}`` written out, in that order.

    Raises:
        SourceError: other braces, or more than a million paths.
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
        SourceError: a shard that is not there or is compressed.
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
        f"{path} is compressed, so that no image in it can be read without all that lies before; decompress the shards "
        "(images in them are compressed already)"
    )


def scan_shard(files: Files, kind: str, path: str, size: int) -> list[Image]:
    """The images of a shard of `size` bytes, in its order.

    Raises:
        SourceError: not a shard of this kind, compressed, or unreadable.
    """
    try:
        with files.open(path, size, files.block) as file:
            if file.read(8).startswith(_COMPRESSED):
                raise _compressed(path)
            file.seek(0)
            return list((_tar_images if kind == "webdataset" else _tfrecord_images)(file, path, size))
    except OSError as error:
        raise SourceError(f"cannot read {path} ({error.strerror or error})") from error


def _header(file: IO[bytes], length: int) -> Header:
    return read_header(file) if length else "empty"


# -------------------------------------------------------------------------------------------------- WebDataset


@dataclass
class _Sample:
    """Members with the same name up to the first dot of the last component of their path."""

    images: list[Image] = field(default_factory=list)
    label: int = -1
    problem: str = ""

    def image(self) -> Image:
        problem = self.problem
        if len(self.images) > 1:
            problem = f"{len(self.images)} images in one sample; keep one of them"
        image = self.images[0]._replace(label=self.label)
        return image._replace(header=problem) if problem else image


def _tar_images(file: BinaryIO, path: str, size: int) -> Iterator[Image]:
    samples: dict[str, _Sample] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None and tar.offset > end:  # a forged size would lead back
                tar.members.clear()  # type: ignore[attr-defined]  # they would be kept
                end = tar.offset
                _add_member(samples, member, file, size)
                if member.offset_data + member.size > size:
                    break
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if not end:
            raise SourceError(f"{path} is not a tar file ({error})") from None
    if not end:
        raise SourceError(f"{path} is a tar file with nothing in it; make it anew or remove it")
    yield from (sample.image() for sample in samples.values() if sample.images)
    file.seek(end)
    if end < size and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        yield Image(f"byte {end}", end, 0, -1, _DAMAGED)


def _add_member(samples: dict[str, _Sample], member: tarfile.TarInfo, file: BinaryIO, size: int) -> None:
    folder, name = posixpath.split(member.name)
    stem, _, extension = name.partition(".")
    extension = f".{extension.lower()}"
    if not stem or extension not in (*EXTENSIONS, ".cls"):
        return
    sample = samples.setdefault(posixpath.join(folder, stem), _Sample())
    if member.offset_data + member.size > size:
        sample.problem = "the shard is cut short: it ends within this sample"
    elif not member.isreg() or member.sparse:
        sample.problem = "a link or sparse file in the tar; store the file itself"
    elif extension == ".cls":
        file.seek(member.offset_data)
        text = file.read(min(member.size, 64)).strip()
        if re.fullmatch(rb"-1|\d{1,18}", text):
            sample.label = int(text)
        else:
            sample.problem = f"its class {text.decode(errors='replace')!r} is not an integer"
    if extension != ".cls":
        header = sample.problem or _header(ContainerIO(file, member.offset_data, member.size), member.size)
        sample.images.append(Image(member.name, member.offset_data, member.size, -1, header))


# ---------------------------------------------------------------------------------------------------- TFRecord


_EXAMPLE = """
name: "example.proto" package: "tf" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "Int64List" field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: "Int64List" }
}
message_type {
  name: "Entry"
  field { name: "key" number: 1 type: TYPE_BYTES }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 type: TYPE_MESSAGE type_name: "Entry" label: LABEL_REPEATED }
}
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""
"""tf.train.Example, as far as it concerns images; a map is a list of entries."""


@functools.cache
def _example() -> Any:
    """The class of its messages."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()  # not the default one: TensorFlow has a tf.Example there
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


def _tfrecord_images(file: BinaryIO, path: str, size: int) -> Iterator[Image]:
    """A record is its length (8 bytes), a checksum of that (4), the data, and a checksum of them (4)."""
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
            yield Image(str(number), start, 0, -1, "the shard is cut short: it ends within this record")
            return
        yield _example_image(str(number), start + 12, file.read(end - start - 16))
        start, number = end, number + 1
    if not number:
        raise SourceError(f"{path} is empty; make it anew or remove it")


def _example_image(name: str, start: int, record: bytes) -> Image:
    """The image of a tf.train.Example that lies at `start`."""
    from google.protobuf.message import DecodeError

    try:
        features = {entry.key: entry.value for entry in _example().FromString(record).features.feature}
    except DecodeError:
        return Image(name, start, 0, -1, "not a tf.train.Example")
    encoded = features[b"image/encoded"].bytes_list.value if b"image/encoded" in features else []
    labels = features[b"image/class/label"].int64_list.value if b"image/class/label" in features else []
    label = labels[0] if labels else -1
    if len(encoded) != 1:
        return Image(name, start, 0, label, f"{len(encoded)} values of image/encoded in the record, where 1 belongs")
    header = _header(io.BytesIO(encoded[0]), len(encoded[0])) if label >= -1 else f"its class {label} is negative"
    return Image(name, start + record.index(encoded[0]), len(encoded[0]), max(label, -1), header)


def _masked_crc32c(data: bytes) -> int:
    """Castagnoli's checksum, rotated and shifted as TFRecord stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
