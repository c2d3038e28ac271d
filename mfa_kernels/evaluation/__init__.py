"""Evaluation of a mixture on activations, the codes that it gives them, and features to interchange."""

from mfa_kernels.evaluation.featurizer import MFAFeaturizer
from mfa_kernels.evaluation.localization import Localization, localize
from mfa_kernels.evaluation.reconstruction import Evaluation, evaluate, score_table
from mfa_kernels.evaluation.site import Site

__all__ = ["Evaluation", "Localization", "MFAFeaturizer", "Site", "evaluate", "localize", "score_table"]
