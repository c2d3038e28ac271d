"""The fused operations, one folder each: derivation, oracle, backends, registration as ``torch.ops.mfa_kernels.*``.

woodbury  stage 0   parameters -> whitened rows, Cholesky factors, log-determinants
scan      stage 1   tokens x components -> log p(x) and the active pairs
pairs     stage 2   latents, decoding and gradients, on the active pairs alone
screen              bounds that spare stage 1 most of its logits
kmeans              the nearest centroid of every row, and sums by cluster
intervene           hidden states steered: gates, interpolation, offsets and norms in one pass
statistics          the sums that EM's M-step needs, over the active pairs
m_step              means and loadings in closed form from these sums
"""

from typing import TYPE_CHECKING

from mfa_kernels.common.moved import renamed
from mfa_kernels.ops.pairs.op import decode, latents
from mfa_kernels.ops.scan.op import component_log_prob, log_prob
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.op import factorize
from mfa_kernels.ops.woodbury.types import Woodbury

__all__ = ["ActivePairs", "Woodbury", "component_log_prob", "decode", "factorize", "latents", "log_prob"]

if not TYPE_CHECKING:
    __getattr__ = renamed(__name__, Active="ActivePairs", Factors="Woodbury")
