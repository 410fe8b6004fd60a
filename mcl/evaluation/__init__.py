"""Knowing whether it learned: retrieval, kNN and a linear probe, each beside the random network."""

from mcl.evaluation.scoring import check_evaluations, evaluate

__all__ = ["check_evaluations", "evaluate"]
