"""Calibration of alpha: how far to steer for a given change of the next-token distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_callable, check_model, check_positive, shown
from mfa_kernels.data.language_model import check_evaluating, check_loaded, is_encoder_decoder, without_notes
from mfa_kernels.steering.handle import Handle

_HALVINGS = 60  # more than the 24 bits of a float32 alpha: after so many, KL must jump, as it can at a gate
_FIRST = 2.0**-6  # the search goes up from this part of `most`, because far out KL need not grow with alpha


@torch.no_grad()
def alpha_for_kl(
    model: nn.Module,
    inputs: Mapping[str, Any],
    handle: Handle,
    kl: float,
    *,
    spec: Callable[[float], Any] | None = None,
    most: float = 1.0,
    tolerance: float = 1e-3,
) -> float:
    """Returns the least alpha in (0, most] that moves the next-token distribution by `kl`, bracketed and then bisected.

    The measure is KL(steered || unsteered) in nats, of the token after each row's last prompt token, averaged over the
    rows. "Unsteered" is the model with this handle paused and other handles at work. At equal KL, ways to steer can be
    compared.

    Args:
        model: the model that the handle steers, in evaluation mode.
        inputs: keyword arguments of its forward: input_ids (B, T), attention_mask (B, T) where there is padding; of an
            encoder-decoder, also decoder_input_ids (B, T), whose last token is the one that counts.
        handle: made by `steer`; it is left as it was.
        kl: nats, positive.
        spec: a function from alpha to interventions, for a handle that was made from `interventions` or `rows`, such as
            `lambda alpha: [Toward(3, alpha), Offset(3, z)]`. Without it, the handle's alpha is varied.
        most: largest alpha tried, in doublings; interpolation reaches its target at 1.
        tolerance: relative error allowed of the KL found.

    Raises:
        ValueError: the model is in training mode, the KL at `most` is too small, or KL jumps over the value, as it can
            where a gate opens.
    """
    if not isinstance(handle, Handle):
        raise TypeError(f"handle must be what `steer` returned, got {type(handle).__name__}")
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        raise TypeError(f"inputs must be a mapping with input_ids, as a tokenizer returns it, got {shown(inputs)}")
    target, most = check_positive(kl, "kl"), check_positive(most, "most")
    tolerance = check_positive(tolerance, "tolerance")
    if spec is not None:
        check_callable(spec, "spec")
    check_model(model)
    if handle.is_removed:
        raise ValueError("handle must steer, got one that was removed: call steer again")
    check_evaluating(model)
    check_loaded(model)
    inputs = without_notes(model, inputs)
    row = _last_tokens(model, inputs)

    def log_probs() -> Tensor:
        logits = model(**inputs).logits
        return logits[torch.arange(len(logits), device=logits.device), row.to(logits.device)].double().log_softmax(-1)

    with handle.paused():
        unsteered = log_probs()

    def divergence(alpha: float) -> float:
        handle.update(**({"alpha": alpha} if spec is None else {"interventions": spec(alpha)}))
        steered = log_probs()
        return float((steered.exp() * (steered - unsteered)).sum(-1).mean())

    with handle.restored():
        low, alpha = 0.0, most * _FIRST
        while (reached := divergence(alpha)) < target * (1 - tolerance):
            if alpha == most:
                raise ValueError(f"kl: at alpha = {most} it is {reached:.4g} nats, less than {target}; raise `most`")
            low, alpha = alpha, min(2 * alpha, most)
        high = alpha
        for _ in range(_HALVINGS):
            if abs(reached - target) <= tolerance * target:
                return alpha
            low, high = (alpha, high) if reached < target else (low, alpha)
            alpha = (low + high) / 2
            reached = divergence(alpha)
    raise ValueError(f"kl jumps over {target}: it is {reached:.4g} nats at alpha = {alpha}")


def _last_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the column of each row's last real token, (B,), among the decoder's where there is an encoder."""
    of = "decoder_" if is_encoder_decoder(model) else ""
    ids, mask = inputs.get(f"{of}input_ids", inputs.get(f"{of}inputs_embeds")), inputs.get(f"{of}attention_mask")
    if ids is None:
        raise ValueError(f"inputs must hold {of}input_ids, (B, T), got {', '.join(inputs) or 'nothing'}")
    if mask is None:
        return torch.full((ids.shape[0],), ids.shape[1] - 1, device=ids.device)
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask != 0, columns, -1).amax(1)
