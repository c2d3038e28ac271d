"""Evaluation of a mixture on activations, the codes that it gives them, and features to interchange."""

from mfa_kernels.evaluation.featurizer import MFAFeaturizer
from mfa_kernels.evaluation.reconstruction import Evaluation, evaluate, score_table

__all__ = ["Evaluation", "MFAFeaturizer", "evaluate", "score_table"]
