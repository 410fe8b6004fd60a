"""Mutations that keep the form of a file: checksums are corrected, and JSON stays JSON. Otherwise fuzzing would test
little more than the checks of the form."""

import io
import json as json_
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

Change = Callable[[bytes], bytes]
Mutate = Callable[[bytes, Change, Random], bytes]
"""A function of a file, a function that changes bytes, and a random generator; returns the mutated file."""


def none(data: bytes, change: Change, random: Random) -> bytes:
    return change(data)


def png(data: bytes, change: Change, random: Random) -> bytes:
    made = bytearray(change(data))
    start = 8
    while made[:4] == b"\x89PNG" and start + 12 <= len(made):
        end = start + 8 + int.from_bytes(made[start : start + 4], "big")
        if end + 4 <= len(made):
            made[end : end + 4] = zlib.crc32(made[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    return bytes(made)


def tar(data: bytes, change: Change, random: Random) -> bytes:
    made = bytearray(change(data))
    for start in range(0, len(made) - 511, 512):
        if made[start + 257 : start + 262] == b"ustar":
            sums = tarfile.calc_chksums(made[start : start + 512])  # type: ignore[attr-defined]
            made[start + 148 : start + 156] = b"%06o\0 " % sums[0]
    return bytes(made)


def tfrecord(data: bytes, change: Change, random: Random) -> bytes:
    made = bytearray(change(data))
    start = 0
    while start + 12 <= len(made):
        made[start + 8 : start + 12] = struct.pack("<I", masked_crc32c(bytes(made[start : start + 8])))
        start += 16 + int.from_bytes(made[start : start + 8], "little")
    return bytes(made)


def zip(data: bytes, change: Change, random: Random) -> bytes:
    """Changes the content of one of the files in an archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            members = {name: old.read(name) for name in old.namelist()}
    except Exception:  # zipfile raises many types of errors on damaged archives
        return change(data)
    name = random.choice([*members] or [""])
    members[name] = change(members.get(name, b""))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as new:
        for name, content in members.items():
            new.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 0.5, 1e300, float("nan"), float("inf"), 2**31, 2**63, 10**400, "x" * 5000),
    *("", "7", "a\0", "\ud800", "\udce9", "..", "\n", [], {}, [[]], [0, 0, 9, 9], [[0, 0, 9, 9, 0, 9]], {"id": 1}),
)


def json(data: bytes, change: Change, random: Random) -> bytes:
    """Removes, repeats or replaces a value."""
    try:
        content = json_.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict | list) or not content:
        return change(data)
    node = content
    while True:
        key = random.choice([*node] if isinstance(node, dict) else range(len(node)))
        if not (isinstance(node[key], dict | list) and node[key] and random.random() < 0.9):
            break
        node = node[key]
    how = random.randrange(8)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, list):
        node.insert(key, node[key])
    else:
        node[key] = random.choice(ODD)
    return json_.dumps(content).encode()
