"""python -m bench.candidates: how many components the GPU scan leaves to be recomputed, on real activations.

Takes a mixture fitted to activations (bench/activations.py), and scans held-out tokens with the Triton kernels: on the
GPU where there is one, else in Triton's interpreter on the CPU (the same arithmetic but for the order of sums). Then
the same tokens are screened, through bounds from p coordinates.
"""

from __future__ import annotations

import argparse
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

from bench import activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    activations.add_arguments(parser)
    parser.add_argument("-K", "--components", type=int, default=512)
    parser.add_argument("--scanned", type=int, default=256, help="held-out tokens to scan")
    parser.add_argument("--screen", type=int, nargs="*", default=[32, 64], metavar="P", help="coordinates to screen by")
    arguments = parser.parse_args()

    found = activations.chosen(arguments)
    mfa, x = found.mixture(arguments.components), found.split()[1][: arguments.scanned]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mfa, x = mfa.to(device), x.to(device)

    os.environ["MFA_KERNELS_BACKEND"] = "triton"
    from mfa_kernels.ops.common import configs, triton_tokens
    from mfa_kernels.ops.scan import triton_merge, triton_pipeline, triton_scan
    from mfa_kernels.ops.scan.types import activity_threshold
    from mfa_kernels.ops.screen import triton_screen
    from mfa_kernels.ops.screen.basis import basis
    from mfa_kernels.ops.woodbury.types import ScanRows

    mfa.refresh()
    with torch.no_grad():
        woodbury, constants = mfa.woodbury(), mfa.woodbury().constants(mfa.log_weights)
        rows = ScanRows(*woodbury.scan)
        tokens = triton_tokens.scan_tokens(x, woodbury.scale, woodbury.center, rows.rows.shape[-1], False)
        config = configs.configured(configs.Scan, x, len(x), mfa.n_components)
        partials = triton_scan.scan_tiles(tokens, rows, constants, config, bounds=True)
        found, crowded = triton_merge.candidates(partials, tokens.norms, mfa.n_components, triton_pipeline.CANDIDATES)
        counts = (found >= 0).sum(-1)[crowded == 0].float()
        half = (partials.upper[..., 0].amax(-1) - partials.lower.amax(-1)) / 2
        fast = mfa.log_prob(x)
        mfa.precision = "fast"
        error = (mfa.log_prob(x) - fast).abs()
        parameters, threshold = mfa.parameters_in_compute_dtype(), activity_threshold(mfa.n_components, torch.float32)
        screened = {}
        for kept in arguments.screen:
            q = basis(woodbury, mfa.log_weights.exp(), kept)
            screen = triton_screen.screen(*parameters[:3], woodbury, q)
            found = triton_screen.scan(x, woodbury, constants, screen, threshold, 16)
            assert found.dropped.max() <= 2e-7
            torch.testing.assert_close(found.active.log_prob, fast, rtol=1e-5, atol=0)
            screened[kept] = found.evaluated.cpu()
    print(f"{len(x)} tokens, K={mfa.n_components}, D={mfa.n_features}, R={mfa.rank}, on {device}")
    print(f"bound on the rounding of the best logit: median {half.median():.2f} nats, largest {half.max():.2f}")
    print(f"candidates per token: mean {counts.mean():.2f}, largest {int(counts.max())}")
    print(f"crowded tokens: {int(crowded.sum())}")
    print(f"error of precision='fast': median {error.median():.3f} nats, largest {error.max():.3f}")
    for kept, evaluated in screened.items():
        few = evaluated[evaluated > 0].float()
        print(
            f"screened by p={kept}: {few.mean():.2f} logits computed per token, median {few.median():.0f}, "
            f"largest {few.max():.0f}; {int((evaluated < 0).sum())} tokens took the dense scan"
        )


if __name__ == "__main__":
    main()
