"""Steering registered: ``torch.ops.mfa_kernels.intervene``, one pass over the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision, no_tangents
from mfa_kernels.ops.common import backends, cpp, first_use, trust
from mfa_kernels.ops.common.register import operator
from mfa_kernels.ops.intervene import portable, spot_check
from mfa_kernels.ops.intervene.types import Edit, Mixture
from mfa_kernels.ops.pairs import op as pairs
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import Woodbury


def intervene(
    hidden: Tensor,
    edit: Edit,
    chosen: Tensor | None = None,
    passed: Tensor | None = None,
    active: ActivePairs | None = None,
    parameters: tuple[Tensor, Tensor, Tensor] | None = None,
    woodbury: Woodbury | None = None,
) -> tuple[Tensor, Tensor]:
    """scale x + shift + sum_k r_k (weight mu_k + W_k (z + spread E[z | x, k])) where the gates let a token through.

    In the dtype of the edit, rounded once; a token that is not reached keeps its bits. Where gradients are wanted,
    plain PyTorch computes the same, differentiable in everything that has a float dtype. Does not wait for the device.

    Args:
        hidden: (B, T, D), any float dtype.
        edit: what to do.
        chosen: tokens to act on, bool, broadcasts to (B, T); None for all.
        passed: (B, T) bool, a further condition; None for none.
        active: of the B T tokens: what gates and responsibilities are read from; None where no rule needs them.
        parameters: means (K, D), loadings (K, D, R) and noise_variance; None where nothing is weighed by
            responsibilities: weight and spread are 0, latents None.
        woodbury: of these parameters.

    Returns:
        The hidden states after it, (B, T, D) contiguous, and (B, T, 3) in the mixture's dtype: whether the token was
        reached; the responsibility of its row's region, 0 where none was read; whether one was read, which is the
        case for every chosen token that is finite, reached or not.
    """
    differentiable = [hidden, edit.coefficients, edit.shift, edit.latents, *(parameters or ())]
    differentiable += [] if active is None else [active.logits]
    no_tangents("intervene", *differentiable)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):

        def latents(x: Tensor, tokens: Tensor, components: Tensor) -> Tensor:
            assert parameters is not None
            assert woodbury is not None
            return pairs.latents(x, tokens, components, *parameters, woodbury)

        map_ = None if parameters is None else parameters[:2]
        return portable.intervene(hidden, edit, chosen, passed, active, map_, latents)
    mixture: tuple[Tensor | None, ...] = (None,) * 5
    if parameters is not None and woodbury is not None:
        mixture = (*parameters[:2], woodbury.rows, woodbury.cholesky, woodbury.scale)
    per_component = woodbury is not None and woodbury.per_component
    return torch.ops.mfa_kernels.intervene(
        hidden, *edit, chosen, passed, *(active or (None,) * 4), *mixture, per_component
    )


@operator(
    "intervene",
    "-> (Tensor steered, Tensor tally)",
    {
        "hidden": "any(B, T, D)", "coefficients": "real(E, S, 3)", "shift": "coefficients(F, U, D)",
        "rules": "int32(G, 3)", "thresholds": "real(H)", "latents": "thresholds(I, J, R)",
        "chosen": "bool(L, M)", "passed": "bool(B, T)", "log_prob": "thresholds(B * T)",
        "components": "int32(B * T, C)", "logits": "thresholds(B * T, C)", "counts": "int32(B * T)",
        "means": "thresholds(K, D)", "loadings": "thresholds(K, D, R)", "rows": trust.ROWS,
        "cholesky": "thresholds(K, R, R)", "scale": "thresholds(D)",
    },
    last=("rows", "latents"),
    optional=(
        "latents", "chosen", "passed", "log_prob", "components", "logits", "counts", "means", "loadings", "rows",
        "cholesky", "scale",
    ),
    together={
        "active pairs": ("log_prob", "components", "logits", "counts"),
        "mixture": ("means", "loadings", "rows", "cholesky", "scale"),
    },
    where={
        "coefficients": "E > 0 and B % E == 0 and (S == 1 or S == T)",
        "shift": "F > 0 and B % F == 0 and (U == 1 or U == T)",
        "rules": "G > 0 and B % G == 0", "thresholds": "H > 0 and B % H == 0",
        "latents": "I > 0 and B % I == 0 and (J == 1 or J == T)",
        "chosen": "L > 0 and B % L == 0 and (M == 1 or M == T)",
    },
    fake=lambda given: (
        torch.empty_like(given.hidden, memory_format=torch.contiguous_format),
        given.thresholds.new_empty(*given.hidden.shape[:2], 3),
    ),
    gradient="torch.ops.mfa_kernels.intervene has no gradient; the function ops.intervene.op.intervene has",
)  # fmt: skip
def _intervene(
    hidden: Tensor, edit: Edit, chosen: Tensor | None, passed: Tensor | None, active: ActivePairs | None,
    mixture: Mixture | None, per_component: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if active is None and mixture is not None:
        raise ValueError("intervene: log_prob must be given where the mixture is, got None")
    serving = backends.serving(edit.thresholds, 0 if mixture is None else mixture.cholesky.shape[-1])
    if mixture is not None and active is not None and serving != "cpp":  # which looks itself
        trust.check_range("intervene", "components", active.components, -1, len(mixture.means))

    def in_range(active: ActivePairs | None) -> ActivePairs | None:
        if active is None or mixture is None:
            return active
        count = len(mixture.means)  # of others, the kernel makes no pair
        return active._replace(components=active.components.where(active.components < count, -1))

    def plain(active: ActivePairs | None = active) -> tuple[Tensor, Tensor]:
        def explain(x: Tensor, tokens: Tensor, components: Tensor) -> Tensor:
            assert mixture is not None
            rows, cholesky, scale = mixture[2:]
            woodbury = Woodbury.without_log_det(rows, cholesky, scale, scale, per_component)
            return pairs.explain(Pairs(x, tokens, components), woodbury)

        with full_precision(edit.thresholds):
            map_ = None if mixture is None else mixture[:2]
            steered, tally = portable.intervene(hidden, edit, chosen, passed, active, map_, explain)
        return steered.contiguous(), tally

    if serving == "portable" or (serving == "triton" and edit.coefficients.dtype == torch.float64):
        return plain()
    if serving == "triton":
        from mfa_kernels.ops.intervene import triton_intervene

        trial = first_use.Trial(
            lambda: triton_intervene.intervene(hidden, edit, chosen, passed, active, mixture, per_component),
            plain,
            lambda found, before: spot_check.of_steered(found, hidden, lambda: plain(in_range(active))),
        )
        rank = None if mixture is None else mixture.cholesky.shape[-1]
        given = edit.keeps_norm, edit.latents is None, edit.spreads, chosen is None, passed is None, active is None
        shape = hidden.shape[-1], hidden.dtype, rank, per_component, *given, hidden.shape[0] * hidden.shape[1] > 64
        return first_use.served("steering", hidden, shape, trial)
    pairs_, terms = active or (None,) * 4, (None,) * 3 if mixture is None else mixture[2:]
    operands = (hidden, *edit[:4], edit.latents, chosen, passed, *pairs_, *terms)
    tensors = [None if t is None else t.contiguous() for t in operands]
    return cpp.library().intervene(*tensors, per_component, edit.spreads)
