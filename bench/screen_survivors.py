"""Number of components that screening leaves per token, in plain PyTorch, on mixtures of real activations.

    python -m bench.screen_survivors [--components 512] [--split 8] [--toy]
    python -m bench.screen_survivors --check 100000    # the bounds as computed in int8, against logits in float64

Activations of a real model (bench/activations.py); a mixture fitted to most of them; the bounds
(ops/screen/reference.py) on those held out. Five bounds are compared at each p, all but the last in float64:

    triangle    |A v| <= |A P'P v| + |A (I - P'P)| s, maximised over the norm s that the triangle inequality allows
    rows        the same with the rows of A (I - P'P) told apart: |A v|^2 <= |h|^2 + 2 s sqrt(sum g h^2) + g_max s^2
    marginal    the Mahalanobis distance of the projected token under the projected component, as on a GPU
    rest        |A v|^2 <= |T P v|^2 + nu s^2, from the exact norm s of what is outside: csrc/cpu/screen/screen.h
    int8        that bound as the C++ kernels compute it
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from bench import activations
from mfa_kernels import MFA
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.screen import op, stage_0
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.screen.reference import bounds, rest_bounds
from mfa_kernels.ops.screen.types import Screen
from mfa_kernels.ops.woodbury.reference import woodbury as factors_fp64
from mfa_kernels.ops.woodbury.types import Parameters

ALONE = 64
"""Tokens whose bounds are checked one at a time too: few tokens have kernels of their own."""

_CHUNK = 64  # components at a time


def split(mfa: MFA, children: int, share: float = 0.8) -> MFA:
    """Every component in `children`, whose means take `share` of its covariance and whose loadings keep the rest."""
    generator = torch.Generator().manual_seed(0)
    means, loadings, noise, log_weights = (p.detach() for p in mfa.parameters_in_compute_dtype())
    z = torch.randn(len(means), loadings.shape[2], children, generator=generator)
    grown = means.unsqueeze(1) + share**0.5 * (loadings @ z).mT
    kept = ((1 - share) ** 0.5 * loadings).repeat_interleave(children, 0)
    weights = log_weights.exp().repeat_interleave(children) / children
    return MFA.from_parameters(grown.flatten(0, 1), kept, noise, weights)


def survivors(x: Tensor, mfa: MFA, kept: int, threshold: float) -> dict[str, Tensor]:
    """Components per token that a bound leaves within `threshold` of the best logit, by bound: (N,) each."""
    q = choose_basis(mfa.woodbury(), mfa.log_weights.detach().exp(), kept)
    parameters = Parameters(*(p.detach().double() for p in mfa.parameters_in_compute_dtype()))
    logits = torch.cat([reference.component_log_prob(part, *parameters[:3]) for part in x.split(16)])
    logits += parameters.log_weights
    best, nu = logits.amax(-1, keepdim=True), _nu(parameters, q)
    upper = {
        "marginal": torch.cat([bounds(part, *parameters, q) for part in x.split(16)]),
        **_norm_bounds(x, parameters, q),
        "rest": torch.cat([rest_bounds(part, *parameters, q, nu) for part in x.split(16)]),
        "int8": _int8_bounds(x, mfa, q),
    }
    for name, value in upper.items():
        assert (value >= logits - 1e-6).all(), name
    return {name: (value >= best - threshold).sum(-1).double() for name, value in upper.items()}


def _nu(parameters: Parameters, q: Tensor) -> Tensor:
    """The nu of stage 0 for every component, (K,)."""
    center = stage_0._center(parameters)
    spread = stage_0._spread(parameters, center, q, _CHUNK)
    own = stage_0._whitened(parameters, center, q, slice(None))
    b, covered, _, _ = stage_0._marginal(own, q.shape[1])
    means = own.means - spread.mean
    return stage_0._nu(covered - b @ b.mT, b, means, means @ q, spread)


def _int8_bounds(x: Tensor, mfa: MFA, q: Tensor) -> Tensor:
    parameters, woodbury = mfa.prepared()
    screen = op.screen(parameters, woodbury, basis=q)
    assert isinstance(screen, Screen)
    constants = woodbury.constants(parameters.log_weights)
    return op.bounds(x.to(constants.dtype), woodbury, constants, screen).double()


def _norm_bounds(x: Tensor, parameters: Parameters, q: Tensor) -> dict[str, Tensor]:
    means, loadings, noise, log_weights = parameters
    a, _, log_det = factors_fp64(loadings, noise)
    constants = log_weights - 0.5 * (x.shape[1] * math.log(2 * math.pi) + log_det)
    scale, center = noise.rsqrt(), means.mean(0)
    y, m = (x - center) * scale, (means - center) * scale
    rest = a - a @ q @ q.mT
    g, u = torch.linalg.eigh(rest @ rest.mT)
    g = g.clamp(0, 1 - 1e-9)
    inside = torch.cdist(y @ q, m @ q).square()
    own = (u.mT @ a @ q).flatten(0, 1).mT  # (p, K R), rows turned so that their rests are orthogonal
    h = (y @ q @ own).unflatten(1, g.shape) - torch.einsum("kp,pkr->kr", m @ q, own.unflatten(1, g.shape))
    outside = [(t - t @ q @ q.mT).norm(dim=-1) for t in (y, m)]
    low = (outside[0].unsqueeze(-1) - outside[1]).abs()
    high = outside[0].unsqueeze(-1) + outside[1]
    size, largest = h.square().sum(-1), g[:, -1]
    slopes = {"triangle": (size * largest).sqrt(), "rows": (h.square() * g).sum(-1).sqrt()}
    out = {}
    for name, slope in slopes.items():
        s = (slope / (1 - largest)).maximum(low).minimum(high)
        out[name] = constants - 0.5 * (inside - size + s.square() * (1 - largest) - 2 * s * slope)
    return out


def check(x: Tensor, mfa: MFA, kept: int) -> None:
    """Prints how many computed bounds lie below the logit in float64, and by how much the closest ones lie above."""
    parameters, woodbury = mfa.prepared()
    constants = woodbury.constants(parameters.log_weights)
    screen = op.screen(parameters, woodbury, kept)
    assert isinstance(screen, Screen)
    logits_of = _Logits(parameters)
    x, wide = x.to(constants.dtype), x.double()
    together, alone = _Margins(), _Margins()
    for part, exact in zip(x.split(512), wide.split(512)):
        together.add(op.bounds(part, woodbury, constants, screen), logits_of(exact))
    for one, exact in zip(x[:ALONE].split(1), wide.split(1)):
        alone.add(op.bounds(one, woodbury, constants, screen), logits_of(exact))
    print(f"p={kept}: {together}; of tokens one at a time, {alone}", flush=True)


class _Logits:
    """Every log pi_k + log p(x | k) in float64: the expanded square loses 1e-16 of it, far below what bounds allow."""

    def __init__(self, parameters: Parameters) -> None:
        means, loadings, noise, log_weights = (p.double() for p in parameters)
        self.a, _, log_det = factors_fp64(loadings, noise)
        self.center, self.scale = means.mean(0), noise.rsqrt()
        self.m = (means - self.center) * self.scale
        self.offsets = torch.einsum("krd,kd->kr", self.a, self.m)
        self.constants = log_weights - 0.5 * (means.shape[1] * math.log(2 * math.pi) + log_det)

    def __call__(self, x: Tensor) -> Tensor:
        y = (x - self.center) * self.scale
        t = (y @ self.a.flatten(0, 1).mT).unflatten(1, self.offsets.shape) - self.offsets
        squares = y.square().sum(-1, keepdim=True) - 2 * y @ self.m.mT + self.m.square().sum(-1)
        return self.constants - 0.5 * (squares - t.square().sum(-1))


class _Margins:
    """How far bounds lie above logits."""

    def __init__(self) -> None:
        self.pairs, self.violated = 0, 0
        self.closest = math.inf

    def add(self, upper: Tensor, logits: Tensor) -> None:
        margin = upper.double() - logits
        self.pairs += margin.numel()
        self.violated += int((~(margin >= 0)).sum())  # a bound that is not a number counts
        self.closest = min(self.closest, margin.amin().item())

    def __str__(self) -> str:
        return f"of {self.pairs:.2e} bounds {self.violated} violated, the closest {self.closest:.2e} nats above"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", type=int, default=512)
    activations.add_arguments(parser)
    parser.add_argument("--width", type=int, default=256, choices=[256, 512, 768], help="with --toy")
    parser.add_argument("--split", type=int, default=1, help="children per fitted component; tokens are then sampled")
    parser.add_argument("--check", type=int, default=0, metavar="TOKENS", help="look for violated bounds instead")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    found = activations.chosen(options, options.width)
    mfa, (train, x) = found.mixture(options.components), found.split()
    if options.check:
        for share in (12, 4, 2):
            check(torch.cat([x, train])[: options.check], mfa, -(-mfa.n_features // (16 * share)) * 16)
        return
    if options.split > 1:
        mfa = split(mfa, options.split)
        x = mfa.sample(options.tokens, generator=torch.Generator().manual_seed(1))
    x = x[: options.tokens].double()
    sure = math.log(mfa.n_components / torch.finfo(torch.float32).eps)
    print(f"K={mfa.n_components} D={mfa.n_features} R={mfa.rank}, {len(x)} tokens: mean / median / 95% left")
    widths = sorted({math.ceil(mfa.n_features / (16 * share)) * 16 for share in (24, 16, 12, 8, 16 / 3, 4, 2)})
    for threshold in (12.0, sure):
        for kept in widths:
            counts = survivors(x, mfa, kept, threshold)
            columns = (f"{n} {c.mean():.2f} / {c.median():.0f} / {c.quantile(0.95):.0f}" for n, c in counts.items())
            print(f"T={threshold:4.1f}  p={kept:4d} (D/{mfa.n_features / kept:.1f})  " + "   ".join(columns))


if __name__ == "__main__":
    main()
