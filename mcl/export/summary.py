"""What an export did."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mapped:
    """One tensor of the file."""

    part: str
    ours: str
    """Name in the checkpoint."""
    theirs: str
    """Name in the file."""
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Verified:
    """What loading into the target's own model has shown."""

    library: str
    """Name and version."""
    difference: float
    """Largest absolute difference of a feature between the two models on one image, relative to the largest feature of
    its map."""
    fresh: tuple[str, ...]
    """The model's tensors beside the parts exported, which keep their initial values."""


@dataclass(frozen=True)
class Report:
    """What an export did; ``str()`` of it is meant for the console."""

    path: Path
    """The file written."""
    metadata: Mapping[str, Any]
    """Stored in the file, too."""
    mapped: tuple[Mapped, ...]
    """Tensors written, in the order of the file."""
    unmapped: tuple[str, ...]
    """Names of the checkpoint's other tensors."""
    verified: Verified | None
    """None if it was not asked for."""

    def __str__(self) -> str:
        about, verified = self.metadata, self.verified
        lines = [
            f"wrote     {self.path}",
            f"          {about['network']} network at step {about['step']}: {about['backbone']}, "
            f"width {about['width']}, {about['head_convs']} head convolutions",
            f"{'part':<9} {'tensors':>7} {'values':>11} {'dtype':<8} e.g.",
            *(self._row(part) for part in about["parts"]),
            f"left      {_counts(self.unmapped)}",
        ]
        if verified is None:
            lines.append("verified  no; --verify loads it into the library's own model and compares")
        else:
            lines.append(
                f"verified  in {verified.library}: no key missing or unexpected, features differ by at most "
                f"{verified.difference:g}"
            )
            lines.append(f"fresh     {_counts(verified.fresh)}")
        return "\n".join(lines)

    def _row(self, part: str) -> str:
        tensors = [m for m in self.mapped if m.part == part]
        values = sum(math.prod(m.shape) for m in tensors)
        kinds = ", ".join(sorted({m.dtype for m in tensors} - {"int64"}))  # counts of batches
        first = tensors[0]
        return (
            f"{part:<9} {len(tensors):>7} {values:>11,} {kinds:<8} {first.ours} -> {first.theirs} {list(first.shape)}"
        )


def _counts(names: tuple[str, ...]) -> str:
    """How many of the names begin with the same two words."""
    counts = Counter(".".join([word for word in name.split(".")[:-1] if not word.isdigit()][:2]) for name in names)
    return ", ".join(f"{beginning} {count}" for beginning, count in counts.items()) or "nothing"
