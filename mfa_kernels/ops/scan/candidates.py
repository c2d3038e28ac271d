"""Stage 1 on given candidates registered: ``torch.ops.mfa_kernels.scan_candidates``, what a truncated E-step scans."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision
from mfa_kernels.ops.common import cpp, trust
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.scan import portable
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold
from mfa_kernels.ops.woodbury.types import Woodbury


class CandidatePairs(NamedTuple):
    """What a scan of candidates finds.

    Attributes:
        active: the active pairs, as if the candidates were all components: log_prob is a lower bound of log p(x).
        logits: of every candidate, (N, C); -inf where there is none, or the token has it twice.
    """

    active: ActivePairs
    logits: Tensor


def scan_candidates(
    x: Tensor, candidates: Tensor, woodbury: Woodbury, log_weights: Tensor, slots: int = SLOTS
) -> CandidatePairs:
    """Returns the logits of some components of each token, and the active pairs among them; without gradients.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the Woodbury terms.
        candidates: (N, C) int32, in any order; -1 is none, and what a token has twice counts once.
        woodbury: of the parameters.
        log_weights: (K,).
        slots: S, the most active components kept per token.
    """
    f = woodbury
    *active, logits = torch.ops.mfa_kernels.scan_candidates(
        x, candidates, f.rows, f.cholesky, f.scale, f.center, f.constants(log_weights), f.per_component, slots
    )
    return CandidatePairs(ActivePairs(*active), logits)


@operator(
    "scan_candidates",
    "-> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor of_candidates)",
    {
        "x": "any(N, D)", "candidates": "int32(N, C)", "rows": trust.ROWS, "cholesky": "real(K, R, R)",
        "scale": "cholesky(D)", "center": "cholesky(D)", "constants": "cholesky(K)", "slots": "positive",
    },
    last=("rows", "x", "candidates"),
    fake=lambda given: (
        *ActivePairs.empty(given.x.shape[0], given.slots, given.cholesky),
        given.cholesky.new_empty(given.candidates.shape),
    ),
)  # fmt: skip
def _scan_candidates(
    x: Tensor, candidates: Tensor, rows: Tensor, cholesky: Tensor, scale: Tensor, center: Tensor, constants: Tensor,
    per_component: bool, slots: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    woodbury = Woodbury.without_log_det(rows, cholesky, scale, center, per_component)
    x, candidates = x.to(cholesky.dtype).contiguous(), candidates.contiguous()
    threshold = activity_threshold(len(rows), cholesky.dtype)
    if woodbury.backend == "cpp":
        terms = rows, constants.contiguous(), scale, per_component
        return cpp.library().scan_candidates(x, candidates, *terms, threshold, slots)
    trust.check_range("scan_candidates", "candidates", candidates, -1, len(rows))
    with full_precision(cholesky):
        return portable.scan_candidates(x, candidates, woodbury, constants, threshold, slots)
