"""EM's sufficient statistics registered: ``torch.ops.mfa_kernels.statistics`` adds those of a batch to its outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision
from mfa_kernels.ops.common import cpp, trust
from mfa_kernels.ops.scan.op import component_log_prob, log_prob
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs
from mfa_kernels.ops.statistics import portable
from mfa_kernels.ops.woodbury.portable import CHUNK
from mfa_kernels.ops.woodbury.types import Woodbury


@dataclass(frozen=True)
class SufficientStatistics:
    """Sums over the active pairs (n, k) of weight w = r_nk (times the token's weight), all float64.

    With y = x_n - mu_k and z = E[z | x_n, k], under the parameters that made them. Statistics of two batches, or of
    two shards of the data, under the same parameters add up (`+`).

    Attributes:
        mass: sum w, (K,).
        shift: sum w y, (K, D).
        latent: sum w z, (K, R).
        second: sum w (z z^T + M_k^-1) = sum w E[z z^T], (K, R, R).
        cross: sum w z y^T, (K, R, D).
        squares: sum w y^2, (D,) over all components where they share the noise, else (K, D).
        log_likelihood: sum over the tokens of log p(x), times their weight, ().
    """

    mass: Tensor
    shift: Tensor
    latent: Tensor
    second: Tensor
    cross: Tensor
    squares: Tensor
    log_likelihood: Tensor

    @classmethod
    def zeros(cls, means: Tensor, rank: int, per_component: bool) -> SufficientStatistics:
        """Of no token, for means (K, D), on their device."""
        (components, features), device = means.shape, means.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(components),
            zeros(components, features),
            zeros(components, rank),
            zeros(components, rank, rank),
            zeros(components, rank, features),
            zeros(components, features) if per_component else zeros(features),
            zeros(),
        )

    def tensors(self) -> list[Tensor]:
        """All of them, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        return SufficientStatistics(*(a + b for a, b in zip(self.tensors(), other.tensors())))

    def scale_(self, factor: float) -> None:
        """Multiplies them all by a factor, in place."""
        for tensor in self.tensors():
            tensor.mul_(factor)

    def moved(self, change: Tensor) -> SufficientStatistics:
        """The same sums about other means, mu_k + change_k (K, D): y becomes y - change. Latents stay as they are."""
        weighted = self.mass.unsqueeze(-1) * change
        squares = change * (weighted - 2 * self.shift)
        return SufficientStatistics(
            self.mass,
            self.shift - weighted,
            self.latent,
            self.second,
            self.cross - self.latent.unsqueeze(-1) * change.unsqueeze(1),
            self.squares + (squares if self.squares.dim() == 2 else squares.sum(0)),
            self.log_likelihood,
        )


def accumulate(x: Tensor, components: Tensor, weights: Tensor, woodbury: Woodbury, out: SufficientStatistics) -> None:
    """Adds the sums over the pairs in the slots to `out`; its log-likelihood is left to the caller.

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the factors.
        components: (N, S) int32; -1 marks an empty slot.
        weights: (N, S), in the dtype of the factors; a slot of weight 0 is no pair.
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
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    woodbury: Woodbury,
    out: SufficientStatistics,
    token_weights: Tensor | None = None,
    active: ActivePairs | None = None,
) -> tuple[ActivePairs, Tensor]:
    """The E-step of a batch: one scan, then the statistics on the pairs that it found, added to `out`.

    A token that is not finite, or too far out for its dtype, has no pairs and adds nothing.

    Args:
        x: (N, D), any float dtype.
        means, loadings, noise_variance, log_weights: the parameters behind `woodbury`.
        woodbury: of these parameters.
        out: what is added to.
        token_weights: (N,), finite and non-negative; a token of weight 2 counts as two. None: all 1.
        active: what the scan of x has found, where it was done already, in `SLOTS` slots.

    Returns:
        The active pairs, and their responsibilities times the token's weight (N, S): 0 in the slots of a diffuse
        token, whose pairs with all components are counted besides.
    """
    x = x.to(woodbury.rows.dtype).contiguous()
    if active is None:
        active = log_prob(x, means, loadings, noise_variance, log_weights, woodbury)
    log_likelihood = torch.where(active.components[:, 0] >= 0, active.log_prob.double(), 0)
    if token_weights is not None:
        log_likelihood *= token_weights
    out.log_likelihood.add_(log_likelihood.sum())
    return active, collect(x, active, means, loadings, noise_variance, log_weights, woodbury, out, token_weights)


def collect(
    x: Tensor,
    active: ActivePairs,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
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
    # Diffuse tokens have a pair with every component: as many of them at once as memory allows.
    every = torch.arange(means.shape[0], dtype=torch.int32, device=x.device)
    for chunk in overflow.nonzero().squeeze(-1).split(max(1, CHUNK // (2 * means.shape[0]))):
        part = x[chunk]
        logits = component_log_prob(part, means, loadings, noise_variance, woodbury) + log_weights
        responsibilities = logits.softmax(-1)
        if token_weights is not None:
            responsibilities *= token_weights[chunk].to(responsibilities).unsqueeze(-1)
        accumulate(part, every.expand(len(chunk), -1).contiguous(), responsibilities, woodbury, out)
    return weights


torch.library.define(
    "mfa_kernels::statistics",
    "(Tensor x, Tensor components, Tensor weights, Tensor rows, Tensor cholesky, Tensor scale, Tensor center,"
    " bool per_component, Tensor(a!) mass, Tensor(b!) shift, Tensor(c!) latent, Tensor(d!) second, Tensor(e!) cross,"
    " Tensor(f!) squares) -> ()",
)


_check_statistics = trust.checker(
    "statistics",
    {
        "x": "any(N, D)", "components": "int32(N, S)", "weights": "cholesky(N, S)",
        "rows": trust.ROWS,
        "cholesky": "real(K, R, R)", "scale": "cholesky(D)", "center": "cholesky(D)", "per_component": "",
        "mass": "double(K)", "shift": "double(K, D)", "latent": "double(K, R)", "second": "double(K, R, R)",
        # One of the two is refused, as 0 features or components.
        "cross": "double(K, R, D)", "squares": "double(D * (1 - per_component)) or double(K * per_component, D)",
    },
    last=("rows", "x", "components", "weights"),
    written=("mass", "shift", "latent", "second", "cross", "squares"),
)  # fmt: skip


def _statistics(x, components, weights, rows, cholesky, scale, center, per_component, *out):
    _check_statistics(x, components, weights, rows, cholesky, scale, center, per_component, *out)
    components, weights = components.contiguous(), weights.contiguous()
    woodbury = Woodbury(rows, cholesky, cholesky.new_empty(0), scale, center, per_component)
    if woodbury.is_cpp:
        x = x.to(rows.dtype).contiguous()
        cpp.library().statistics(x, components, weights, rows, cholesky, scale, per_component, *out)
        return
    trust.check_range("statistics", "components", components, -1, len(rows))
    with full_precision(rows):
        if woodbury.is_triton:
            from mfa_kernels.ops.statistics import triton_statistics

            x = x if x.dtype != torch.float64 else x.float()
            triton_statistics.accumulate(x.contiguous(), components, weights, woodbury, *out)
        else:
            portable.accumulate(x.to(rows.dtype), components, weights, woodbury, *out)


trust.register("statistics", _statistics)


@torch.library.register_fake("mfa_kernels::statistics")
def _(x, components, weights, rows, cholesky, scale, center, per_component, *out):
    return None
