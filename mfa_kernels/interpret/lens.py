"""What a region, an axis or a steering intervention does to the next token."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfa_kernels.checks import check_component, check_integer, check_mixture
from mfa_kernels.interpret.contexts import show_token
from mfa_kernels.models import decoder_layers, tokenize

if TYPE_CHECKING:
    from mfa_kernels.mfa import MFA

# Names of the last normalisation, beside the decoder layers: Llama/Gemma/Qwen/Mistral, GPT-2, GPT-NeoX/OPT, Phi, MPT.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
_CHUNK = 4096  # centroids normalised at once


@dataclass(frozen=True)
class TokenChange:
    """A token and by how much a number of it changes.

    Attributes:
        token_id: the token.
        token: as `show_token` gives it; its id as text without a tokenizer.
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

    With U the unembedding and f the final norm, logits(v) = U f(v), and the change that is ranked is

        of the centroid:   logits(mu_k) - sum_i pi_i logits(mu_i), what sets it apart from the average region;
        of the axis w_j:   logits(mu_k + w_j) - logits(mu_k - w_j), from z_j = -1 to z_j = +1, all other z = 0.

    Later layers are left out, as in any logit lens: it says most about layers near the last. A bias of U cancels;
    soft-capping of the logits, which keeps their order, is not applied.

    Args:
        model: a Hugging Face causal language model.
        mfa: a mixture over its residual stream.
        component: k.
        direction: j, the column of W_k; None for the centroid.
        top: tokens at either end.
        tokenizer: to show tokens as text.
        norm: module path of the final norm; found by itself in the usual architectures when None.

    Raises:
        IndexError: component or direction does not exist.
        ValueError: the model has no unembedding of this width, or its final norm is not found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    k = check_component(component, check_mixture(mfa).n_components)
    weight = _unembedding(model, mfa.n_features)
    final = _final_norm(model, norm)
    wide = {name: tensor.float() for name, tensor in final.state_dict().items()}

    def normed(points: Tensor) -> Tensor:
        return torch.func.functional_call(final, wide, (points.to(weight.device, torch.float32),))

    means, loadings, _, log_weights = mfa.parameters_in_compute_dtype()
    if direction is None:
        shares = log_weights.exp().to(weight.device, torch.float32)
        averages = [p @ normed(m) for p, m in zip(shares.split(_CHUNK), means.split(_CHUNK))]
        difference = normed(means[k]) - torch.stack(averages).sum(0)
    else:
        axis = loadings[k, :, check_component(direction, mfa.rank, "direction")]
        difference = normed(means[k] + axis) - normed(means[k] - axis)
    # Logits are linear in f(v): their difference keeps the relative precision of U, whatever their size.
    change = (weight @ difference.to(weight.dtype)).float()
    return LogitLens(*_extremes(change, top, tokenizer))


@torch.no_grad()
def logit_shift(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    steering: Callable[[], AbstractContextManager[Any]],
    top: int = 10,
) -> LogitShift:
    """The next token after a prompt, with steering and without.

    Args:
        model: a Hugging Face causal language model, in evaluation mode.
        tokenizer: its tokenizer.
        prompt: the text that comes before.
        steering: makes the context manager under which the model is steered, such as
            `lambda: steer(model, mfa, layer=8, component=17, alpha=0.4)`.
        top: tokens at either end.

    Raises:
        ValueError: the model is in training mode, or the prompt holds no token.
    """
    if model.training:
        raise ValueError("model is in training mode, where dropout would count as a shift: call model.eval()")
    ids = tokenize(tokenizer, prompt)["input_ids"].to(next(model.parameters()).device)
    if not ids.numel():
        raise ValueError(f"prompt must hold at least one token, got {prompt!r}")

    def next_token() -> Tensor:
        return model(input_ids=ids).logits[0, -1].double().log_softmax(-1)

    plain = next_token()
    with steering():
        steered = next_token()
    # Some models rule tokens out with a logit of -inf, before as after.
    change = torch.where(steered == plain, 0.0, steered - plain)
    return LogitShift(*_extremes(change, top, tokenizer), float((steered.exp() * change).sum()))


def _extremes(change: Tensor, top: int, tokenizer: Any) -> tuple[list[TokenChange], list[TokenChange]]:
    """The tokens with the largest and the smallest change (V,)."""
    check_integer(top, "top", 1)

    def tokens(values: Tensor, ids: Tensor) -> list[TokenChange]:
        return [
            TokenChange(i, str(i) if tokenizer is None else show_token(tokenizer, i), value)
            for i, value in zip(ids.tolist(), values.tolist())
        ]

    top = min(top, len(change))
    return tokens(*change.topk(top)), tokens(*change.topk(top, largest=False))


def _unembedding(model: nn.Module, features: int) -> Tensor:
    """U, (V, D)."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find else None
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"model: {type(model).__name__} has no output embeddings with a floating-point weight (V, D); "
            "a causal language model is expected"
        )
    if weight.shape[1] != features:
        raise ValueError(
            f"model: the unembedding takes {weight.shape[1]} features, but the mixture has {features}: "
            "only mixtures over the residual stream can be read this way"
        )
    return weight


def _final_norm(model: nn.Module, path: str | None) -> nn.Module:
    if path is not None:
        try:
            return model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"norm: {type(model).__name__} has no module {path!r}") from None
    stack = decoder_layers(model)[0]
    beside = dict(model.get_submodule(stack.rpartition(".")[0]).named_children())
    for name in _FINAL_NORMS:
        if name in beside:
            return beside[name]
    raise ValueError(
        f"norm: no final norm ({', '.join(_FINAL_NORMS)}) found beside {stack!r} in {type(model).__name__}; "
        "give its module path, as in model.named_modules()"
    )
