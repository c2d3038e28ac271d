"""Mixtures and tokens, made on the device that is measured: random, never zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.harness import SETS, Bench
from mfa_kernels import MFA
from mfa_kernels.ops.scan import reference

LLAMA, GEMMA = 4096, 2304
TOKENS, RANK = 16384, 10
RELATIVE_ERROR = 3e-6
"""Of log p(x) against float64 on a few tokens: a fast version that computes something else is not timed."""
_GAP = 200.0
"""Nats between the best and the second logit, about: as near to one-hot as activations of a language model are."""
_CHUNK = 1 << 28


class Shape(NamedTuple):
    """N tokens, K components, D features, R latents."""

    tokens: int
    components: int
    features: int
    rank: int

    @property
    def scan_flops(self) -> int:
        """2 N K (R + 1) D: every token against every row."""
        return 2 * self.tokens * self.components * (self.rank + 1) * self.features

    @property
    def row_bytes(self) -> int:
        """The rows in half precision, bytes: what one token has to read."""
        return 2 * self.components * (self.rank + 1) * self.features


_TOY = Shape(48, 40, 64, 3)


def shape(bench: Bench, components: int, features: int, tokens: int = TOKENS) -> Shape:
    """Returns the sizes of a case; of a rehearsal, toy ones."""
    if bench.rehearsal:
        return _TOY._replace(tokens=min(tokens, _TOY.tokens))
    return Shape(tokens, components, features, RANK)


@dataclass
class Problem:
    """A mixture and `SETS` batches of its own tokens, bfloat16."""

    mfa: MFA
    batches: list[Tensor]

    def parameters(self) -> list[Tensor]:
        """means, loadings, noise_variance, log_weights, without gradients."""
        return [t.detach() for t in self.mfa.parameters_in_compute_dtype()]


def make(
    bench: Bench, shape: Shape, *, diffuse: bool = False, decay: float = 0.0, precision: str = "exact", seed: int = 0
) -> Problem:
    """Tokens respond near one-hot as those of a real model do, or (diffuse) to all components alike.

    The variance of means and loadings falls as i^-decay along the features i = 1, 2, ...: 0 is alike in all directions,
    1 is nearer to activations.
    """
    n, k, d, r = shape
    generator = torch.Generator(bench.device).manual_seed(seed)
    mfa = MFA(k, d, r, precision=precision, device=bench.device)
    with torch.no_grad():
        # Two centroids a distance c sqrt(2 D) apart: a token of one is about c^2 D nats less likely under the other.
        mfa.means.normal_(generator=generator).mul_(0.01 if diffuse else math.sqrt(_GAP / d))
        mfa.loadings.normal_(generator=generator).mul_((9 / d) ** 0.5)
        if decay:
            spectrum = torch.arange(1, d + 1, device=bench.device).pow(-decay)
            spectrum = (spectrum / spectrum.mean()).sqrt()
            mfa.means.mul_(spectrum)
            mfa.loadings.mul_(spectrum.unsqueeze(-1))
        mfa.log_noise.uniform_(math.log(0.5), math.log(1.5), generator=generator)
    return Problem(mfa, [_tokens(mfa, n, generator) for _ in range(SETS)])


@torch.no_grad()
def _tokens(mfa: MFA, count: int, generator: torch.Generator) -> Tensor:
    """Draws from the mixture, (count, D) bfloat16, in slices: the gathered loadings are R times as large."""
    means, loadings = mfa.means.detach(), mfa.loadings.detach()
    k, d, r = loadings.shape
    out = torch.empty(count, d, dtype=torch.bfloat16, device=means.device)
    like = {"generator": generator, "device": means.device}
    for part in out.split(max(1, _CHUNK // (d * max(r, 1)))):
        index = torch.randint(k, (len(part),), **like)
        z = torch.randn(len(part), r, 1, **like)
        x = means[index] + (loadings[index] @ z).squeeze(-1)
        part.copy_(x + mfa.noise_variance.detach().sqrt() * torch.randn(len(part), d, **like))
    return out


@torch.no_grad()
def log_prob_fp64(problem: Problem, x: Tensor) -> Tensor:
    """The formula in float64, in slices of components: it forms n x K x D."""
    means, loadings, noise, log_weights = (t.double() if t.dim() < 2 else t for t in problem.parameters())
    step = max(1, (_CHUNK >> 2) // (means.shape[1] * max(len(x), loadings.shape[2])))
    parts = [
        w + reference.component_log_prob(x.double(), m.double(), a.double(), noise)
        for m, a, w in zip(means.split(step), loadings.split(step), log_weights.split(step))
    ]
    return torch.logsumexp(torch.cat(parts, 1), -1)
