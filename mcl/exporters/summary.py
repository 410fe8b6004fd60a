"""The report of an export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mcl.exporters.canonical import beginnings


@dataclass(frozen=True)
class Verified:
    """Result of loading an export into the target's own models."""

    library: str
    """Name and version."""
    models: tuple[str, ...]
    """Classes of the models that loaded the weights."""
    difference: float
    """Largest absolute difference between their features and mcl's on one image, relative to the largest feature of the
    map."""
    fresh: tuple[str, ...]
    """Names of the models' other tensors, which keep their initial values."""


@dataclass(frozen=True)
class Report:
    """Summary of an export; ``str()`` formats it for the console."""

    path: Path
    """The file or folder written."""
    metadata: Mapping[str, Any]
    """Metadata, which the file also has."""
    weights: Mapping[str, Tensor]
    """Tensors written, by the target's names, in the order of the file."""
    names: Mapping[str, str]
    """The target's names, by the checkpoint's names."""
    unmapped: tuple[str, ...]
    """Names of the checkpoint's tensors that were not exported."""
    usage: str
    """Lines of code or configuration that load the export."""
    verified: Verified | None
    """Result of the verification; None if there was none."""

    def __str__(self) -> str:
        about, verified = self.metadata, self.verified
        lines = [
            f"wrote     {self.path}",
            f"          {about['network']} network at step {about['step']}: {about['backbone']}, "
            f"width {about['width']}, {about['head_convs']} head convolutions",
            f"{'part':<9} {'tensors':>7} {'values':>11} {'dtype':<8} e.g.",
            *(self._row(part) for part in about["parts"]),
            f"left out  {beginnings(self.unmapped)}",
            f"norms     BatchNorm's statistics: {about['statistics']}",
        ]
        if verified is None:
            lines.append("verified  no; --verify loads the export into the library's own model and compares features")
        else:
            lines.append(
                f"verified  in {verified.library} ({', '.join(verified.models)}): no key missing or unexpected, "
                f"features differ by at most {verified.difference:g}"
            )
            lines.append(f"fresh     {beginnings(verified.fresh)}")
        lines += ["", self.usage]
        return "\n".join(lines)

    def _row(self, part: str) -> str:
        names = {ours: theirs for ours, theirs in self.names.items() if part in ours.split(".")[:2]}
        tensors = [self.weights[theirs] for theirs in names.values()]
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()})
        ours, theirs = next(iter(names.items()))
        return (
            f"{part:<9} {len(tensors):>7} {sum(t.numel() for t in tensors):>11,} {', '.join(kinds):<8} "
            f"{ours} -> {theirs} {list(tensors[0].shape)}"
        )
