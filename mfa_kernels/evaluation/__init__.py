"""Evaluation of a mixture on activations, the codes that it gives them, and features to interchange."""

from mfa_kernels.evaluation.featurizer import MFAFeaturizer
from mfa_kernels.evaluation.localization import Localization, localize
from mfa_kernels.evaluation.reconstruction import Evaluation, evaluate, score_table

__all__ = ["Evaluation", "Localization", "MFAFeaturizer", "evaluate", "localize", "score_table"]
