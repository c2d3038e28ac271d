"""Logit lenses: the effect of a region, an axis or a steering intervention on the next token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_component, check_integer, check_mixture, check_model, check_text, shown
from mfa_kernels.data.language_model import check_evaluating, encoded, first_token, is_encoder_decoder
from mfa_kernels.interpret.contexts import show_id, show_token
from mfa_kernels.interpret.head import measured
from mfa_kernels.mixture.functional import compute_dtype

if TYPE_CHECKING:
    from mfa_kernels.mixture.mfa import MFA


@dataclass(frozen=True)
class TokenChange:
    """A token and by how much a number of it changes.

    Attributes:
        token_id: the token.
        token: as `show_token` gives it; without a tokenizer its id, such as "<id 40>".
        change: of its logit (`logit_lens`) or log-probability (`logit_shift`), in nats.
    """

    token_id: int
    token: str
    change: float


@dataclass(frozen=True)
class LogitLens:
    """The tokens whose logits are raised most (top) and lowered most (bottom), largest change first."""

    top: list[TokenChange]
    bottom: list[TokenChange]


@dataclass(frozen=True)
class LogitShift:
    """The tokens whose log-probability rises most and falls most, largest change first.

    Attributes:
        rises, falls: the tokens.
        divergence: KL(steered || not steered) of the next-token distributions, in nats.
    """

    rises: list[TokenChange]
    falls: list[TokenChange]
    divergence: float


@torch.no_grad()
def logit_lens(
    model: nn.Module,
    mfa: MFA,
    component: int,
    *,
    direction: int | None = None,
    top: int = 10,
    tokenizer: Any = None,
    norm: str | None = None,
) -> LogitLens:
    """Reads a region in the vocabulary: its centroid, or one of its axes, through final norm and unembedding.

    With logits(v) the model's own way from its last hidden states to logits, through final norm f and unembedding U,

        logits(v) = s U f(v) + b,    or    c tanh((s U f(v) + b) / c)    where it caps them,

    the change that is ranked is

        of the centroid:   logits(mu_k) - sum_i pi_i logits(mu_i), what sets it apart from the average region;
        of the axis w_j:   logits(mu_k + w_j) - logits(mu_k - w_j), from z_j = -1 to z_j = +1, all other z = 0.

    Scale, bias and cap are measured: the model is run once, on five tokens. Where logits are capped, the average over
    regions takes K V D multiply-adds, for tanh is not linear.

    Later layers are left out, as in any logit lens: it says most about layers near the last.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        mfa: a mixture over its residual stream.
        component: k.
        direction: j, the column of W_k; None for the centroid.
        top: tokens at either end.
        tokenizer: to show tokens as text.
        norm: module path of the final norm; found by itself in the usual architectures when None.

    Raises:
        IndexError: component or direction does not exist.
        ValueError: the model has no unembedding of this width, its final norm is not found, its logits are made in
            another way than this, or it is in training mode.
    """
    check_model(model)
    check_component(component, check_mixture(mfa).n_components)
    if direction is not None:
        check_component(direction, mfa.rank, "direction")
    return Lens(model, mfa, norm).read(component, direction, top, tokenizer)


class Lens:
    """`logit_lens` of a model and a mixture, for several regions: what they share is found once."""

    def __init__(self, model: nn.Module, mfa: MFA, norm: str | None = None) -> None:
        self.mfa, self.head = mfa, measured(model, mfa.n_features, norm)

    @cached_property
    def _average(self) -> Tensor:
        return self.head.average(self.mfa.means, self.mfa.log_weights.exp().float())

    @torch.no_grad()
    def read(self, component: int, direction: int | None, top: int, tokenizer: Any) -> LogitLens:
        mean, head = self.mfa.means[component], self.head
        if direction is None:
            change = head.above(head.normed(mean), self._average)
        else:
            mean, axis = compute_dtype(mean, self.mfa.loadings[component, :, direction])
            change = head.difference(head.normed(mean + axis), head.normed(mean - axis))
        return LogitLens(*_extremes(change, top, tokenizer))


@torch.no_grad()
def logit_shift(
    model: nn.Module, tokenizer: Any, prompt: str, steering: Callable[[], AbstractContextManager[Any]], top: int = 10
) -> LogitShift:
    """The next token after a prompt, with steering and without; of an encoder-decoder, the first that it writes.

    Args:
        model: a Hugging Face causal language model or encoder-decoder, in evaluation mode.
        tokenizer: its tokenizer.
        prompt: the text that comes before.
        steering: makes the context manager under which the model is steered, such as
            `lambda: steer(model, mfa, layer=8, component=17, alpha=0.4)`.
        top: tokens at either end.

    Raises:
        ValueError: the model is in training mode, or the prompt holds no token.
    """
    check_evaluating(check_model(model))
    if not callable(steering):
        hint = ", which steers already" if hasattr(steering, "__enter__") else ""
        raise TypeError(f"steering must be callable, as `lambda: steer(...)` is, got {shown(steering)}{hint}")
    top = check_integer(top, "top", 1)
    inputs = {"input_ids": encoded(model, tokenizer, check_text(prompt, "prompt"))["input_ids"]}
    if not inputs["input_ids"].numel():
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}")
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], first_token(model))

    def next_token() -> Tensor:
        return model(**inputs).logits[0, -1].double().log_softmax(-1)

    plain = next_token()
    made = steering()
    if not hasattr(made, "__enter__"):
        raise TypeError(f"steering must return a context manager, got {shown(made)}")
    with made:
        steered = next_token()
    # Some models rule tokens out with a logit of -inf, before as after.
    change = torch.where(steered == plain, 0.0, steered - plain)
    return LogitShift(*_extremes(change, top, tokenizer), float((steered.exp() * change).sum()))


def _extremes(change: Tensor, top: int, tokenizer: Any) -> tuple[list[TokenChange], list[TokenChange]]:
    """The tokens with the largest and the smallest change (V,)."""
    check_integer(top, "top", 1)

    def tokens(values: Tensor, ids: Tensor) -> list[TokenChange]:
        return [
            TokenChange(i, show_id(i) if tokenizer is None else show_token(tokenizer, i), value)
            for i, value in zip(ids.tolist(), values.tolist())
        ]

    top = min(top, len(change))
    return tokens(*change.topk(top)), tokens(*change.topk(top, largest=False))
