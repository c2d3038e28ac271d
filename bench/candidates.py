"""python -m bench.candidates: how many components the GPU scan leaves to be recomputed, on real activations.

Fits a mixture to activations of the bundled language model, then scans held-out tokens with the Triton kernels: on the
GPU where there is one, else in Triton's interpreter on the CPU (the same arithmetic but for the order of sums).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

from mfa_kernels import fit, harvest
from mfa_kernels.data import tiny_lm
from mfa_kernels.data.tiny_lm.corpus import stdlib_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="to fit on")
    parser.add_argument("-K", "--components", type=int, default=256)
    parser.add_argument("--scanned", type=int, default=256, help="held-out tokens to scan")
    arguments = parser.parse_args()

    model, tokenizer = tiny_lm.load()
    with tempfile.TemporaryDirectory() as folder:
        wanted = arguments.tokens + arguments.scanned
        store = harvest(model, tokenizer, stdlib_texts(), 2, Path(folder) / "store", max_tokens=wanted)
        x = store.rows(torch.arange(len(store)))
    mfa = fit(x[: arguments.tokens], n_components=arguments.components, rank=10, epochs=5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mfa, x = mfa.to(device), x[arguments.tokens :].to(device)

    os.environ["MFA_KERNELS_BACKEND"] = "triton"
    from mfa_kernels.ops import configs
    from mfa_kernels.ops.factors.triton_rows import ScanRows
    from mfa_kernels.ops.select import triton_merge, triton_scan, triton_select, triton_tokens

    mfa.refresh()
    with torch.no_grad():
        factors, constants = mfa.factors(), mfa.factors().constants(mfa.log_weights)
        rows = ScanRows(*factors.scan)
        tokens = triton_tokens.scan_tokens(x, factors.scale, factors.center, rows.rows.shape[-1], False)
        config = configs.configured(configs.Scan, x, len(x), mfa.n_components)
        partials = triton_scan.scan(tokens, rows, constants, config, bounds=True)
        found, crowded = triton_merge.candidates(partials, tokens.norms, mfa.n_components, triton_select.CANDIDATES)
        counts = (found >= 0).sum(-1)[crowded == 0].float()
        half = (partials.upper[..., 0].amax(-1) - partials.lower.amax(-1)) / 2
        fast = mfa.log_prob(x)
        mfa.precision = "fast"
        error = (mfa.log_prob(x) - fast).abs()
    print(f"{len(x)} tokens, K={mfa.n_components}, D={mfa.n_features}, R={mfa.rank}, on {device}")
    print(f"bound on the rounding of the best logit: median {half.median():.2f} nats, largest {half.max():.2f}")
    print(f"candidates per token: mean {counts.mean():.2f}, largest {int(counts.max())}")
    print(f"crowded tokens: {int(crowded.sum())}")
    print(f"error of precision='fast': median {error.median():.3f} nats, largest {error.max():.3f}")


if __name__ == "__main__":
    main()
