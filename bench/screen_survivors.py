"""Number of components that screening leaves per token, in plain PyTorch, on mixtures of real activations.

    python -m bench.screen_survivors [--components 512] [--split 8] [--toy]
    python -m bench.screen_survivors --check 100000    # the bounds as computed in float32, against logits in float64

Activations of a real model (bench/activations.py); a mixture fitted to most of them; the bounds
(ops/screen/reference.py) on those held out. Three bounds are compared at each p:

    triangle    |A v| <= |A P'P v| + |A (I - P'P)| s, maximised over the norm s that the triangle inequality allows
    rows        the same with the rows of A (I - P'P) told apart: |A v|^2 <= |h|^2 + 2 s sqrt(sum g h^2) + g_max s^2
    marginal    the Mahalanobis distance of the projected token under the projected component: csrc/cpu/screen/bounds.h
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from bench import activations
from mfa_kernels import MFA
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.screen.reference import bounds
from mfa_kernels.ops.woodbury.reference import woodbury as factors_fp64
from mfa_kernels.ops.woodbury.types import Parameters

PIVOTS = 8
"""Components per token whose lists are checked: the best one, and others at random."""


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
    means, loadings, noise, log_weights = (p.detach().double() for p in mfa.parameters_in_compute_dtype())
    parameters = (means, loadings, noise, log_weights)
    logits = log_weights + torch.cat([reference.component_log_prob(part, *parameters[:3]) for part in x.split(16)])
    best = logits.amax(-1, keepdim=True)
    marginal = torch.cat([bounds(part, *parameters, q) for part in x.split(16)])
    assert (marginal >= logits - 1e-6).all()
    upper = {"marginal": marginal, **_norm_bounds(x, parameters, q)}
    return {name: (value >= best - threshold).sum(-1).double() for name, value in upper.items()}


def _norm_bounds(x: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], q: Tensor) -> dict[str, Tensor]:
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
    """Prints how many computed bounds lie below the logit in float64, and by how much the closest ones lie above; and
    how many components are within the threshold of a pivot although its list rules them out for a token so near."""
    means, loadings, noise, log_weights = (p.detach() for p in mfa.parameters_in_compute_dtype())
    woodbury = mfa.woodbury()
    constants = woodbury.constants(log_weights)
    parameters = Parameters(means, loadings, noise, log_weights)
    screen = op.screen(parameters, woodbury, kept)
    lists = op.with_neighbors(screen, parameters, woodbury).neighbors
    assert lists is not None
    onsets = lists.horizons.unsqueeze(-1).repeat(1, mfa.n_components)
    onsets = onsets.scatter(1, lists.neighbors.long(), lists.onsets).double().fill_diagonal_(0)
    a, _, log_det = factors_fp64(loadings.double(), noise.double())
    center, scale = means.double().mean(0), noise.double().rsqrt()
    m = (means.double() - center) * scale
    offsets = torch.einsum("krd,kd->kr", a, m)
    wide = log_weights.double() - 0.5 * (x.shape[1] * math.log(2 * math.pi) + log_det)
    generator = torch.Generator().manual_seed(2)
    violated, least, wrong, ruled_out = {"marginal": 0, "line": 0}, math.inf, 0, 0
    for part in x.split(512):
        y = (part.double() - center) * scale  # the expanded square: 1e-16 of it is far below a float32's slack
        t = (y @ a.flatten(0, 1).mT).unflatten(1, offsets.shape) - offsets
        distance = y.square().sum(-1, keepdim=True) - 2 * y @ m.mT + m.square().sum(-1) - t.square().sum(-1)
        logits = wide - 0.5 * distance
        for name, by_lines in (("marginal", False), ("line", True)):
            margin = op.bounds(part, woodbury, constants, screen, by_lines).double() - logits
            violated[name] += int((margin < 0).sum())
            least = min(least, margin.amin().item())
        pivots = torch.randint(mfa.n_components, (len(part), PIVOTS), generator=generator)
        pivots[:, 0] = logits.argmax(-1)
        for pivot in pivots.mT:
            own = logits.gather(1, pivot.unsqueeze(-1))
            nearer = (2 * (wide[pivot].unsqueeze(-1) - own)).sqrt() < onsets[pivot]
            ruled_out += int(nearer.sum())
            wrong += int((nearer & (logits >= own - lists.threshold)).sum())
    pairs = len(x) * mfa.n_components
    print(
        f"p={kept}: of {pairs:.2e} bounds {violated} violated, the closest {least:.2e} nats above; of {ruled_out:.2e} "
    )
    print(f"       components ruled out by lists, {PIVOTS} pivots a token, {wrong} within the threshold", flush=True)


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
        for share in (12, 4, 1):
            check(torch.cat([x, train])[: options.check], mfa, -(-mfa.n_features // (16 * share)) * 16)
        return
    if options.split > 1:
        mfa = split(mfa, options.split)
        x = mfa.sample(options.tokens, generator=torch.Generator().manual_seed(1))
    x = x[: options.tokens].double()
    sure = math.log(mfa.n_components / torch.finfo(torch.float32).eps)
    print(f"K={mfa.n_components} D={mfa.n_features} R={mfa.rank}, {len(x)} tokens: mean / median / 95% left")
    for threshold in (12.0, sure):
        for share in (24, 16, 12, 8, 16 / 3, 4, 2):
            kept = math.ceil(mfa.n_features / (16 * share)) * 16
            counts = survivors(x, mfa, kept, threshold)
            columns = (f"{n} {c.mean():.2f} / {c.median():.0f} / {c.quantile(0.95):.0f}" for n, c in counts.items())
            print(f"T={threshold:4.1f}  p={kept:4d} (D/{mfa.n_features / kept:.1f})  " + "   ".join(columns))


if __name__ == "__main__":
    main()
