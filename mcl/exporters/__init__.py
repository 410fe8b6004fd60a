"""Weights to and from other libraries."""

from mcl.exporters.convert import TARGETS, export
from mcl.exporters.summary import Report

__all__ = ["TARGETS", "Report", "export"]
