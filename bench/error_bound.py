"""python -m bench.error_bound: the certified bound on the error of log p(x), beside the errors themselves.

Held-out activations (bench/activations.py), float32 against float64 of the same parameters.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from bench import activations
from mfa_kernels.ops.scan import reference


def spread(values: Tensor) -> str:
    return f"{values.median():.2g} nats in the median, {values.amax():.2g} at most"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-K", "--components", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2000)
    activations.add_arguments(parser)
    options = parser.parse_args()
    found = activations.chosen(options)
    mfa, x = found.mixture(options.components), found.split()[1][: options.tokens]
    with torch.no_grad():
        log_prob, bound = mfa.log_prob(x, return_error_bound=True)
        parameters = [p.detach().double() for p in mfa.parameters_in_compute_dtype()]
        exact = torch.cat([reference.log_prob(part.double(), *parameters) for part in x.split(100)])
    error = (log_prob.double() - exact).abs()
    print(f"{len(x)} tokens, K={mfa.n_components} D={mfa.n_features} R={mfa.rank}, {(error > bound).sum()} beyond it")
    print(f"bound: {spread(bound)}\nerror: {spread(error)}")
    print(f"ratio of the medians: {bound.median() / error.median():.0f}")


if __name__ == "__main__":
    main()
