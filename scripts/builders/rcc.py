"""Read Qt resource archives (``.rcc``) without Qt.

Layout, all integers big-endian: the magic ``qres``, then four 32-bit words (format version, and the byte offsets of
the node tree, of the data block and of the name block). A tree node is 14 bytes in version 1 and 22 bytes (a time
stamp is appended) in versions 2 and 3. Node 0 is the nameless root.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_COMPRESSED_ZLIB = 1
_DIRECTORY = 2
_COMPRESSED_ZSTD = 4


class RccError(ValueError):
    """The archive is damaged, or packed in a way that this reader does not support."""


class RccArchive:
    """One ``.rcc`` file held in memory; entries are addressed by their slash-separated path, without a leading slash.

    Raises ``OSError`` if the file cannot be read and ``RccError`` if it is not a Qt resource archive.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = path.read_bytes()
        if self._bytes[:4] != b"qres" or len(self._bytes) < 20:
            raise RccError(f"{path}: not a Qt resource archive (no 'qres' at the start)")
        version, self._tree, self._data, self._names = struct.unpack_from(">4I", self._bytes, 4)
        if version not in (1, 2, 3):
            raise RccError(f"{path}: Qt resource format version {version}; only 1, 2 and 3 are known")
        self._node_size = 14 if version == 1 else 22
        try:
            self._entries = dict(self._walk(0, ""))
        except (struct.error, UnicodeDecodeError, RecursionError) as error:
            raise RccError(f"{path}: damaged node tree ({error})") from error

    def names(self) -> list[str]:
        """Every entry's path, sorted."""
        return sorted(self._entries)

    def read(self, name: str) -> bytes:
        """The unpacked bytes of one entry; ``KeyError`` if it is absent, ``RccError`` if it cannot be unpacked."""
        flags, offset = self._entries[name]
        start = self._data + offset
        (length,) = struct.unpack_from(">I", self._bytes, start)
        payload = self._bytes[start + 4 : start + 4 + length]
        if len(payload) != length:
            raise RccError(f"{self._path}: {name} is cut short")
        if flags & _COMPRESSED_ZSTD:
            raise RccError(f"{self._path}: {name} is packed with zstd, which this reader does not unpack")
        if flags & _COMPRESSED_ZLIB:
            try:
                return zlib.decompress(payload[4:])  # the first 4 bytes hold the unpacked length
            except zlib.error as error:
                raise RccError(f"{self._path}: {name}: {error}") from error
        return payload

    def _walk(self, node: int, parent: str) -> Iterator[tuple[str, tuple[int, int]]]:
        at = self._tree + node * self._node_size
        name_offset, flags = struct.unpack_from(">IH", self._bytes, at)
        path = f"{parent}/{self._name(name_offset)}".lstrip("/") if node else ""
        if flags & _DIRECTORY:
            count, first = struct.unpack_from(">II", self._bytes, at + 6)
            for child in range(first, first + count):
                yield from self._walk(child, path)
        else:
            (data_offset,) = struct.unpack_from(">I", self._bytes, at + 10)
            yield path, (flags, data_offset)

    def _name(self, offset: int) -> str:
        at = self._names + offset
        (length,) = struct.unpack_from(">H", self._bytes, at)  # in UTF-16 code units; a 32-bit hash follows
        return self._bytes[at + 6 : at + 6 + 2 * length].decode("utf-16-be")
