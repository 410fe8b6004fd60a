"""Cost of a configuration: ``mcl budget CONFIG``."""

from mcl.budget.cost import budget

__all__ = ["budget"]
