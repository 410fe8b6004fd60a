"""Weights to and from other libraries: ``TARGETS`` holds what ``mcl export --to`` offers."""

from collections.abc import Callable
from pathlib import Path

from mcl.export import torchvision
from mcl.export.common import Report

TARGETS: dict[str, Callable[[Path, Path | None], Report]] = {"torchvision": torchvision.export_file}
"""Name of a library to the function that writes a checkpoint for it: (checkpoint, output or None) to a report."""

__all__ = ["TARGETS", "Report"]
