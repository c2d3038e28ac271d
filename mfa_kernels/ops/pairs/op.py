"""Stage 2 registered: ``torch.ops.mfa_kernels.latents`` and ``.decode``; gradients from weighted pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision, no_tangents
from mfa_kernels.ops.common import backends, cpp, first_use, trust
from mfa_kernels.ops.common.register import NO_SECOND_DERIVATIVE, operator
from mfa_kernels.ops.pairs import portable, spot_check
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.woodbury.types import Woodbury


def latents(
    x: Tensor,
    tokens: Tensor,
    components: Tensor,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    woodbury: Woodbury,
) -> Tensor:
    """E[z | x_n, k] for the pairs (tokens[p], components[p]): (P, R). Differentiable in x and the parameters.

    Args:
        x: (N, D).
        tokens: (P,) int64.
        components: (P,) int32; -1 stands for no pair, whose latents are 0.
        means, loadings, noise_variance: the parameters behind `woodbury`.
        woodbury: of these parameters.
    """
    no_tangents("latents", x, means, loadings, noise_variance)
    return torch.ops.mfa_kernels.latents(x, tokens, components, means, loadings, noise_variance, *woodbury.tensors())


def decode(components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor) -> Tensor:
    """sum_c r_c (mu_c + W_c z_c), (N, D). Differentiable in all but components.

    Args:
        components: (N, C) int32; -1 marks an empty slot.
        responsibilities: (N, C).
        latents: (N, C, R).
        means: (K, D).
        loadings: (K, D, R).
    """
    no_tangents("decode", responsibilities, latents, means, loadings)
    return torch.ops.mfa_kernels.decode(components, responsibilities, latents, means, loadings)


def accumulate_gradients(
    pairs: Pairs, weights: Tensor, woodbury: Woodbury, gradients: list[Tensor | None], add: bool = True
) -> None:
    """Adds sum_p w_p d logit_p to [x, means, loadings, noise, log_weights], those that are not None.

    Args:
        pairs: x contiguous, tokens ascending; only on the Triton backend may a component be -1.
        weights: (P,).
        woodbury: of the parameters.
        gradients: in the shapes of what they belong to; None is not computed.
        add: on the Triton backend, False writes the gradients instead of adding to them.
    """
    if woodbury.backend == "cpp":
        terms = woodbury.rows, woodbury.cholesky, woodbury.scale, woodbury.per_component
        cpp.library().backward(*pairs, weights, *terms, *gradients)
        return
    with full_precision(pairs.x):
        if woodbury.backend == "triton":
            from mfa_kernels.ops.pairs import triton_backward

            outputs = [g for g in gradients if g is not None]

            def error(found: None, before: Sequence[Tensor]) -> float | None:
                kept = iter(before)
                old = [None if g is None or not add else next(kept) for g in gradients]
                return spot_check.of_gradients(pairs, weights, woodbury, gradients, old)

            def plain() -> None:
                for g in outputs if not add else ():
                    g.zero_()
                held = ((pairs.components >= 0) & (weights != 0)).nonzero().squeeze(-1)
                own = Pairs(pairs.x.to(weights.dtype), pairs.tokens[held], pairs.components[held])
                portable.backward(own, weights[held], woodbury, gradients)

            trial = first_use.Trial(
                lambda: triton_backward.backward(pairs, weights, woodbury, gradients, add),
                plain,
                error,
                outputs,
            )
            wanted = *(g is not None for g in gradients), add
            first_use.served("gradients", pairs.x, _shape(pairs.x, woodbury, *wanted), trial)
        else:
            portable.backward(pairs, weights, woodbury, gradients)


def explain(pairs: Pairs, woodbury: Woodbury) -> Tensor:
    """`latents` without gradients, of tensors that an operator has checked."""
    (x, tokens, components), cholesky = pairs, woodbury.cholesky
    if woodbury.backend == "cpp":
        out = cholesky.new_zeros(tokens.shape[0], cholesky.shape[-1])
        held = (components != -1).nonzero().squeeze(-1)
        x, terms = x.to(cholesky.dtype).contiguous(), (woodbury.rows, cholesky, woodbury.scale, woodbury.per_component)
        out[held] = cpp.library().latents(x, tokens[held], components[held], *terms)
        return out
    trust.check_range("latents", "tokens", tokens, 0, len(x))
    trust.check_range("latents", "components", components, -1, len(cholesky))
    with full_precision(cholesky):
        if woodbury.backend == "triton":
            from mfa_kernels.ops.pairs import triton_pairs

            x = x if x.dtype != torch.float64 else x.float()
            tokens = tokens.clamp(0, max(0, len(x) - 1))  # unseen on a GPU
            pairs = Pairs(x.contiguous(), tokens, components)
            trial = first_use.Trial(
                lambda: triton_pairs.latents(pairs, woodbury),
                lambda: _plain_latents(pairs, woodbury),
                lambda found, before: spot_check.of_latents(found, pairs, woodbury),
            )
            return first_use.served("latents", x, _shape(x, woodbury), trial)
        return _plain_latents(pairs, woodbury)


def _plain_latents(pairs: Pairs, woodbury: Woodbury) -> Tensor:
    x, tokens, components = pairs
    out = portable.latents(x.to(woodbury.cholesky.dtype), tokens, components.clamp_min(0), woodbury)
    return out.masked_fill((components == -1).unsqueeze(-1), 0)


def _shape(x: Tensor, woodbury: Woodbury, *others: Any) -> tuple[Any, ...]:
    """What the machine code of a kernel of pairs depends on."""
    return x.shape[1], woodbury.cholesky.shape[-1], woodbury.per_component, x.dtype, *others


_PAIRS = {"x": "any(N, D)", "tokens": "int64(P)", "components": "int32(P)"}
_SLOTS = {"components": "int32(N, C)", "responsibilities": "means(N, C)", "latents": "means(N, C, R)"}
_MAP = {"means": "real(K, D)", "loadings": "means(K, D, R)"}


def _latents_gradient(saved, needs, grad):
    wanted = [needs[0], *needs[3:6]]
    grad_x, *parameters = torch.ops.mfa_kernels.latents_backward(grad, *saved, wanted)
    grad_x, *parameters = (g if n else None for g, n in zip((grad_x, *parameters), wanted))
    return grad_x, None, None, *parameters


def _decode_gradient(saved, needs, grad):
    gradients = torch.ops.mfa_kernels.decode_backward(grad, *saved, list(needs[3:5]))
    return None, *(g if n else None for g, n in zip(gradients, needs[1:5]))


def _where_needed(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Empty tensors like these, of size 0 where no gradient is needed."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else t.new_empty(0)
        for t, n in zip(tensors, needs)
    )


@operator(
    "latents",
    "-> Tensor",
    {**_PAIRS, **trust.PARAMETERS, **trust.WOODBURY},
    last=("x", "tokens", "components"),
    fake=lambda given: given.means.new_empty(given.tokens.shape[0], given.loadings.shape[2]),
    gradient=_latents_gradient,
    saves=lambda inputs, output: (output, *inputs[:6], inputs[7]),
)
def _latents(pairs: Pairs, means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury) -> Tensor:
    return explain(pairs, woodbury)


@operator(
    "latents_backward",
    "-> (Tensor, Tensor, Tensor, Tensor)",
    {
        "grad": "means(P, R)", "latents": "means(P, R)", **_PAIRS, **trust.PARAMETERS, "cholesky": "means(K, R, R)",
        "needs": "4 gradients",
    },
    last=("x", "tokens", "components", "grad", "latents", "needs"),
    fake=lambda given: _where_needed((given.x, given.means, given.loadings, given.noise_variance), given.needs),
    gradient=NO_SECOND_DERIVATIVE,
    waits=True,  # for which pairs are none
)  # fmt: skip
def _latents_backward(
    grad: Tensor,
    latents: Tensor,
    pairs: Pairs,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    cholesky: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    trust.check_range("latents_backward", "tokens", pairs.tokens, 0, len(pairs.x))
    trust.check_range("latents_backward", "components", pairs.components, -1, len(means))
    with full_precision(means):
        return portable.latents_backward(grad, latents, pairs, means, loadings, noise_variance, cholesky, needs)


@operator(
    "decode",
    "-> Tensor",
    {**_SLOTS, **_MAP},
    last=tuple(_SLOTS),
    fake=lambda given: given.means.new_empty(given.components.shape[0], given.means.shape[1]),
    gradient=_decode_gradient,
    saves=lambda inputs, output: inputs,
)
def _decode(components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor) -> Tensor:
    tensors = [t.contiguous() for t in (components, responsibilities, latents, means, loadings)]
    serving = backends.serving(means, loadings.shape[2])
    if serving == "cpp":
        return cpp.library().decode(*tensors)
    trust.check_range("decode", "components", components, -1, len(means))
    with full_precision(means):
        if serving == "triton":
            from mfa_kernels.ops.pairs import triton_decode

            trial = first_use.Trial(
                lambda: triton_decode.decode(*tensors),
                lambda: portable.decode(*tensors),
                lambda found, before: spot_check.of_decoded(found, *tensors),
            )
            return first_use.served("decode", means, (means.shape[1], loadings.shape[2], means.dtype), trial)
        return portable.decode(components, responsibilities, latents, means, loadings)


@operator(
    "decode_backward",
    "-> (Tensor, Tensor, Tensor, Tensor)",
    {"grad": "means(N, D)", **_SLOTS, **_MAP, "needs": "2 gradients"},
    last=(*_SLOTS, "grad", "needs"),
    fake=lambda given: _where_needed(
        (given.responsibilities, given.latents, given.means, given.loadings), (True, True, *given.needs)
    ),
    gradient=NO_SECOND_DERIVATIVE,
)
def _decode_backward(
    grad: Tensor, components: Tensor, responsibilities: Tensor, latents: Tensor, means: Tensor, loadings: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Those of means and loadings, which are as large as the mixture, where they are needed."""
    trust.check_range("decode_backward", "components", components, -1, len(means))
    with full_precision(means):
        if backends.serving(means, loadings.shape[2]) == "triton":
            from mfa_kernels.ops.pairs import triton_decode

            code = components, responsibilities, latents, means, loadings
            given: Any = (*(t.contiguous() for t in (grad, *code)), needs)
            trial = first_use.Trial(
                lambda: triton_decode.decode_backward(*given),
                lambda: portable.decode_backward(*given),
                lambda found, before: spot_check.of_decoded_gradients(found, *given[:6]),
            )
            shape = means.shape[1], loadings.shape[2], means.dtype, any(needs)
            found = first_use.served("gradients of decode", means, shape, trial)
            return *found[:2], *(g if n else g.new_empty(0) for g, n in zip(found[2:], needs))
        return portable.decode_backward(grad, components, responsibilities, latents, means, loadings, needs)
