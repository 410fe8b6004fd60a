"""Weights to and from other libraries."""

from mcl.export.report import Report
from mcl.export.run import TARGETS, export

__all__ = ["TARGETS", "Report", "export"]
