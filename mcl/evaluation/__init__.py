"""Evaluations of representations: retrieval, kNN, linear probe and others, each compared with a random network."""

from mcl.evaluation.scoring import check_evaluations, describe, evaluate, score

__all__ = ["check_evaluations", "describe", "evaluate", "score"]
