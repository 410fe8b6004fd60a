"""Exports weights to other libraries, and imports the authors' checkpoints."""

from mcl.exporters.convert import TARGETS, export
from mcl.exporters.summary import Report

__all__ = ["TARGETS", "Report", "export"]
