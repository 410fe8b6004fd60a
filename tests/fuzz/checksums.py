"""Mutations of files that have checksums, which are right afterwards: else little but their checks would be tried."""

import io
import itertools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

Change = Callable[[bytes], bytes]
Mutate = Callable[[bytes, Change], bytes]
"""From a file and what changes any bytes."""


def none(data: bytes, change: Change) -> bytes:
    return change(data)


def png(data: bytes, change: Change) -> bytes:
    made = bytearray(change(data))
    start = 8
    while made[:4] == b"\x89PNG" and start + 12 <= len(made):
        end = start + 8 + int.from_bytes(made[start : start + 4], "big")
        if end + 4 <= len(made):
            made[end : end + 4] = zlib.crc32(made[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    return bytes(made)


def tar(data: bytes, change: Change) -> bytes:
    made = bytearray(change(data))
    for start in range(0, len(made) - 511, 512):
        if made[start + 257 : start + 262] == b"ustar":
            sums = tarfile.calc_chksums(made[start : start + 512])  # type: ignore[attr-defined]
            made[start + 148 : start + 156] = b"%06o\0 " % sums[0]
    return bytes(made)


def tfrecord(data: bytes, change: Change) -> bytes:
    made = bytearray(change(data))
    start = 0
    while start + 12 <= len(made):
        made[start + 8 : start + 12] = struct.pack("<I", masked_crc32c(bytes(made[start : start + 8])))
        start += 16 + int.from_bytes(made[start : start + 8], "little")
    return bytes(made)


def zip(data: bytes, change: Change) -> bytes:
    """Changes the content of one of the files in it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = {name: old.read(name) for name in old.namelist()}
    except Exception:  # a damaged one makes zipfile raise nearly anything
        return change(data)
    name = next(itertools.islice(members, zlib.crc32(data) % max(1, len(members)), None), "")
    members[name] = change(members.get(name, b""))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            new.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()
