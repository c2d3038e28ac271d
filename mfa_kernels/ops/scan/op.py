"""Stage 1 registered: ``torch.ops.mfa_kernels.log_prob`` and ``.component_log_prob``, with their gradients.

The factors come in as tensors that carry no gradient: backward reaches x, means, loadings, noise and weights in
closed form, on the active pairs alone (stage 2). A token whose active components overflow its slots (a diffuse
mixture) is treated densely, that token only, in chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision, no_tangents, once_differentiable
from mfa_kernels.ops.common import cpp, trust
from mfa_kernels.ops.common.out_of_memory import explained
from mfa_kernels.ops.pairs import dense
from mfa_kernels.ops.pairs.op import accumulate_gradients
from mfa_kernels.ops.scan import portable
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold
from mfa_kernels.ops.woodbury.portable import CHUNK
from mfa_kernels.ops.woodbury.types import WOODBURY, ScanRows, Woodbury

_PARAMETERS = "Tensor x, Tensor means, Tensor loadings, Tensor noise_variance"
_SCAN = ", ".join(
    f"Tensor? {name}=None" for name in ("rows16", "scales", "offsets", "squares", "bounds", "worst", "reference")
)


def log_prob(
    x: Tensor,
    means: Tensor,
    loadings: Tensor,
    noise_variance: Tensor,
    log_weights: Tensor,
    woodbury: Woodbury,
    slots: int = SLOTS,
    exact: bool = True,
) -> ActivePairs:
    """log p(x) and the active pairs, differentiable in the first five arguments (log_prob and logits).

    Args:
        x: (N, D), any float dtype; it is brought to the dtype of the parameters.
        means: (K, D), float32 or float64.
        loadings: (K, D, R).
        noise_variance: (D,) or (K, D).
        log_weights: (K,).
        woodbury: of these parameters.
        slots: S, the most active components kept per token.
        exact: False allows a backend to leave out the exact recompute of a low-precision scan.
    """
    parameters = means, loadings, noise_variance, log_weights
    no_tangents("log_prob", x, *parameters)
    return ActivePairs(
        *torch.ops.mfa_kernels.log_prob(x, *parameters, *woodbury.tensors(), slots, exact, *woodbury.scan)
    )


def component_log_prob(
    x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury
) -> Tensor:
    """log p(x | k) for every component, (N, K): dense, differentiable."""
    no_tangents("component_log_prob", x, means, loadings, noise_variance)
    return torch.ops.mfa_kernels.component_log_prob(x, means, loadings, noise_variance, *woodbury.tensors())


torch.library.define(
    "mfa_kernels::log_prob",
    f"({_PARAMETERS}, Tensor log_weights, {WOODBURY}, int slots, bool exact=True, {_SCAN})"
    " -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts)",
)
torch.library.define(
    "mfa_kernels::log_prob_backward",
    f"(Tensor grad_log_prob, Tensor grad_logits, {_PARAMETERS}, Tensor log_weights, {WOODBURY},"
    " Tensor log_prob, Tensor components, Tensor logits, Tensor counts, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_means, Tensor grad_loadings, Tensor grad_noise, Tensor grad_log_weights)",
)
torch.library.define("mfa_kernels::component_log_prob", f"({_PARAMETERS}, {WOODBURY}) -> Tensor")
torch.library.define(
    "mfa_kernels::component_log_prob_backward",
    f"(Tensor grad, {_PARAMETERS}, {WOODBURY}, bool[] needs)"
    " -> (Tensor grad_x, Tensor grad_means, Tensor grad_loadings, Tensor grad_noise)",
)


check_log_prob = trust.checker(
    "log_prob",
    {"x": "any(N, D)", **trust.PARAMETERS, "log_weights": "means(K)", **trust.WOODBURY, "slots": "positive"},
    last=("x",),
)
_check_scan = trust.checker(
    "log_prob",
    {
        "loadings": "real(K, D, R)", "noise_variance": "any(D) or any(K, D)",
        "rows16": "half(-(-K // 64), R + noise_variance_dims, 64, -(-D // 64) * 64)",
        "scales": "loadings(3, -(-K // 64) * 64)", "offsets": "loadings(-(-K // 64), R, 64)",
        "squares": "double(K)", "bounds": "loadings(7, -(-K // 64) * 64)", "worst": "loadings(5)",
        "reference": "loadings(D)",
    },
)  # fmt: skip
_check_component_log_prob = trust.checker(
    "component_log_prob", {"x": "any(N, D)", **trust.PARAMETERS, **trust.WOODBURY}, last=("x",)
)
_check_log_prob_backward = trust.checker(
    "log_prob_backward",
    {
        "grad_log_prob": "means(N)", "grad_logits": "means(N, S)", "x": "any(N, D)", **trust.PARAMETERS,
        "log_weights": "means(K)", **trust.WOODBURY, "log_prob": "means(N)", "components": "int32(N, S)",
        "logits": "means(N, S)", "counts": "int32(N)",
    },
    last=("x", "components", "grad_log_prob", "grad_logits", "log_prob", "logits", "counts"),
)  # fmt: skip
_check_component_log_prob_backward = trust.checker(
    "component_log_prob_backward",
    {"grad": "means(N, K)", "x": "any(N, D)", **trust.PARAMETERS, **trust.WOODBURY},
    last=("x", "grad"),
)


def _prepared(x: Tensor, means: Tensor, woodbury: Woodbury) -> Tensor:
    """x as the backend reads it: only Triton converts the halves as it loads them."""
    keep = woodbury.is_triton and x.dtype in (torch.bfloat16, torch.float16)
    return x.contiguous() if keep else x.to(means.dtype).contiguous()


def _log_prob(
    x, means, loadings, noise_variance, log_weights, rows, cholesky, log_det, scale, center, slots, exact=True, *scan
):
    check_log_prob(x, means, loadings, noise_variance, log_weights, rows, cholesky, log_det, scale, center, slots)
    woodbury = Woodbury(rows, cholesky, log_det, scale, center, noise_variance.dim() == 2)
    x = _prepared(x, means, woodbury)
    threshold = activity_threshold(means.shape[0], means.dtype)
    constants = woodbury.constants(log_weights)
    if woodbury.is_cpp:
        return cpp.library().scan(x, rows, constants, scale, woodbury.per_component, threshold, slots)
    size = x.numel() + x.shape[0] * (means.shape[0] // 8 + 2 * slots)
    shrink = "pass fewer tokens x at a time"
    with full_precision(means), explained(f"the scan of {x.shape[0]} tokens", size, means.element_size(), shrink):
        if not woodbury.is_triton:
            return portable.scan(x, woodbury, constants, threshold, slots)
        from mfa_kernels.ops.scan import triton_pipeline
        from mfa_kernels.ops.woodbury import triton_rows

        if scan and scan[0] is not None and scan[0].numel():
            _check_scan(loadings, noise_variance, *scan)
            view = ScanRows(*(t.contiguous() for t in scan))
        else:
            view = triton_rows.scan_rows(woodbury)
        return triton_pipeline.scan(x, woodbury, view, constants, slots, exact)


def _component_log_prob(x, means, loadings, noise_variance, rows, cholesky, log_det, scale, center):
    _check_component_log_prob(x, means, loadings, noise_variance, rows, cholesky, log_det, scale, center)
    woodbury = Woodbury(rows, cholesky, log_det, scale, center, noise_variance.dim() == 2)
    x = _prepared(x, means, woodbury)
    return dense_logits(x, woodbury, woodbury.constants(torch.zeros_like(log_det))).contiguous()


def dense_logits(x: Tensor, woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Every logit (N, K)."""
    if woodbury.is_cpp:
        library = cpp.library()
        return library.dense(x, woodbury.rows, constants, woodbury.scale, woodbury.per_component).t()
    with full_precision(x):
        if not woodbury.is_triton:
            return portable.dense(x, woodbury, constants)
        from mfa_kernels.ops.scan import triton_dense

        return triton_dense.dense(x, woodbury, constants)


def _new_gradients(
    woodbury: Woodbury, inputs: list[Tensor], needs: list[bool], written: bool = False
) -> list[Tensor | None]:
    """Room for the gradients: zeros, unless all of it is going to be written."""

    def new(t: Tensor) -> Tensor:
        if woodbury.is_cpp:
            return cpp.library().zeros_like(t)
        make = torch.empty if written else torch.zeros
        return make(t.shape, dtype=woodbury.rows.dtype, device=t.device)

    return [new(t) if needed else None for t, needed in zip(inputs, needs)]


def _filled(gradients: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators return tensors: an empty one stands for a gradient that nobody asked for."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _log_prob_backward(
    grad_log_prob, grad_logits, x, means, loadings, noise_variance, log_weights,
    rows, cholesky, log_det, scale, center, log_prob, components, logits, counts, needs,
):  # fmt: skip
    _check_log_prob_backward(
        grad_log_prob, grad_logits, x, means, loadings, noise_variance, log_weights,
        rows, cholesky, log_det, scale, center, log_prob, components, logits, counts,
    )  # fmt: skip
    _check_needs("log_prob_backward", needs, 5)
    woodbury = Woodbury(rows, cholesky, log_det, scale, center, noise_variance.dim() == 2)
    if not woodbury.is_cpp:  # those kernels look themselves
        trust.check_range("log_prob_backward", "components", components, -1, len(means))
    x_dtype, x = x.dtype, _prepared(x, means, woodbury)
    fused = woodbury.is_triton
    gradients = _new_gradients(woodbury, [x, means, loadings, noise_variance, log_weights], needs, written=fused)
    slots = components.shape[1]
    held = components >= 0
    overflow = counts > slots
    # Softmax, not exp(logits - log_prob): log_prob is rounded, and at thousands of nats that costs four digits.
    responsibility = logits.softmax(-1).masked_fill(overflow.unsqueeze(-1), 0)
    # A token that is not finite holds no pairs: its loss is NaN, and it has no gradient.
    weight = torch.where(held, grad_log_prob.unsqueeze(-1) * responsibility + grad_logits, 0)
    if fused:  # every slot, the empty ones too: nothing waits for the device
        tokens = torch.arange(weight.numel(), device=x.device) // slots
        accumulate_gradients(x, tokens, components.flatten(), weight.flatten(), woodbury, gradients, add=False)
    else:
        tokens, columns = weight.nonzero(as_tuple=True)
        accumulate_gradients(x, tokens, components[tokens, columns], weight[tokens, columns], woodbury, gradients)
    diffuse = overflow.nonzero().squeeze(-1)
    if diffuse.numel():
        constants = woodbury.constants(log_weights)
        least = math.exp(-activity_threshold(means.shape[0], means.dtype))
        for chunk in diffuse.split(_dense_step(means)):
            r = dense_logits(x[chunk], woodbury, constants).softmax(-1)
            weight = grad_log_prob[chunk].unsqueeze(-1) * r.masked_fill(r < least, 0)
            dense.backward(x, chunk, weight, woodbury, gradients)
    if gradients[0] is not None:
        gradients[0] = gradients[0].to(x_dtype)
    return _filled(gradients, means)


def _check_needs(operator: str, needs: list[bool], count: int) -> None:
    if len(needs) != count:
        raise ValueError(f"{operator}: needs must have {count} entries, one for each gradient, got {len(needs)}")


def _dense_step(means: Tensor) -> int:
    """Tokens at a time of a dense backward: logits, weights and tokens each within bounds."""
    return max(1, CHUNK // max(2 * means.shape[0], means.shape[1]))


def _component_log_prob_backward(
    grad, x, means, loadings, noise_variance, rows, cholesky, log_det, scale, center, needs
):
    _check_component_log_prob_backward(grad, x, means, loadings, noise_variance, rows, cholesky, log_det, scale, center)
    _check_needs("component_log_prob_backward", needs, 4)
    woodbury = Woodbury(rows, cholesky, log_det, scale, center, noise_variance.dim() == 2)
    x_dtype, x = x.dtype, x.to(means.dtype).contiguous()
    gradients = [*_new_gradients(woodbury, [x, means, loadings, noise_variance], needs), None]
    for chunk in torch.arange(x.shape[0], device=x.device).split(_dense_step(means)):
        dense.backward(x, chunk, grad[chunk], woodbury, gradients)
    if gradients[0] is not None:
        gradients[0] = gradients[0].to(x_dtype)
    return _filled(gradients[:4], means)


trust.register("log_prob", _log_prob)
trust.register("log_prob_backward", _log_prob_backward)
trust.register("component_log_prob", _component_log_prob)
trust.register("component_log_prob_backward", _component_log_prob_backward)


@torch.library.register_fake("mfa_kernels::log_prob")
def _(
    x, means, loadings, noise_variance, log_weights, rows, cholesky, log_det, scale, center, slots, exact=True, *scan
):
    return tuple(ActivePairs.empty(x.shape[0], slots, means))


@torch.library.register_fake("mfa_kernels::component_log_prob")
def _(x, means, loadings, noise_variance, rows, cholesky, log_det, scale, center):
    return means.new_empty(x.shape[0], means.shape[0])


def _fake_gradients(inputs: list[Tensor], needs: list[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else inputs[1].new_empty(0)
        for t, n in zip(inputs, needs)
    )


@torch.library.register_fake("mfa_kernels::log_prob_backward")
def _(
    grad_log_prob, grad_logits, x, means, loadings, noise_variance, log_weights,
    rows, cholesky, log_det, scale, center, log_prob, components, logits, counts, needs,
):  # fmt: skip
    return _fake_gradients([x, means, loadings, noise_variance, log_weights], needs)


@torch.library.register_fake("mfa_kernels::component_log_prob_backward")
def _(grad, x, means, loadings, noise_variance, rows, cholesky, log_det, scale, center, needs):
    return _fake_gradients([x, means, loadings, noise_variance], needs)


def _log_prob_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:10], *output)


def _log_prob_gradient(ctx, grad_log_prob, grad_components, grad_logits, grad_counts):
    return *gradients_of(ctx, grad_log_prob, grad_logits), *[None] * 14


def gradients_of(ctx, grad_log_prob: Tensor | None, grad_logits: Tensor | None) -> list[Tensor | None]:
    """Those of x and the parameters, where wanted: `ctx` has saved these, the factors' tensors and the
    `ActivePairs`."""
    saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    log_prob, logits = saved[10], saved[12]
    grad_log_prob = torch.zeros_like(log_prob) if grad_log_prob is None else grad_log_prob
    grad_logits = torch.zeros_like(logits) if grad_logits is None else grad_logits
    gradients = torch.ops.mfa_kernels.log_prob_backward(grad_log_prob, grad_logits, *saved, needs)
    return [g if n else None for g, n in zip(gradients, needs)]


def _component_log_prob_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _component_log_prob_gradient(ctx, grad):
    needs = list(ctx.needs_input_grad[:4])
    gradients = torch.ops.mfa_kernels.component_log_prob_backward(grad.contiguous(), *ctx.saved_tensors, needs)
    return *(g if n else None for g, n in zip(gradients, needs)), None, None, None, None, None


torch.library.register_autograd("mfa_kernels::log_prob", _log_prob_gradient, setup_context=_log_prob_context)
torch.library.register_autograd(
    "mfa_kernels::component_log_prob", _component_log_prob_gradient, setup_context=_component_log_prob_context
)
once_differentiable("log_prob_backward")
once_differentiable("component_log_prob_backward")
