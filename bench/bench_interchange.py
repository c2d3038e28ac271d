"""Interchanges of the features of a mixture, per pair: the cost is that of the active pairs, for any number of regions.

python -m pytest bench/bench_interchange.py --benchmark-disable-gc
"""

from __future__ import annotations

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.evaluation import MFAFeaturizer

PAIRS, D, R = 256, 576, 10
COMPONENTS = (64, 512, 4096, 32768)


@pytest.fixture(params=COMPONENTS, scope="module")
def featurizer(request: pytest.FixtureRequest) -> MFAFeaturizer:
    """Random regions far apart: each token is in one of them; of a real model 1.2 are active for it (bench/real.py)."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(request.param, D, generator=generator)
    return MFAFeaturizer(MFA.from_centroids(means, R, noise_variance=0.5, generator=generator).requires_grad_(False))


@pytest.mark.parametrize("what", ["codes", "interchange", "interchange and gradient of the mask"])
def test_interchange(benchmark, featurizer, what):
    x = featurizer.mfa.sample(2 * PAIRS, torch.Generator().manual_seed(1))
    base, source = x[:PAIRS], x[PAIRS:]
    codes = {"base_code": featurizer.code(base), "source_code": featurizer.code(source)}
    mask = torch.full((featurizer.n_masked,), 0.5, requires_grad=what.endswith("mask"))

    def run() -> None:
        if what == "codes":
            featurizer.code(base)
            featurizer.code(source)
            return
        mixed = featurizer.interchange(base, None, mask, **codes)
        if mask.requires_grad:
            mask.grad = None
            mixed.square().sum().backward()

    benchmark.group = f"{what}, {PAIRS} pairs"
    benchmark.extra_info["components"] = featurizer.n_components
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
