"""Shares a value of one process with the other processes of its machine, which map its memory."""

import mmap
import os
import pickle
import uuid
from typing import Any, NamedTuple

_ALIGNMENT = 64  # bytes


class Offer(NamedTuple):
    """A pickled value in the memory of a process, for the other processes of its machine."""

    path: str
    link: str  # target of the link `path`, which differs on other machines and in other containers
    spans: list[tuple[int, int]]  # start and end of the pickle, then of every array in it

    def here(self) -> bool:
        """Whether this process can read the value."""
        try:
            return os.readlink(self.path) == self.link
        except OSError:
            return False

    def take(self) -> Any:
        """The value. Its arrays lie in the shared memory, copied on write."""
        with open(self.path, "rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        value, *arrays = (whole[start:end] for start, end in self.spans)
        return pickle.loads(value, buffers=arrays)


def offer(value: Any) -> tuple[Offer, int]:
    """Writes a value to shared memory, which is freed when its descriptor and all mappings are closed; returns both."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    name = uuid.uuid4().hex
    memory = os.memfd_create(name)
    spans = []
    with open(memory, "wb", closefd=False) as file:
        for content in (memoryview(pickled), *(array.raw() for array in arrays)):
            start = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            file.write(content)
            spans.append((start, file.tell()))
    return Offer(f"/proc/{os.getpid()}/fd/{memory}", f"/memfd:{name} (deleted)", spans), memory
