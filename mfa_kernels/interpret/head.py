"""The head of a model, from the residual stream to logits, measured on the model itself.

Names in configurations are many (logit_scale, logits_scaling, lm_head_multiplier, final_logit_softcapping, ...), what
they mean differs, and the next architecture brings another. So the model is run once, on a few tokens, with the output
of its final norm replaced by chosen points, and its logits are compared with the unembedding of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.precision import full_precision
from mfa_kernels.data.language_model import (
    check_evaluating,
    decoder_layers,
    hidden_states,
    input_device,
    is_encoder_decoder,
)

# Names of the last normalisation, next to the decoder layers: Llama/Gemma/Qwen/Mistral, GPT-2, GPT-NeoX/OPT, Phi, MPT.
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
_REACHES = (0.0, 1.0, 8.0, 64.0, 512.0)  # largest unembedded value of each point: caps are between 10 and 100
_ROWS = 1024  # of the unembedding that are compared
_ROUNDS = 40  # of fitting scale and cap in turn; each halves the error at least
_NUMBERS = 1 << 24  # in the largest temporary
_POINTS = 4096  # normalised at once


@dataclass(frozen=True, eq=False)
class Head:
    """logits(v) = cap tanh((scale U f(v) + bias) / cap), without the tanh where there is no cap.

    Attributes:
        norm: f, the final norm.
        weight: U, (V, D).
        scale: a number.
        cap: positive, or None.
        bias: (V,) float32, what the logits are before the cap where f(v) = 0.
        ruled_out: (V,) bool, tokens whose logit is -inf whatever v is.
    """

    norm: nn.Module
    weight: Tensor
    scale: float
    cap: float | None
    bias: Tensor
    ruled_out: Tensor

    def normed(self, points: Tensor) -> Tensor:
        """f of points (..., D), in float32."""
        wide = {name: tensor.to(self.weight.device).float() for name, tensor in self.norm.state_dict().items()}
        with full_precision(self.weight):
            return torch.func.functional_call(self.norm, wide, (points.to(self.weight.device, torch.float32),))

    def difference(self, first: Tensor, second: Tensor) -> Tensor:
        """logits(v) - logits(u) of f(v) and f(u), both (D,): (V,) float32."""
        if self.cap is not None:
            high, low = self._logits(torch.stack([first, second]))
            return self._possible(high - low)
        # Linear in f(v): their difference keeps the relative precision of U, whatever their size.
        with full_precision(self.weight):
            return self._possible((self.weight @ (first - second).to(self.weight.dtype)).float() * self.scale)

    def average(self, points: Tensor, shares: Tensor) -> Tensor:
        """Returns the argument of `above` that stands for sum_i shares_i logits(u_i) of points (n, D).

        That of f(u_i), (D,), which serves as well where logits are linear in it; of logits, (V,), under a cap.
        """
        size = _POINTS if self.cap is None else max(1, _NUMBERS // len(self.weight))
        total = torch.zeros(self.weight.shape[1] if self.cap is None else len(self.weight), device=self.weight.device)
        for part, share in zip(points.split(size), shares.to(total).split(size)):
            normed = self.normed(part)
            with full_precision(total):
                total += share @ (normed if self.cap is None else self._logits(normed))
        return total

    def above(self, first: Tensor, average: Tensor) -> Tensor:
        """logits(v) less an `average` of logits, of f(v), (D,): (V,) float32."""
        if self.cap is None:
            return self.difference(first, average)
        return self._possible(self._logits(first.unsqueeze(0)).squeeze(0) - average)

    def _logits(self, normed: Tensor) -> Tensor:
        """logits(v) of f(v), (n, D): (n, V) float32."""
        size = max(1, _NUMBERS // self.weight.shape[1])
        with full_precision(normed):
            raw = torch.cat([normed @ rows.float().T for rows in self.weight.split(size)], -1)
        return _bent(raw.mul_(self.scale).add_(self.bias), self.cap)

    def _possible(self, change: Tensor) -> Tensor:
        """-inf less -inf is no change."""
        return change.masked_fill(self.ruled_out, 0.0)


@torch.no_grad()
def measured(model: nn.Module, features: int, norm: str | None = None) -> Head:
    """The map of a causal language model from `features` features to logits.

    Args:
        model: in evaluation mode; it is run once, on a few tokens.
        features: D of the mixture.
        norm: module path of the final norm; found by itself in the usual architectures when None.

    Raises:
        ValueError: naming the part that is not found, or that does something else than this map.
    """
    weight, (path, final) = _unembedding(model, features), _final_norm(model, norm)
    check_evaluating(model)
    _check_there(model, {"its unembedding": [weight], repr(path): final.parameters()})
    with full_precision(weight):
        return _measured(model, weight, path, final)


def _measured(model: nn.Module, weight: Tensor, path: str, final: nn.Module) -> Head:
    points = _points(weight)
    given, logits = _run(model, path, final, points)
    if logits.shape != (len(points), len(weight)):
        raise ValueError(
            f"model: {type(model).__name__} has logits of shape {tuple(logits.shape)}, expected "
            f"{(len(points), len(weight))}, one for each row of its unembedding"
        )
    ruled_out = (logits == -torch.inf).all(0)
    rows = (~ruled_out).nonzero().squeeze(1)
    rows = rows[torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).round().long().to(rows.device)]
    raw = given.double() @ weight[rows].double().T
    scale, cap, error = _fitted(raw, logits[:, rows].double())
    if not error <= max(1e-4, 8 * torch.finfo(logits.dtype).eps, 8 * torch.finfo(given.dtype).eps):
        raise ValueError(
            f"model: the logits of {type(model).__name__} are not a multiple, soft-capped or not, of its unembedding "
            f"times the output of {path!r} (they differ by {error:.1%}): the lens cannot read it"
        )
    start = logits[0].double().masked_fill(ruled_out, 0.0)
    bias = start if cap is None else cap * (start / cap).clamp(-1 + 1e-12, 1 - 1e-12).atanh()
    return Head(final, weight, scale, cap, bias.float(), ruled_out)


def _check_there(model: nn.Module, weights: Mapping[str, Iterable[Tensor]]) -> None:
    """Raises where weights that are read here are on the meta device, as those that are offloaded between passes."""
    for name, tensors in weights.items():
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"model: {name} of {type(model).__name__} is on the meta device (offloaded, or never loaded), and the "
                "lens reads its weights: load the model with a device_map that keeps it on a device"
            )


def _bent(raw: Tensor, cap: float | None) -> Tensor:
    return raw if cap is None else cap * (raw / cap).tanh()


def _points(weight: Tensor) -> Tensor:
    """Returns the points that replace the output of the final norm, (n, D) float32; their logits reach _REACHES."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(len(_REACHES), weight.shape[1], generator=generator).to(weight.device)
    sample = weight[torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).round().long().to(weight.device)]
    reach = (directions @ sample.float().T).abs().amax(1, keepdim=True).clamp_min(1e-12)
    return directions / reach * torch.tensor(_REACHES, device=weight.device).unsqueeze(1)


def _run(model: Any, path: str, final: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """The points as the model's dtype has them, (n, D), and the model's logits of them, (n, V)."""
    seen: dict[str, Tensor] = {}

    def replace(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.shape != (1, *points.shape):
            raise ValueError(
                f"norm: {path!r} must give one tensor of shape {(1, *points.shape)} for {len(points)} tokens, got "
                f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}"
            )
        seen["read"], seen["normed"] = inputs[0], output
        seen["given"] = points.to(output)
        return seen["given"].unsqueeze(0)

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["last"] = hidden_states(output)

    ids = torch.ones(1, len(points), dtype=torch.long, device=input_device(model))
    both = is_encoder_decoder(model)
    hooks = [final.register_forward_hook(replace)]
    with suppress(ValueError):  # where a norm was named, since the layers are not found
        hooks.append(decoder_layers(model)[1][-1].register_forward_hook(note))
    try:
        logits = model(input_ids=ids, **({"decoder_input_ids": ids} if both else {})).logits
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"model: {type(model).__name__} must run on token ids alone, to see how it makes logits, but raised "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if "given" not in seen:
        raise ValueError(f"norm: {type(model).__name__} does not call {path!r} on its way to the logits")
    last = seen.get("last")
    if last is not None:
        again = final.forward(last) if last.shape == seen["read"].shape else None
        if again is None or not _is_close(again, seen["normed"]):
            raise ValueError(
                f"norm: what {path!r} of {type(model).__name__} reads is not the output of the last layer, so the lens "
                "cannot put activations in its place"
            )
    return seen["given"].to(points.device), logits[0].to(points.device)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.double(), expected.double()
    return bool((found - expected).norm() <= 0.01 * expected.norm())


def _fitted(raw: Tensor, logits: Tensor) -> tuple[float, float | None, float]:
    """Scale and cap that make logits of unembedded points, both (n, rows), the first at 0; and the largest error left.

    The error is relative to the largest logit of a point.
    """
    start, scale = logits[0], _slope(raw[1:2], logits[1:2] - logits[0])
    cap: float | None = None
    at = int(raw[-1].abs().argmax())
    for _ in range(_ROUNDS):
        offset = float(start[at] if cap is None else _unbent(start[at], cap))
        cap = _cap(abs(scale * float(raw[-1, at]) + offset), float(logits[-1, at].abs()))
        if cap is None:
            scale = _slope(raw, logits - start)
            break
        # Where the tanh is flat, a rounding of the logit says nothing.
        scale = _slope(raw, _unbent(logits, cap) - _unbent(start, cap), (1 - (logits / cap).square()).clamp_min(0))
    if cap is None and abs(scale - 1) < 1e-3:
        scale = 1.0  # half precision alone
    bias = start if cap is None else _unbent(start, cap)
    error = (_bent(scale * raw + bias, cap) - logits).abs().amax(1) / logits.abs().amax(1).clamp_min(1e-6)
    return scale, cap, float(error[1:].max().nan_to_num(torch.inf))


def _slope(raw: Tensor, straight: Tensor, trust: Tensor | float = 1.0) -> float:
    """The multiple of one that is nearest to the other, both (n, rows); errors are divided by `trust`."""
    weight = torch.as_tensor(trust).square()
    return float((weight * raw * straight).sum() / (weight * raw.square()).sum().clamp_min(1e-300))


def _unbent(logits: Tensor, cap: float) -> Tensor:
    return cap * (logits / cap).clamp(-1 + 1e-9, 1 - 1e-9).atanh()


def _cap(straight: float, bent: float) -> float | None:
    """The cap that takes one positive number to another; None where it takes nothing from it."""
    if not bent < 0.97 * straight:
        return None
    low, high = bent, 1e3 * straight
    for _ in range(100):
        middle = (low * high) ** 0.5
        value = float(_bent(torch.tensor(straight, dtype=torch.float64), middle))
        low, high = (middle, high) if value < bent else (low, middle)
    return high


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


def _final_norm(model: nn.Module, path: str | None) -> tuple[str, nn.Module]:
    """Path and module of the final norm."""
    if path is not None:
        try:
            return path, model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"norm: {type(model).__name__} has no module {path!r}") from None
    stack = decoder_layers(model)[0]
    above = stack.rpartition(".")[0]
    beside = dict(model.get_submodule(above).named_children())
    for name in _FINAL_NORMS:
        if name in beside:
            return f"{above}.{name}" if above else name, beside[name]
    raise ValueError(
        f"norm: no final norm ({', '.join(_FINAL_NORMS)}) found beside {stack!r} in {type(model).__name__}; "
        "give its module path, as in model.named_modules()"
    )
