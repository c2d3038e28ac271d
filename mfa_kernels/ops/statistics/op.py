"""EM's sufficient statistics registered: ``torch.ops.mfa_kernels.statistics`` adds those of a batch to its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision
from mfa_kernels.ops.common import cpp, first_use, trust
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.scan.op import component_log_prob, log_prob
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs
from mfa_kernels.ops.statistics import portable, spot_check
from mfa_kernels.ops.statistics.types import SufficientStatistics, Sums
from mfa_kernels.ops.woodbury.portable import CHUNK
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury


def accumulate(x: Tensor, components: Tensor, weights: Tensor, woodbury: Woodbury, out: SufficientStatistics) -> None:
    """Adds the sums over the pairs in the slots to `out`; its log-likelihood is left to the caller.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the Woodbury terms.
        components: (N, S) int32; -1 marks an empty slot.
        weights: (N, S), in the dtype of the Woodbury terms; a slot of weight 0 is no pair.
        woodbury: of the parameters.
        out: what is added to, of matching shapes.
    """
    f = woodbury
    torch.ops.mfa_kernels.statistics(
        x, components, weights, f.rows, f.cholesky, f.scale, f.center, f.per_component, *out.tensors()[:6]
    )


@torch.no_grad()
def expectation(
    x: Tensor,
    parameters: Parameters,
    woodbury: Woodbury,
    out: SufficientStatistics,
    token_weights: Tensor | None = None,
    active: ActivePairs | None = None,
) -> tuple[ActivePairs, Tensor]:
    """The E-step of a batch: one scan, then the statistics on the pairs that it found, added to `out`.

    A token that is not finite, or too far out for its dtype, has no pairs and adds nothing.

    Args:
        x: (N, D), any float dtype.
        parameters: those behind `woodbury`.
        woodbury: of these parameters.
        out: what is added to.
        token_weights: (N,), finite and non-negative; a token of weight 2 counts as two. None: all 1.
        active: what the scan of x has found, where it was done already, in `SLOTS` slots.

    Returns:
        The active pairs, and their responsibilities times the token's weight (N, S): 0 in the slots of a token
        that overflows, whose pairs with all components are added besides.
    """
    x = x.to(woodbury.rows.dtype).contiguous()
    if active is None:
        active = log_prob(x, *parameters, woodbury)
    log_likelihood = torch.where(active.components[:, 0] >= 0, active.log_prob.double(), 0)
    if token_weights is not None:
        log_likelihood *= token_weights
    out.log_likelihood.add_(log_likelihood.sum())
    return active, collect(x, active, parameters, woodbury, out, token_weights)


def collect(
    x: Tensor,
    active: ActivePairs,
    parameters: Parameters,
    woodbury: Woodbury,
    out: SufficientStatistics,
    token_weights: Tensor | None = None,
    least: float = 0.0,
) -> Tensor:
    """The statistics on pairs that a scan of x (N, D) has found, added to `out` but for the log-likelihood.

    Arguments and result are those of `expectation`; pairs that weigh less than `least` are left out.
    """
    # Softmax, not exp(logits - log_prob): log_prob is rounded, and at thousands of nats that costs four digits.
    weights = torch.where(active.components >= 0, active.logits.softmax(-1), 0)
    overflow = active.counts > SLOTS
    weights.masked_fill_(overflow.unsqueeze(-1), 0)
    if token_weights is not None:
        weights *= token_weights.to(weights).unsqueeze(-1)
    if least:
        weights.masked_fill_(weights < least, 0)
    accumulate(x, active.components, weights, woodbury, out)
    # Tokens that overflow have a pair with every component: as many of them at once as memory allows.
    means, loadings, noise_variance, log_weights = parameters
    count = len(means)
    every = torch.arange(count, dtype=torch.int32, device=x.device)
    for chunk in overflow.nonzero().squeeze(-1).split(max(1, CHUNK // (2 * count))):
        part = x[chunk]
        logits = component_log_prob(part, means, loadings, noise_variance, woodbury) + log_weights
        responsibilities = logits.softmax(-1)
        if token_weights is not None:
            responsibilities *= token_weights[chunk].to(responsibilities).unsqueeze(-1)
        accumulate(part, every.expand(len(chunk), -1).contiguous(), responsibilities, woodbury, out)
    return weights


@operator(
    "statistics",
    "-> ()",
    {
        "x": "any(N, D)", "components": "int32(N, S)", "weights": "cholesky(N, S)",
        "rows": trust.ROWS, "cholesky": "real(K, R, R)", "scale": "cholesky(D)", "center": "cholesky(D)",
        "mass": "double(K)", "shift": "double(K, D)", "latent": "double(K, R)", "second": "double(K, R, R)",
        # One of the two is refused, as 0 features or components.
        "cross": "double(K, R, D)", "squares": "double(D * (1 - per_component)) or double(K * per_component, D)",
    },
    last=("rows", "x", "components", "weights"),
    written=Sums._fields,
)  # fmt: skip
def _statistics(
    x: Tensor, components: Tensor, weights: Tensor, rows: Tensor, cholesky: Tensor, scale: Tensor, center: Tensor,
    per_component: bool, out: Sums,
) -> None:  # fmt: skip
    components, weights = components.contiguous(), weights.contiguous()
    woodbury = Woodbury.without_log_det(rows, cholesky, scale, center, per_component)
    if woodbury.backend == "cpp":
        x = x.to(rows.dtype).contiguous()
        cpp.library().statistics(x, components, weights, rows, cholesky, scale, per_component, *out)
        return
    trust.check_range("statistics", "components", components, -1, len(rows))
    with full_precision(rows):
        if woodbury.backend == "triton":
            from mfa_kernels.ops.statistics import triton_statistics

            x = (x if x.dtype != torch.float64 else x.float()).contiguous()
            trial = first_use.Trial(
                lambda: triton_statistics.accumulate(x, components, weights, woodbury, out),
                lambda: portable.accumulate(x.to(rows.dtype), components, weights, woodbury, out),
                lambda found, before: spot_check.of_sums(x, components, weights, woodbury, out, Sums(*before)),
                out,
            )
            shape = x.shape[1], cholesky.shape[-1], per_component, x.dtype, components.shape[1]
            first_use.served("statistics", x, shape, trial)
        else:
            portable.accumulate(x.to(rows.dtype), components, weights, woodbury, out)
