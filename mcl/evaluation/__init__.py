"""Knowing whether it learned: retrieval, kNN and a linear probe, each beside the random network."""

from mcl.evaluation.run import EVALUATIONS, evaluate

__all__ = ["EVALUATIONS", "evaluate"]
