"""Tokens, evidence and edits for the operator that steers, and what the oracle makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ops.intervene import reference
from mfa_kernels.ops.intervene.op import Edit
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, mixture, tokens

# What is done, beyond scale x + shift: (weight, spread, latents, norm).
WAYS = {
    "fixed": (0.0, 0.0, False, False),
    "norm": (0.0, 0.0, False, True),
    "means": (0.4, 0.0, False, False),
    "latents": (0.4, 0.0, True, False),
    "spread": (0.0, -0.7, False, False),
    "all": (0.4, 0.6, True, True),
}


class Case(NamedTuple):
    """One call of the operator; row b of the batch has the gate of kind b % 6."""

    mixture: Mixture
    hidden: Tensor
    edit: Edit
    chosen: Tensor | None
    passed: Tensor | None
    active: ActivePairs
    way: str

    @property
    def mixes(self) -> bool:
        return self.way not in ("fixed", "norm")

    def arguments(self, woodbury: Woodbury | None = None) -> tuple:
        """Of `op.intervene`."""
        of = (self.mixture[:3], woodbury or self.mixture.woodbury()) if self.mixes else (None, None)
        return self.hidden, self.edit, self.chosen, self.passed, self.active, *of

    def operands(self) -> list[Any]:
        """Of `torch.ops.mfa_kernels.intervene`."""
        f, m = self.mixture.woodbury(), self.mixture
        of = (m.means, m.loadings, f.rows, f.cholesky, f.scale) if self.mixes else (None,) * 5
        per_component = self.mixes and f.per_component
        return [self.hidden, *self.edit, self.chosen, self.passed, *self.active, *of, per_component]

    def terms(self) -> Tensor:
        """What the absolute values of what is added come to, (B, T, D); where nothing is done, the token itself."""
        batch, count, features = self.hidden.shape
        means, loadings = self.mixture.means.double().abs(), self.mixture.loadings.double().abs()
        x, (scale, weight, spread) = self.hidden.double(), self.edit.coefficients.double().abs().unbind(-1)
        r, active = self.responsibilities(torch.float64), self.active
        sizes = Terms(self.mixture, x.reshape(-1, features).nan_to_num()).latents() if self.mixes else None
        plain = self._replace(edit=self.edit._replace(rules=self.edit.rules * torch.tensor([1, 1, 0]).int()))
        before, out = plain.oracle()[0], x.abs().clone()
        for b in range(batch):
            row = b * scale.shape[0] // batch
            for t in range(count):
                n, at = b * count + t, min(t, scale.shape[1] - 1)
                size = scale[row, at] * x[b, t].abs() + self.edit.shift[row, at].double().abs()
                for slot, k in enumerate(active.components[n].tolist() if sizes is not None else []):
                    if k < 0:
                        continue
                    z = spread[row, at] * sizes[n, k]
                    z = z if self.edit.latents is None else z + self.edit.latents[row, at].double().abs()
                    # r itself is as uncertain as the logits that it is made of.
                    off = 1 + active.logits[n, slot].double().abs() + active.log_prob[n].double().abs()
                    size = size + r[n, slot] * off * (weight[row, at] * means[k] + loadings[k] @ z)
                if self.edit.rules[b * len(self.edit.rules) // batch, 2] and before[b, t].norm() > 0:
                    size = size + before[b, t].abs() * (1 + size.norm() / before[b, t].norm())
                    size = size * (x[b, t].norm() / before[b, t].norm())
                out[b, t] = out[b, t] + size
        return out

    def responsibilities(self, dtype: torch.dtype) -> Tensor:
        """r of the slots, (N, C), in one dtype."""
        logits, log_prob = self.active.logits.to(dtype), self.active.log_prob.to(dtype).unsqueeze(-1)
        is_full = (self.active.counts > logits.shape[1]).unsqueeze(-1)
        return torch.where(is_full, (logits - log_prob).exp(), logits.softmax(-1))

    def oracle(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Steered states and tally by the definitions, in one dtype throughout."""
        batch, count, _ = self.hidden.shape
        parameters = tuple(t.to(dtype) for t in self.mixture[:3]) if self.mixes else None
        out, tally = self.hidden.to(dtype).clone(), torch.zeros(batch, count, 3, dtype=torch.float64)
        responsibilities = self.responsibilities(dtype)

        def at(value: Tensor, b: int, t: int) -> Tensor:
            return value[b * value.shape[0] // batch][min(t, value.shape[1] - 1)]

        for b in range(batch):
            kind, region, keep = at(self.edit.rules.unsqueeze(1), b, 0).tolist()
            for t in range(count):
                n = b * count + t
                log_prob, r = self.active.log_prob[n].to(dtype), responsibilities[n]
                seen = (r * (self.active.components[n] == region)).sum().item()
                chosen = self.chosen is None or bool(at(self.chosen, b, t))
                threshold = self.edit.thresholds[b * len(self.edit.thresholds) // batch].item()
                reached = chosen and (self.passed is None or bool(self.passed[b, t]))
                reached = reached and reference.passes(kind, seen, log_prob.item(), threshold)
                looked = chosen and region >= 0 and not math.isnan(seen)
                tally[b, t] = torch.tensor([reached, seen if looked else 0.0, looked], dtype=torch.float64)
                if reached:
                    z = self.edit.latents
                    out[b, t] = reference.steered(
                        out[b, t], at(self.edit.coefficients, b, t).to(dtype), at(self.edit.shift, b, t).to(dtype),
                        None if z is None else at(z, b, t).to(dtype), bool(keep),
                        self.active.components[n], r, parameters,
                    )  # fmt: skip
        return out, tally


def case(
    way: str = "all",
    batch: int = 6,
    count: int = 3,
    shape: tuple[int, int, int] = (5, 33, 3),
    *,
    slots: int = 3,
    per_component: bool = False,
    dtype: torch.dtype = torch.float64,
    hidden_dtype: torch.dtype | None = None,
    rows: int | None = None,
    steps: bool = False,
    mask: tuple[int, int] | None = None,
    passes: bool = False,
    finite: bool = False,
) -> Case:
    """Token 1 is not finite unless all are; token 2 has more active components than slots; some slots are empty.

    Args:
        shape: K, D, R.
        rows: how many the edit distinguishes; all of the batch if None.
        steps: whether the edit differs between positions.
        mask: shape of `chosen`.
    """
    k, d, r = shape
    m = mixture(k, d, r, per_component=per_component, dtype=dtype)
    generator = torch.Generator().manual_seed(4)
    n, rows, at = batch * count, batch if rows is None else rows, count if steps else 1
    x = tokens(m, n).to(hidden_dtype or dtype)
    if n > 1 and not finite:
        x[1, d // 2] = math.nan
    components = torch.stack([torch.randperm(max(k, slots), generator=generator)[:slots] for _ in range(n)] or [
        torch.empty(slots, dtype=torch.int64)])[:n].int()  # fmt: skip
    components[components >= k] = -1
    held = torch.rand(n, slots, generator=generator) < 0.7
    held[:, 0] = True
    held &= components >= 0
    if not finite:
        held[1:2] = False
    components = torch.where(held, components, -1)
    logits = torch.randn(n, slots, generator=generator, dtype=torch.float64) - 20
    logits = torch.where(held, logits, -math.inf).to(dtype)
    full = torch.arange(n) == 2
    log_prob = torch.where(full, torch.logaddexp(logits.logsumexp(-1), logits[:, 0]), logits.logsumexp(-1))
    log_prob = torch.where(held.any(-1), log_prob, math.nan)
    counts = torch.where(full, slots + 1, held.sum(-1)).int()
    weight, spread, has_latents, norm = WAYS[way]
    wide = torch.promote_types(x.dtype, dtype)
    coefficients = torch.tensor([0.7, weight, spread], dtype=wide).expand(rows, at, 3).clone()
    coefficients[..., 0] += 0.1 * torch.rand(rows, at, generator=generator)
    rules = torch.tensor([[b % 6, (b * 2) % k if b % 4 else -1, int(norm and b % 3 != 1)] for b in range(rows)])
    thresholds = torch.where(rules[:, 0] < 3, 0.3, -20.0).to(dtype)
    rules[(rules[:, 0] > 0) & (rules[:, 0] < 3), 1] = 0
    edit = Edit(
        coefficients,
        torch.randn(rows, at, d, generator=generator).to(wide),
        rules.reshape(rows, 3).int(),
        thresholds,
        norm,
        torch.randn(rows, at, r, generator=generator).to(dtype) if has_latents else None,
        spread != 0,
    )
    chosen = None if mask is None else torch.rand(mask, generator=generator) < 0.7
    passed = torch.rand(batch, count, generator=generator) < 0.7 if passes else None
    return Case(
        m, x.view(batch, count, d), edit, chosen, passed, ActivePairs(log_prob, components, logits, counts), way
    )


def same(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> bool:
    """True where tensors are equal, NaN in the same places."""
    return all(torch.equal(f.nan_to_num(7), w.nan_to_num(7)) for f, w in zip(found, wanted))


def within_budget(found: Tensor, exact: Tensor, terms: Tensor, roundings: float = 0.5) -> None:
    """A few roundings of the terms in float32; and then one rounding to a half, half a unit in the last place."""
    eps = torch.finfo(found.dtype).eps if found.dtype in (torch.bfloat16, torch.float16) else 0.0
    assert torch.equal(found.isnan(), exact.isnan())
    found, exact, terms = (t.double().nan_to_num() for t in (found, exact, terms))
    once = roundings * eps * exact.abs()  # what is left of the error beside it is that of float32
    error = (found - exact).abs()
    budgets.check(exact + (error - once).clamp_min(0), exact, (1 + eps) * terms)
