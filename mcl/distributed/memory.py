"""Results that the processes of a machine share: the memory of one of them, mapped by the others."""

import mmap
import os
import pickle
import uuid
from typing import Any, NamedTuple

_ALIGNMENT = 64  # bytes


class Offer(NamedTuple):
    """Where a process keeps a pickled value for the others of its machine."""

    path: str
    link: str  # what the path is a link to, on this machine and in no other container
    spans: list[tuple[int, int]]  # of the pickle, then of every array in it

    def here(self) -> bool:
        """Whether this process can read it."""
        try:
            return os.readlink(self.path) == self.link
        except OSError:
            return False

    def take(self) -> Any:
        """The value; its arrays lie in the shared memory, and what is written to them stays in this process."""
        with open(self.path, "rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        value, *arrays = (whole[start:end] for start, end in self.spans)
        return pickle.loads(value, buffers=arrays)


def offer(value: Any) -> tuple[Offer, int]:
    """Writes a value into memory that the system frees when nobody uses it any more; the descriptor keeps it, too."""
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
