"""Knowing whether it learned: retrieval, kNN and a linear probe, each beside the random network."""

from mcl.evaluation.scoring import check_evaluations, describe, evaluate, score

__all__ = ["check_evaluations", "describe", "evaluate", "score"]
