"""Budgets of float32's error: so many units of rounding of the numbers that are added, as float64 computes them.

A sum of n products is off by at most about n u sum |a_i b_i|, u = eps / 2, in any order; in blocks, lanes and pairs, as
everybody adds today, by far less than n. So the absolute values of what is added, together, are the size of the error
that any good way of adding has, for each entry of a result: `Terms`. How many eps of them is allowed, `ROUNDINGS`, is
one number for all tests, and does not depend on how lucky another float32 computation was on one processor.
tests/helpers/test_budgets.py has the faults that it must catch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.woodbury import reference
from tests.helpers.mixtures import Mixture

EPS = torch.finfo(torch.float32).eps

ROUNDINGS = 8.0
"""Of the terms, in eps, that a float32 result may be off by.

A single squared difference, (x - mu)^2 lam^2, is off by 3.5 of its own eps at most, and entries of one term exist
(D = 1, one pair). tests/helpers/test_budgets.py holds results to half of it over ten seeds.
"""

_VALUES = 1 << 24  # of a token times a component times a feature, at a time


def roundings(found: Tensor, exact: Tensor, terms: Tensor) -> float:
    """The largest error, in eps of its terms; 0 where there is nothing to compare."""
    assert found.shape == exact.shape == terms.shape, f"{found.shape}, {exact.shape}, {terms.shape}"
    if not exact.numel():
        return 0.0
    error = (found.double() - exact.double()).abs()
    least = torch.finfo(torch.float32).tiny
    return (error / (EPS * terms.double()).clamp_min(least)).max().item()


def check(found: Tensor, exact: Tensor, terms: Tensor, name: str = "the result", allowed: float = ROUNDINGS) -> None:
    """Every entry within its budget; NaN is in none."""
    off = roundings(found, exact, terms)
    assert off <= allowed, f"{name} is off by {off:.2f} eps of its terms, where {allowed} is allowed"


class Terms:
    """Sums of the absolute values of the terms of each result, for a mixture and tokens x (N, D); float64.

    Args:
        m: the parameters.
        x: tokens.
        center: c, where x - mu is not formed but (x - c) - (mu - c), the digits of both counting: products of blocks.
    """

    def __init__(self, m: Mixture, x: Tensor, center: Tensor | None = None) -> None:
        self.m, self.x = m.to(torch.float64), x.double()
        self.center = None if center is None else center.double()
        means, loadings, noise, log_weights = self.m
        rows, lower, log_det = reference.woodbury(loadings, noise)
        self.rows, self.a, self.scale = rows, rows.abs(), noise.rsqrt()
        self.own_scale = self.scale.expand_as(means)  # (K, D)
        # L^-1, and what rounding L or substituting with it may do: |L^-1| |L| |L^-1|.
        identity = torch.eye(lower.shape[-1]).to(lower).expand_as(lower)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False).abs()
        self.inverse = inverse + inverse @ lower.abs() @ inverse
        self.constants = log_weights.nan_to_num(0, 0, 0).abs() + 0.5 * (
            means.shape[1] * math.log(2 * math.pi) + noise.log().abs().sum(-1) + (log_det - noise.log().sum(-1)).abs()
        )
        # M of nearly collinear loadings cancels in float64 too: its diagonal times that of its inverse is the factor.
        tau = ((1 + (loadings * self.scale.unsqueeze(-1)).square().sum(1)) * inverse.square().sum(1)).sum(-1)
        self.constants += torch.finfo(torch.float64).eps / EPS * tau
        self.parts = [slice(i, i + self._step()) for i in range(0, max(1, len(x)), self._step())]

    def _step(self) -> int:
        return max(1, _VALUES // max(1, self.m.means.numel()))

    def _of(self, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """|v| (n, K, D), |t| as it is and as it is summed, |L^-T t| as it is summed; of some tokens."""
        x, means = self.x[part].unsqueeze(1), self.m.means
        away = x - means if self.center is None else (x - self.center).abs() + (means - self.center).abs()
        v = away.abs() * self.own_scale
        own = torch.einsum("nkd,krd->nkr", (x - means) * self.own_scale, self.rows).abs()
        summed = torch.einsum("nkd,krd->nkr", v, self.a)
        return v, own, summed, torch.einsum("nkr,krs->nks", summed, self.inverse)

    def _logits(self, part: slice) -> Tensor:
        v, own, summed, _ = self._of(part)
        return self.constants + 0.5 * v.square().sum(-1) + (own * summed).sum(-1)

    def logits(self) -> Tensor:
        """(N, K)."""
        return torch.cat([self._logits(part) for part in self.parts])

    def log_prob(self, truth: Tensor) -> Tensor:
        """(N,), from the exact logits (N, K): those of the components that carry it, and its own size."""
        carried = torch.where(truth == -math.inf, 0, truth.softmax(-1) * self.logits()).sum(-1)
        return carried + truth.logsumexp(-1).abs()

    def t(self) -> Tensor:
        """Returns the part that the loadings explain, A v: (N, K, R)."""
        return torch.cat([self._of(part)[2] for part in self.parts])

    def latents(self) -> Tensor:
        """(N, K, R)."""
        return torch.cat([self._of(part)[3] for part in self.parts])

    def gradients(self, weight: Tensor) -> list[Tensor]:
        """Returns those of gradients of sum_nk w_nk logit_nk, w (N, K): [x, means, loadings, noise, log_weights]."""
        shapes = self.x.shape, *(t.shape for t in self.m)
        grad_x, means, loadings, noise, log_weights = out = [self.x.new_zeros(s) for s in shapes]
        prior = torch.einsum("krd,krs->kds", self.a, self.inverse)
        explained = self.a.square().sum(1)
        for part in self.parts:
            w = weight[part].double().abs()
            v, _, t, z = self._of(part)
            q = v + torch.einsum("nkr,krd->nkd", t, self.a)
            weighted = w.unsqueeze(-1) * q
            grad_x[part] = (weighted * self.own_scale).sum(1)
            means += weighted.sum(0) * self.own_scale
            of_z = torch.einsum("nkd,nkr->kdr", weighted, z)
            loadings += (of_z + w.sum(0)[:, None, None] * prior) * self.own_scale.unsqueeze(-1)
            square = (weighted * q).sum(0) + w.sum(0).unsqueeze(-1) * (1 + explained)
            square = 0.5 * square * self.own_scale.square()
            noise += square if noise.dim() == 2 else square.sum(0)
            log_weights += w.sum(0)
        return out

    def responsibilities(self, truth: Tensor, slots: int = 16) -> Tensor:
        """r (N, K) times what it may be off by, in units, added to one: weights for `gradients` of log p(x).

        d r_k = r_k sum_j r_j (d logit_k - d logit_j): where one component owns the token, nothing. Tokens with more
        active components than slots have exp(logit - log p(x)), with the rounding of both. And a component that is
        not active, as whose responsibility is less than eps / K, is left out.
        """
        r, logits = truth.softmax(-1), self.logits()
        carried = (r * logits).sum(-1, keepdim=True)
        active = truth >= truth.amax(-1, keepdim=True) - activity_threshold(truth.shape[1], torch.float32)
        crowded = active.sum(-1, keepdim=True) > slots
        off = torch.where(crowded, logits + carried, (1 - r) * logits + carried - r * logits)
        return r * (1 + off) + 1 / truth.shape[1]

    def statistics(self, weight: Tensor) -> list[Tensor]:
        """Returns those of EM's sums (csrc/cpu/statistics.h), weights (N, K): mass, shift, ..., cross, squares."""
        (count, features), rank, shared = self.m.means.shape, self.a.shape[1], self.scale.dim() == 1
        new = self.x.new_zeros
        mass, shift, latent, second, cross, squares = out = [
            new(count), new(count, features), new(count, rank), new(count, rank, rank), new(count, rank, features),
            new(count, features)]  # fmt: skip
        for part in self.parts:
            w = weight[part].double().abs()
            v, _, _, z = self._of(part)
            y = v / self.own_scale
            mass += w.sum(0)
            shift += torch.einsum("nk,nkd->kd", w, y)
            latent += torch.einsum("nk,nkr->kr", w, z)
            second += torch.einsum("nk,nkr,nks->krs", w, z, z)
            cross += torch.einsum("nk,nkr,nkd->krd", w, z, y)
            squares += torch.einsum("nk,nkd->kd", w, y.square())
        second += mass[:, None, None] * self.inverse.mT @ self.inverse
        out[5] = squares.sum(0) if shared else squares
        return out
