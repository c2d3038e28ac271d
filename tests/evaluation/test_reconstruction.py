from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mfa_kernels.evaluation import Evaluation, evaluate, score_table
from tests.mixture.test_mfa import module


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


@pytest.mark.parametrize("rows", [1, 50])
def test_of_rows_that_do_not_vary_no_variance_is_explained(rows):
    mfa = module(6, 10, 2)
    x = mfa.sample(1).expand(rows, -1)
    score = evaluate(mfa, x, x[:1] + 1, progress=False)
    assert score.mse > 0
    assert score.kmeans_mse == pytest.approx(1)
    assert score.fvu is None
    assert score.kmeans_fvu is None
    assert score_table(score, 6, "rows").count("they do not vary") == 2


SCORE = Evaluation(
    rows=20000, skipped=0, nll=604.7, mse=5.1963, fvu=0.15, kmeans_mse=14.7259, kmeans_fvu=0.426, kmeans_live=253,
    live=254, active=1.09, tokens_per_second=1.81845e6,
)  # fmt: skip


def test_table_of_both():
    table = score_table(SCORE, 256, "held-out activations", 1.1, 6.1)
    assert table.splitlines()[:9] == [
        "20,000 held-out activations                       K-means         MFA  better",
        "-----------------------------------------------------------------------------",
        "negative log-likelihood, nats per token                        604.70  less",
        "squared error of reconstruction, per feature        14.73       5.196  less",
        "variance unexplained                                42.6%       15.0%  less",
        "regions that own any                           253 of 256  254 of 256  more",
        "active regions per token, mean                                   1.09",
        "tokens per second through log p(x)                          1,818,450  more",
        "seconds to fit (MFA: with the K-means before)         1.1         7.2  less",
    ]
    assert "left out" not in table


def test_table_of_a_mixture_alone():
    alone = replace(SCORE, kmeans_mse=None, kmeans_fvu=None, kmeans_live=None, skipped=3)
    table = score_table(alone, 256, "activations of a store")
    assert "K-means" not in table
    assert "seconds" not in table.replace("tokens per second", "")
    lines = table.splitlines()
    assert lines[0].split() == ["20,000", "activations", "of", "a", "store", "MFA", "better"]
    assert next(line for line in lines if line.startswith("left out")).split()[-1] == "3"
    assert max(map(len, table.splitlines())) <= 100
