"""Weights to and from other libraries."""

from mcl.export.convert import TARGETS, export
from mcl.export.summary import Report

__all__ = ["TARGETS", "Report", "export"]
