"""Stage 1 registered: ``torch.ops.mfa_kernels.log_prob`` and ``.component_log_prob``, with their gradients.

The Woodbury terms (stage 0) are inputs without a gradient. The backward pass computes the gradients of x, means,
loadings, noise and weights in closed form, from the active pairs alone (stage 2). A token that overflows, which has
more active components than slots, gets its gradients from all the components (pairs/overflow.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.common.precision import full_precision, no_tangents
from mfa_kernels.ops.common import configs, cpp, first_use, trust
from mfa_kernels.ops.common.out_of_memory import explain_out_of_memory
from mfa_kernels.ops.common.register import NO_SECOND_DERIVATIVE, operator
from mfa_kernels.ops.pairs import overflow
from mfa_kernels.ops.pairs.op import accumulate_gradients
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan import int8, portable, spot_check
from mfa_kernels.ops.scan.types import SLOTS, ActivePairs, activity_threshold
from mfa_kernels.ops.woodbury.portable import CHUNK
from mfa_kernels.ops.woodbury.types import Int8Rows, Parameters, ScanRows, Woodbury


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
    given = x, *parameters, *woodbury.tensors(), slots
    if not torch.compiler.is_compiling() and woodbury.is_cpp and _needs_gradients(x, *parameters):
        *active, _ = torch.ops.mfa_kernels.log_prob_keeping(*given, *woodbury.int8)
        return ActivePairs(*active)
    return ActivePairs(*torch.ops.mfa_kernels.log_prob(*given, exact, *(woodbury.scan or [None] * 7), *woodbury.int8))


@torch.no_grad()
def pairs_within(
    x: Tensor, parameters: Parameters, woodbury: Woodbury, threshold: float, slots: int = SLOTS
) -> ActivePairs:
    """`log_prob` with a threshold of activity of its own, in nats below the best logit; without gradients.

    On a GPU it is plain PyTorch's.
    """
    x, constants = x.to(woodbury.scale.dtype).contiguous(), woodbury.constants(parameters.log_weights)
    if woodbury.is_cpp:
        rows8 = Int8Rows(*woodbury.int8) if woodbury.int8 else None
        return ActivePairs(*_on_cpu(x, parameters, woodbury, constants, rows8, slots, False, threshold)[:4])
    with full_precision(x):
        return ActivePairs(*portable.scan(x, woodbury, constants, threshold, slots))


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def component_log_prob(
    x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury
) -> Tensor:
    """log p(x | k) for every component, (N, K): dense, differentiable."""
    no_tangents("component_log_prob", x, means, loadings, noise_variance)
    return torch.ops.mfa_kernels.component_log_prob(x, means, loadings, noise_variance, *woodbury.tensors())


def _prepared(x: Tensor, means: Tensor, woodbury: Woodbury) -> Tensor:
    """Returns x in the dtype that the backend reads: Triton converts half precision as it loads it, others do not."""
    keep = woodbury.backend == "triton" and x.dtype in (torch.bfloat16, torch.float16)
    return x.contiguous() if keep else x.to(means.dtype).contiguous()


def dense_logits(x: Tensor, woodbury: Woodbury, constants: Tensor) -> Tensor:
    """Every logit (N, K)."""
    if woodbury.backend == "cpp":
        library = cpp.library()
        return library.dense(x, woodbury.rows, constants, woodbury.scale, woodbury.per_component).t()
    with full_precision(x):
        if woodbury.backend != "triton":
            return portable.dense(x, woodbury, constants)
        from mfa_kernels.ops.scan import triton_all_logits

        trial = first_use.Trial(
            lambda: triton_all_logits.all_logits(x, woodbury, constants),
            lambda: portable.dense(x.to(constants.dtype), woodbury, constants),
            lambda found, before: spot_check.of_all_logits(found, x, woodbury, constants),
        )
        return first_use.served("every logit", x, _shape(x, woodbury), trial)


def _shape(x: Tensor, woodbury: Woodbury, *others: Any) -> tuple[Any, ...]:
    """What the machine code of a scan depends on."""
    tokens, (components, _, features) = configs.bucket(min(len(x), 128)), woodbury.rows.shape
    rank = woodbury.cholesky.shape[-1]
    return tokens, configs.bucket(components), features, rank, woodbury.per_component, x.dtype, *others


def gradients_of(
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    grad_log_prob: Tensor | None,
    grad_components: None,
    grad_logits: Tensor | None,
    *others: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of x and the parameters, where they are needed.

    Args:
        saved: x, the parameters, `Woodbury.tensors` and the `ActivePairs` that were found, one tensor after the other;
            then every logit (K, N), if it was kept.
        needs: whether each of the first five needs a gradient; further entries are ignored.
        grad_log_prob, grad_logits: gradients of the loss by these fields of the `ActivePairs`; None where unused.
        grad_components, others: ignored, since these results are integers.
    """
    flags, log_prob, logits = list(needs[:5]), saved[10], saved[12]
    grad_log_prob = torch.zeros_like(log_prob) if grad_log_prob is None else grad_log_prob
    grad_logits = torch.zeros_like(logits) if grad_logits is None else grad_logits
    gradients = torch.ops.mfa_kernels.log_prob_backward(grad_log_prob, grad_logits, *saved[:14], flags, *saved[14:])
    return [g if n else None for g, n in zip(gradients, flags)]


def _component_gradients(saved, needs, grad):
    gradients = torch.ops.mfa_kernels.component_log_prob_backward(grad.contiguous(), *saved, list(needs[:4]))
    return [g if n else None for g, n in zip(gradients, needs)]


PARAMETERS = {**trust.PARAMETERS, "log_weights": "means(K)", **trust.WOODBURY}


@operator(
    "log_prob",
    "-> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts)",
    {"x": "any(N, D)", **PARAMETERS, "slots": "positive"},
    last=("x",),
    fake=lambda given: tuple(ActivePairs.empty(given.x.shape[0], given.slots, given.means)),
    gradient=gradients_of,
    saves=lambda inputs, output: (*inputs[:10], *output),
)
def _log_prob(
    x: Tensor,
    parameters: Parameters,
    woodbury: Woodbury,
    slots: int,
    exact: bool = True,
    scan: ScanRows | None = None,
    rows8: Int8Rows | None = None,
) -> tuple[Tensor, ...]:
    means, loadings, noise_variance, log_weights = parameters
    x = _prepared(x, means, woodbury)
    constants = woodbury.constants(log_weights)
    if woodbury.backend == "cpp":
        return _on_cpu(x, parameters, woodbury, constants, rows8, slots, False)[:4]
    threshold = activity_threshold(means.shape[0], means.dtype)
    size = x.numel() + x.shape[0] * (means.shape[0] // 8 + 2 * slots)
    what, shrink = f"the scan of {x.shape[0]} tokens", "pass fewer tokens x at a time"
    with full_precision(means), explain_out_of_memory(what, size, means.element_size(), shrink):
        if woodbury.backend != "triton":
            return portable.scan(x, woodbury, constants, threshold, slots)
        from mfa_kernels.ops.common import triton_probe
        from mfa_kernels.ops.scan import triton_pipeline
        from mfa_kernels.ops.woodbury import triton_rows

        given = None
        if scan is not None and scan.rows.numel():
            _check_scan(loadings, noise_variance, *scan)
            given = ScanRows(*(t.contiguous() for t in scan))

        def kernel() -> ActivePairs:
            view = triton_rows.scan_rows(woodbury) if given is None else given
            return triton_pipeline.scan(x, woodbury, view, constants, slots, exact)

        def error(found: ActivePairs, before: Sequence[Tensor]) -> float | None:
            allowed = spot_check.ALLOWED if exact else spot_check.ALLOWED_FAST
            spots = spot_check.of_scan(found, x, woodbury, constants, allowed)
            if spots is None or not exact:
                return spots
            return max(spots, triton_probe.of_device(x.device, x.shape[1]))

        trial = first_use.Trial(
            kernel, lambda: portable.scan(x.to(means.dtype), woodbury, constants, threshold, slots), error, careful=True
        )
        return first_use.served("scan", x, _shape(x, woodbury, slots > 16, exact), trial)


def _on_cpu(
    x: Tensor, parameters: Parameters, woodbury: Woodbury, constants: Tensor, rows8: Int8Rows | None, slots: int,
    keep: bool, threshold: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The scan by the C++ kernels: the active pairs, and every logit (K, N), of size 0 where it is not kept."""
    if threshold is None:
        threshold = activity_threshold(len(constants), constants.dtype)
    if rows8 is None or not rows8.rows.numel():
        terms = x, woodbury.rows, constants, woodbury.scale, woodbury.per_component
        return cpp.library().scan(*terms, threshold, slots, keep)
    _check_int8(parameters.loadings, parameters.noise_variance, *rows8)
    rows8 = Int8Rows(*(t.contiguous() for t in rows8))
    active, logits, _ = int8.scan(x, woodbury, constants, rows8, threshold, slots, keep)
    return *active, logits


@operator(
    "log_prob_keeping",
    "-> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts, Tensor kept)",
    {"x": "any(N, D)", **PARAMETERS, "slots": "positive"},
    last=("x",),
    fake=lambda given: (
        *ActivePairs.empty(given.x.shape[0], given.slots, given.means), given.means.new_empty(0, given.x.shape[0])
    ),
    gradient=gradients_of,
    saves=lambda inputs, output: (*inputs[:10], *output),
    devices=("CPU",),
)  # fmt: skip
def _log_prob_keeping(
    x: Tensor, parameters: Parameters, woodbury: Woodbury, slots: int, rows8: Int8Rows | None = None
) -> tuple[Tensor, ...]:
    """`log_prob` before a backward pass: where most tokens have more active components than slots, it keeps every
    logit, which their gradients need."""
    if woodbury.backend != "cpp":
        raise RuntimeError("log_prob_keeping: the C++ kernels, which alone have it, do not serve these rows")
    x, constants = _prepared(x, parameters.means, woodbury), woodbury.constants(parameters.log_weights)
    return _on_cpu(x, parameters, woodbury, constants, rows8, slots, True)


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


_check_int8 = trust.checker(
    "log_prob",
    {
        "loadings": "real(K, D, R)", "noise_variance": "any(D) or any(K, D)",
        "rows8": "int8(K, -(-D // lanes[loadings_dtype]) * lanes[loadings_dtype] // 4, R, 4)",
        "means8": "loadings(K, noise_variance_dims, -(-D // lanes[loadings_dtype]) * lanes[loadings_dtype])",
        "starts8": "int32(K, R)", "terms8": "loadings(K, 2 * R + 5)", "scale8": "loadings(D)",
    },
)  # fmt: skip


@operator(
    "component_log_prob",
    "-> Tensor",
    {"x": "any(N, D)", **trust.PARAMETERS, **trust.WOODBURY},
    last=("x",),
    fake=lambda given: given.means.new_empty(given.x.shape[0], given.means.shape[0]),
    gradient=_component_gradients,
    saves=lambda inputs, output: inputs,
)
def _component_log_prob(
    x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury
) -> Tensor:
    constants = woodbury.constants(torch.zeros_like(woodbury.log_det))
    return dense_logits(_prepared(x, means, woodbury), woodbury, constants).contiguous()


def _new_gradients(
    woodbury: Woodbury, inputs: Sequence[Tensor], needs: list[bool], written: bool = False
) -> list[Tensor | None]:
    """Returns a tensor for every gradient that is needed: zeros, or uninitialised where all of it will be `written`."""

    def new(t: Tensor) -> Tensor:
        if woodbury.backend == "cpp":
            return cpp.library().zeros_like(t)
        make = torch.empty if written else torch.zeros
        return make(t.shape, dtype=woodbury.rows.dtype, device=t.device)

    return [new(t) if needed else None for t, needed in zip(inputs, needs)]


def _results(gradients: list[Tensor | None], x_dtype: torch.dtype, like: Tensor) -> tuple[Tensor, ...]:
    """The gradients as an operator returns them: an empty tensor stands for one that is not needed."""
    grad_x, *others = (like.new_empty(0) if g is None else g for g in gradients)
    return grad_x if gradients[0] is None else grad_x.to(x_dtype), *others


def _fake_gradients(inputs: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else inputs[1].new_empty(0)
        for t, n in zip(inputs, needs)
    )


@operator(
    "log_prob_backward",
    "-> (Tensor grad_x, Tensor grad_means, Tensor grad_loadings, Tensor grad_noise, Tensor grad_log_weights)",
    {
        "grad_log_prob": "means(N)", "grad_logits": "means(N, S)", "x": "any(N, D)", **PARAMETERS,
        "log_prob": "means(N)", "components": "int32(N, S)", "logits": "means(N, S)", "counts": "int32(N)",
        "needs": "5 gradients", "kept": "means(K * (len(kept) > 0), N)",
    },
    last=("x", "components", "grad_log_prob", "grad_logits", "log_prob", "logits", "counts", "needs", "kept"),
    optional=("kept",),
    fake=lambda given: _fake_gradients(
        [given.x, given.means, given.loadings, given.noise_variance, given.log_weights], given.needs
    ),
    gradient=NO_SECOND_DERIVATIVE,
    waits=True,  # for how many tokens have more active components than slots
)  # fmt: skip
def _log_prob_backward(
    grad_log_prob: Tensor, grad_logits: Tensor, x: Tensor, parameters: Parameters, woodbury: Woodbury,
    active: ActivePairs, needs: list[bool], kept: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    means, components = parameters.means, active.components
    if woodbury.backend != "cpp":  # the C++ kernels check the range themselves
        trust.check_range("log_prob_backward", "components", components, -1, len(means))
    x_dtype, x = x.dtype, _prepared(x, means, woodbury)
    fused = woodbury.backend == "triton"
    gradients = _new_gradients(woodbury, [x, *parameters], needs, written=fused)
    slots = components.shape[1]
    overflow_ = active.counts > slots
    # Softmax, not exp(logits - log_prob): log_prob is rounded, and at thousands of nats that costs four digits.
    responsibility = active.logits.softmax(-1).masked_fill(overflow_.unsqueeze(-1), 0)
    # A token that is not finite holds no pairs: its loss is NaN, and it has no gradient.
    weight = torch.where(components >= 0, grad_log_prob.unsqueeze(-1) * responsibility + grad_logits, 0)
    if fused:  # empty slots count with weight 0: to count the others would wait for the device
        tokens = torch.arange(weight.numel(), device=x.device) // slots
        pairs = Pairs(x, tokens, components.flatten())
        accumulate_gradients(pairs, weight.flatten(), woodbury, gradients, add=False)
    else:
        tokens, columns = weight.nonzero(as_tuple=True)
        pairs = Pairs(x, tokens, components[tokens, columns])
        accumulate_gradients(pairs, weight[tokens, columns], woodbury, gradients)
    overflowing = overflow_.nonzero().squeeze(-1)
    if overflowing.numel():
        constants = woodbury.constants(parameters.log_weights)
        least = math.exp(-activity_threshold(means.shape[0], means.dtype))
        for chunk in overflowing.split(_at_once(means)):
            if kept is not None and len(kept):
                r = kept[:, chunk].softmax(0).t()
            else:
                r = dense_logits(x[chunk], woodbury, constants).softmax(-1)
            weight = grad_log_prob[chunk].unsqueeze(-1) * r.masked_fill(r < least, 0)
            overflow.backward(x, chunk, weight, woodbury, gradients)
    return _results(gradients, x_dtype, means)


def _at_once(means: Tensor) -> int:
    """Returns how many tokens go through all components at once, so that their logits and x stay within `CHUNK`."""
    return max(1, CHUNK // max(2 * means.shape[0], means.shape[1]))


@operator(
    "component_log_prob_backward",
    "-> (Tensor grad_x, Tensor grad_means, Tensor grad_loadings, Tensor grad_noise)",
    {"grad": "means(N, K)", "x": "any(N, D)", **trust.PARAMETERS, **trust.WOODBURY, "needs": "4 gradients"},
    last=("x", "grad", "needs"),
    fake=lambda given: _fake_gradients([given.x, given.means, given.loadings, given.noise_variance], given.needs),
    gradient=NO_SECOND_DERIVATIVE,
    waits=True,  # for which weights are zero
)
def _component_log_prob_backward(
    grad: Tensor, x: Tensor, means: Tensor, loadings: Tensor, noise_variance: Tensor, woodbury: Woodbury,
    needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    x_dtype, x = x.dtype, x.to(means.dtype).contiguous()
    gradients = _new_gradients(woodbury, [x, means, loadings, noise_variance], needs)
    for chunk in torch.arange(x.shape[0], device=x.device).split(_at_once(means)):
        overflow.backward(x, chunk, grad[chunk], woodbury, [*gradients, None])
    return _results(gradients, x_dtype, means)
