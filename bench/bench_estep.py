"""Cost of an E-step per token against K: dense, through certified bounds, and the least that candidate sets could.

    python -m bench.bench_estep [--only 512 2048 8192 32768] [--figure estep.svg] [--toy]

The mixtures and tokens of the curve of bench/bench_screen.py, R=10. The smallest of several times, in turns.

A candidate set (truncated variational EM, Salwig et al., arXiv 2501.12299) holds C components per token, searched
among the G neighbors of each in a graph of components: C G pairs are computed by themselves, and nothing certifies the
others. Its floor here is the cheapest that can work at all: the token's owner known beforehand, and its neighbors in
the graph looked at once (C = 1), G + 1 pairs without any cost for graph or bookkeeping.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import activations, curves
from bench.bench_screen import CHOOSING, FITTED, GROWN, Functions, Prepared, smallest_times
from bench.screen_survivors import split
from mfa_kernels import MFA

NEIGHBORS = 5
"""G: the fewest that the paper's graphs have."""


def pair_latents(x: Tensor, mfa: MFA, components: Tensor) -> Tensor:
    """The latents of candidates (N, C): a kernel for given pairs that does about the work of their logits."""
    from mfa_kernels.ops.pairs.op import latents

    tokens = torch.arange(components.numel()) // components.shape[1]
    parameters = mfa.parameters_in_compute_dtype()[:3]
    return latents(x, tokens, components.flatten().int(), *parameters, mfa.woodbury())


def measure(mfa: MFA, x: Tensor, repeats: int) -> dict[str, float]:
    """Prints a row of the table; microseconds per token by method."""
    prepared = Prepared.of(mfa)
    sample, x = x[:CHOOSING].contiguous(), x[CHOOSING:].contiguous()
    chosen = prepared.chosen(sample)
    if chosen is None:
        print(f"| {mfa.n_components} | the dense scan wins |")
        return {}
    near = torch.cdist(mfa.means, mfa.means).topk(NEIGHBORS + 1, largest=False).indices  # itself first
    work: Functions = {
        "dense": partial(prepared.dense, x),
        "screened": partial(prepared.screened, x, chosen),
        "candidates": partial(pair_latents, x, mfa, near[mfa.assign(x)]),
    }
    times = {name: 1e6 * value / len(x) for name, value in smallest_times(work, repeats).items()}
    row = [f"{mfa.n_components}", *(f"{value:.1f}" for value in times.values())]
    print("| " + " | ".join(row) + " |", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", default=[512, 2048, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    activations.add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: dict[str, list[tuple[float, float]]] = {}
    print("| K | dense, us per token | screened | candidates, floor |")
    print("|" + "---|" * 4)
    with torch.no_grad():
        for count in options.only:
            split_by = max(1, count // FITTED[-1])
            if count // split_by not in FITTED or split_by not in (1, *GROWN):
                raise ValueError(f"only must be of {FITTED} or {GROWN} times the last of them, got {count}")
            found = activations.chosen(options, 768)
            mfa, x = found.mixture(count // split_by), found.split()[1]
            if split_by > 1:
                mfa = split(mfa, split_by)
            for name, value in measure(mfa, x[: options.tokens + CHOOSING], options.repeats).items():
                lines.setdefault(name, []).append((count, value))
    if options.figure is not None:
        from mfa_kernels.common.files import atomic_write_text

        atomic_write_text(
            options.figure,
            curves.svg(
                lines, f"E-step per token, D={mfa.n_features} R={mfa.rank}", across="components", up="microseconds"
            ),
        )


if __name__ == "__main__":
    main()
