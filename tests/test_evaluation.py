from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels.evaluation import evaluate
from tests.test_mfa import module


def test_against_the_definitions():
    mfa = module(6, 10, 2)
    x = mfa.sample(300, generator=torch.Generator().manual_seed(0))
    centroids = x[:4].clone()
    score = evaluate(mfa, x, centroids, progress=False)
    assert score.rows == 300
    assert score.skipped == 0
    assert score.nll == pytest.approx(mfa(x).item(), rel=1e-10)
    error = (mfa.reconstruct(x) - x).square()
    assert score.mse == pytest.approx(error.mean().item(), rel=1e-8)
    spread = (x - x.mean(0)).square().sum()
    assert score.fvu == pytest.approx((error.sum() / spread).item(), rel=1e-8)
    nearest = torch.cdist(x, centroids).min(-1).values.square()
    assert score.kmeans_mse == pytest.approx(nearest.sum().item() / x.numel(), rel=1e-6)
    assert score.kmeans_live == len(torch.cdist(x, centroids).argmin(-1).unique())
    assert score.kmeans_fvu == pytest.approx((nearest.sum() / spread).item(), rel=1e-6)
    assert score.live == mfa.assign(x).unique().numel()
    assert 1 <= score.active <= 6
    assert score.tokens_per_second > 0


def test_bad_rows_are_skipped_and_counted():
    mfa = module(6, 10, 2)
    x = mfa.sample(50)
    clean = evaluate(mfa, x, progress=False)
    spoiled = torch.cat([x[:20], torch.full((3, 10), math.nan), x[20:]]).double()
    score = evaluate(mfa, spoiled, progress=False)
    assert score.skipped == 3
    assert score.nll == pytest.approx(clean.nll)
    assert score.kmeans_mse is None
    assert score.kmeans_live is None


def test_bad_arguments():
    mfa = module(6, 10, 2)
    with pytest.raises(ValueError, match="activations have 9 features, but the mixture has 10"):
        evaluate(mfa, torch.zeros(5, 9))
    with pytest.raises(ValueError, match="no row is finite"):
        evaluate(mfa, torch.full((5, 10), math.nan), progress=False)
