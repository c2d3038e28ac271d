"""Evaluation of a mixture on activations, and the codes that it gives them."""

from mfa_kernels.evaluation.reconstruction import Evaluation, evaluate, score_table

__all__ = ["Evaluation", "evaluate", "score_table"]
