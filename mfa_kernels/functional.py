"""Log-densities without a module."""

from mfa_kernels.mixture.functional import PRECISIONS, log_prob

__all__ = ["PRECISIONS", "log_prob"]
