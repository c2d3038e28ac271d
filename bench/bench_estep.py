"""What an E-step costs per token against K: dense, through certified bounds, and the least that candidate sets could.

    python -m bench.bench_estep [--only 512 2048 8192 32768] [--figure estep.svg]

Mixtures as in bench/bench_screen.py: K=512 fitted to activations of the small language model, grown by splitting to
32,768; D=256, R=10. Tokens are samples of the mixture, whose regions overlap as those of real activations do, where it
was grown. Multiply-adds are counted, seconds measured (the smallest of several, in turns).

A candidate set (truncated variational EM, Salwig et al., arXiv 2501.12299) holds C components per token, searched
among the G neighbours of each in a graph of components: C G pairs are computed by themselves. Its floor here is the
cheapest that can work at all: the token's owner known beforehand, and its neighbours in the graph looked at once
(C = 1), G + 1 pairs without any cost for graph or bookkeeping.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import curves
from bench.bench_screen import smallest_times
from bench.screen_survivors import fitted, split
from mfa_kernels import MFA
from mfa_kernels.demo import timed
from mfa_kernels.ops import native
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.select.op import SLOTS, activity_threshold

NEIGHBOURS = 5
"""G: the fewest that the paper's graphs have."""


def pair_latents(x: Tensor, mfa: MFA, components: Tensor) -> Tensor:
    """The latents of candidates (N, C): a kernel for given pairs that does about the work of their logits."""
    from mfa_kernels.ops.pairs.op import latents

    tokens = torch.arange(components.numel()) // components.shape[1]
    parameters = mfa.parameters_in_compute_dtype()[:3]
    return latents(x, tokens, components.flatten().int(), *parameters, mfa.factors())


def measure(mfa: MFA, x: Tensor, repeats: int) -> dict[str, float]:
    """Prints a row of the table; microseconds per token by method."""
    count, features, rank = mfa.n_components, mfa.n_features, mfa.rank
    means, loadings, noise, log_weights = (p.detach() for p in mfa.parameters_in_compute_dtype())
    factors = mfa.factors()
    constants, threshold = factors.constants(log_weights), activity_threshold(count, x.dtype)
    chosen, choosing = timed(lambda: op.choose(x[:256], means, loadings, noise, log_weights, factors))
    if chosen is None:
        print(f"| {count} | the dense scan wins |")
        return {}
    _, stage = timed(lambda: op.screen(means, loadings, noise, log_weights, factors, basis=chosen.basis))

    def dense() -> tuple[Tensor, ...]:
        return native.library().select(x, factors.rows, constants, factors.scale, False, threshold, SLOTS)

    owner = mfa.assign(x)
    near = torch.cdist(means, means).topk(NEIGHBOURS + 1, largest=False).indices  # itself first
    screened = partial(op.select, x, factors, constants, chosen, threshold, SLOTS)
    work = {"dense": dense, "screened": screened, "candidates": partial(pair_latents, x, mfa, near[owner])}
    times = {name: 1e6 * seconds / len(x) for name, seconds in smallest_times(work, repeats).items()}
    evaluated = screened().evaluated
    pairs = torch.where(evaluated < 0, count, evaluated).double().mean().item()
    width, pair = chosen.basis.shape[1], features * (rank + 1)
    flops = {
        "dense": count * pair,
        "screened": width * features + count * width * (rank + 1) + pairs * pair,
        "candidates": (NEIGHBOURS + 1) * pair,
    }
    print(
        f"| {count} | {width} | {pairs:.2f} | "
        + " | ".join(f"{flops[name] / 1e3:.0f} | {times[name]:.1f}" for name in work)
        + f" | {times['screened'] / times['dense']:.2f} | {times['candidates'] / times['dense']:.2f} "
        f"| {1e6 * stage / times['dense']:.0f} | {1e6 * choosing / times['dense']:.0f} |"
    )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", default=[512, 2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mfa_kernels_screen")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    lines: dict[str, list[tuple[float, float]]] = {}
    print(
        "| K | p | logits per token | dense: 1000 multiply-adds | us | screened: 1000 multiply-adds | us "
        "| candidates, floor: 1000 multiply-adds | us | screened / dense | floor / dense "
        "| stage 0, tokens of the dense scan | choice, the same |"
    )
    print("|" + "---|" * 13)
    with torch.no_grad():
        small, real = fitted(512, 256, options.folder)
        for count in options.only:
            if count % small.n_components:
                raise ValueError(f"only must be multiples of {small.n_components}, got {count}")
            mfa = small if count == small.n_components else split(small, count // small.n_components)
            x = real if mfa is small else mfa.sample(options.tokens, torch.Generator().manual_seed(1))
            for name, value in measure(mfa, x[: options.tokens].contiguous(), options.repeats).items():
                lines.setdefault(name, []).append((count, value))
    if options.figure is not None:
        from mfa_kernels.files import atomic_write_text

        atomic_write_text(
            options.figure, curves.svg(lines, "E-step per token, D=256 R=10", across="components", up="microseconds")
        )


if __name__ == "__main__":
    main()
