"""Compact storage for millions of file names and other texts."""

import dataclasses
import itertools
import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, overload

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

_CODEC = ("utf-8", "surrogatepass")  # keeps any str, including file names that are not UTF-8
_MANY = 1 << 14


def spread(starts: Int64s, counts: Int64s) -> Int64s:
    """Concatenated ranges, (counts.sum(),): counts[i] consecutive numbers from starts[i] on."""
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """n texts in two arrays, which take a third of the memory of a list and can be shared by processes.

    With a `folder`, items are paths: the folder joined with each text, unless the text is an absolute path or a URL.
    """

    content: npt.NDArray[np.uint8]
    offsets: Int64s  # (n + 1,) where each text starts in the content, and the end of the last
    folder: str | None = None

    @classmethod
    def of(cls, texts: Iterable[str], folder: str | None = None) -> Self:
        content, offsets = bytearray(), array("q", [0])
        for text in texts:
            content += text.encode(*_CODEC)
            offsets.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.frombuffer(offsets, np.int64), folder)

    @classmethod
    def concatenate(cls, parts: Sequence["Names"]) -> Self:
        """Concatenates texts, without their folders."""
        lengths = [np.diff(part.offsets) for part in parts]
        content = np.concatenate([part.content for part in parts])
        return cls(content, np.append(0, np.cumsum(np.concatenate(lengths))))

    def take(self, rows: Int64s) -> Self:
        """The texts with the given numbers, in the given order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.append(0, np.cumsum(lengths))
        content = np.empty(offsets[-1], np.uint8)
        for i in range(0, len(rows), _MANY):  # in parts, since `places` takes eight times the memory of its bytes
            part = slice(i, i + _MANY)
            places = spread(self.offsets[rows[part]], lengths[part])
            content[offsets[i] : offsets[i] + len(places)] = self.content[places]
        return dataclasses.replace(self, content=content, offsets=offsets)

    def same(self, other: "Names") -> bool:
        """Whether the texts are the same, regardless of folders."""
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.content, other.content)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        for i in range(0, len(self), _MANY):
            yield from self._texts(i, min(i + _MANY, len(self)))

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[str, ...]: ...
    def __getitem__(self, i: int | slice) -> str | tuple[str, ...]:
        if isinstance(i, slice):
            rows = range(*i.indices(len(self)))
            return tuple(self._texts(rows.start, rows.stop) if rows.step == 1 else map(self.__getitem__, rows))
        i = range(len(self))[operator.index(i)]
        return next(self._texts(i, i + 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    def _texts(self, start: int, stop: int) -> Iterator[str]:
        offsets = self.offsets[start : max(start, stop) + 1].tolist()
        content, first = self.content[offsets[0] : offsets[-1]].tobytes(), offsets[0]
        for begin, end in itertools.pairwise(offsets):
            text = content[begin - first : end - first].decode(*_CODEC)
            below = self.folder is not None and not text.startswith("/") and "://" not in text
            yield f"{self.folder}/{text}" if below else text
