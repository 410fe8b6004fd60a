"""Knowing whether it learned: retrieval, kNN and a linear probe, each beside the random network."""

from mcl.evaluation.run import EVALUATIONS, check_evaluations, evaluate

__all__ = ["EVALUATIONS", "check_evaluations", "evaluate"]
