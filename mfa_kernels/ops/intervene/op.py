"""Steering registered: ``torch.ops.mfa_kernels.intervene``, one pass over the hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision, no_tangents
from mfa_kernels.ops.common import backends, cpp, trust
from mfa_kernels.ops.intervene import portable
from mfa_kernels.ops.pairs import op as pairs
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import Woodbury


class Edit(NamedTuple):
    """What is done to the tokens of each batch row. B' divides B, S is 1 or T; row i of B takes entry i // (B / B').

    Attributes:
        coefficients: scale, weight and spread, (B', S, 3), in the dtype that x is steered in: the wider of its own and
            the mixture's, float32 or float64.
        shift: (B', S, D), in that dtype.
        rules: (B', 3) int32. The kind of gate, a number of portable.py: ALWAYS, RESPONSIBILITY and NOT_RESPONSIBILITY
            (of the region, against the threshold), DENSITY and NOT_DENSITY (log p(x)), or NEVER. The region looked at,
            -1 for none. Whether the norm is kept, 0 or 1.
        thresholds: of the gates, (B',), in the dtype of the mixture.
        keeps_norm: whether any row keeps its norm.
        latents: z, (B', S, R), in the dtype of the mixture; None for 0.
        spreads: whether spread may differ from 0.
    """

    coefficients: Tensor
    shift: Tensor
    rules: Tensor
    thresholds: Tensor
    keeps_norm: bool = False
    latents: Tensor | None = None
    spreads: bool = False


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
        reached; the responsibility of its row's region, 0 where none was looked at; whether one was looked at, which
        is at every chosen token that is finite, reached or not.
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
        return portable.intervene(
            hidden, *edit[:5], chosen, passed, active, edit.latents, edit.spreads, map_, latents
        )  # fmt: skip
    mixture: tuple[Tensor | None, ...] = (None,) * 5
    if parameters is not None and woodbury is not None:
        mixture = (*parameters[:2], woodbury.rows, woodbury.cholesky, woodbury.scale)
    per_component = woodbury is not None and woodbury.per_component
    return torch.ops.mfa_kernels.intervene(
        hidden, *edit, chosen, passed, *(active or (None,) * 4), *mixture, per_component
    )


torch.library.define(
    "mfa_kernels::intervene",
    "(Tensor hidden, Tensor coefficients, Tensor shift, Tensor rules, Tensor thresholds, bool keeps_norm,"
    " Tensor? latents, bool spreads, Tensor? chosen, Tensor? passed, Tensor? log_prob, Tensor? components,"
    " Tensor? logits, Tensor? counts, Tensor? means, Tensor? loadings, Tensor? rows, Tensor? cholesky, Tensor? scale,"
    " bool per_component) -> (Tensor steered, Tensor tally)",
)


_check = trust.checker(
    "intervene",
    {
        "hidden": "any(B, T, D)", "coefficients": "real(E, S, 3)", "shift": "coefficients(F, U, D)",
        "rules": "int32(G, 3)", "thresholds": "real(H)", "keeps_norm": "", "latents": "thresholds(I, J, R)",
        "spreads": "", "chosen": "bool(L, M)", "passed": "bool(B, T)", "log_prob": "thresholds(B * T)",
        "components": "int32(B * T, C)", "logits": "thresholds(B * T, C)", "counts": "int32(B * T)",
        "means": "thresholds(K, D)", "loadings": "thresholds(K, D, R)", "rows": trust.ROWS,
        "cholesky": "thresholds(K, R, R)", "scale": "thresholds(D)", "per_component": "",
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
)  # fmt: skip


def _intervene(
    hidden, coefficients, shift, rules, thresholds, keeps_norm, latents, spreads, chosen, passed,
    log_prob, components, logits, counts, means, loadings, rows, cholesky, scale, per_component,
):  # fmt: skip
    _check(
        hidden, coefficients, shift, rules, thresholds, keeps_norm, latents, spreads, chosen, passed,
        log_prob, components, logits, counts, means, loadings, rows, cholesky, scale, per_component,
    )  # fmt: skip
    if log_prob is None and means is not None:
        raise ValueError("intervene: log_prob must be given where the mixture is, got None")
    rank = 0 if cholesky is None else cholesky.shape[-1]
    serving = backends.serving(thresholds, rank)
    if means is not None and serving != "cpp":  # which looks itself
        trust.check_range("intervene", "components", components, -1, len(means))
    if serving == "portable" or (serving == "triton" and coefficients.dtype == torch.float64):
        active = None if log_prob is None else ActivePairs(log_prob, components, logits, counts)
        parameters = None if means is None else (means, loadings)

        def explain(x: Tensor, tokens: Tensor, components: Tensor) -> Tensor:
            none = cholesky.new_empty(0)
            return pairs.explain(x, tokens, components, Woodbury(rows, cholesky, none, scale, none, per_component))

        with full_precision(thresholds):
            steered, tally = portable.intervene(
                hidden, coefficients, shift, rules, thresholds, keeps_norm, chosen, passed, active, latents, spreads,
                parameters, explain,
            )  # fmt: skip
        return steered.contiguous(), tally

    def ready(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    tensors = [ready(t) for t in (hidden, coefficients, shift, rules, thresholds, latents, chosen, passed, log_prob,
                                  components, logits, counts, rows, cholesky, scale)]  # fmt: skip
    if serving == "cpp":
        return cpp.library().intervene(*tensors, per_component, spreads)
    from mfa_kernels.ops.intervene import triton_intervene

    return triton_intervene.intervene(*tensors, per_component, keeps_norm, spreads)


trust.register("intervene", _intervene)


@torch.library.register_fake("mfa_kernels::intervene")
def _(hidden, coefficients, shift, rules, thresholds, *rest):
    steered = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return steered, thresholds.new_empty(*hidden.shape[:2], 3)


def _refuse(ctx, *grads):
    raise RuntimeError("torch.ops.mfa_kernels.intervene has no gradient; the function ops.intervene.op.intervene has")


torch.library.register_autograd("mfa_kernels::intervene", _refuse, setup_context=lambda ctx, inputs, output: None)
