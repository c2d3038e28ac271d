"""How well a mixture describes activations, and what it makes of them."""

from mfa_kernels.evaluation.reconstruction import Evaluation, evaluate, score_table

__all__ = ["Evaluation", "evaluate", "score_table"]
