"""Latents from the prior and from what a region's activations show."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.steering import latent_quantiles, prior_latents
from mfa_kernels.steering import latents as module
from tests.helpers.mixtures import mixture, tokens
from tests.steering.tiny import RANK, fitting_mixture


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_prior_is_a_seeded_standard_normal(mfa: MFA) -> None:
    assert prior_latents(mfa).shape == (RANK,)
    many = prior_latents(mfa, 20_000, seeded())
    assert many.shape == (20_000, RANK)
    torch.testing.assert_close(many.T.cov(), torch.eye(RANK), rtol=0, atol=0.05)
    assert many.mean(0).abs().max() < 0.03
    assert torch.equal(prior_latents(mfa, 5, seeded(1)), prior_latents(mfa, 5, seeded(1)))
    assert not torch.equal(prior_latents(mfa, 5, seeded(1)), prior_latents(mfa, 5, seeded(2)))
    assert prior_latents(fitting_mixture(torch.float64)).dtype == torch.float64


def test_quantiles_are_those_of_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    m = mixture(5, 12, 2, dtype=torch.float64)
    mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).requires_grad_(False)
    x = tokens(m, 400)
    x[7] = float("nan")
    own = x[mfa.responsibilities(x).argmax(-1) == 3]
    own = own[own.isfinite().all(-1)]
    expected = mfa.posterior(own, 3)[0]
    q = torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0])
    for batch in (8192, 150):  # three batches, the last one short
        monkeypatch.setattr(module, "BATCH", batch)
        torch.testing.assert_close(latent_quantiles(mfa, x, 3, q), expected.quantile(q.double(), 0))
    torch.testing.assert_close(latent_quantiles(mfa, x, 3, 0.25), expected.quantile(0.25, 0))
    torch.testing.assert_close(latent_quantiles(mfa, own[:1], 3, 0.25), expected[0])


def test_bad_input_is_named(mfa: MFA) -> None:
    x = mfa.means[2].expand(4, -1)
    with pytest.raises(ValueError, match=r"q must be a number in \[0, 1\]"):
        latent_quantiles(mfa, x, 2, 1.5)
    with pytest.raises(ValueError, match="activations have 5 features, but the mixture has 32"):
        latent_quantiles(mfa, torch.zeros(3, 5), 2, 0.5)
    with pytest.raises(IndexError, match="got 6"):
        latent_quantiles(mfa, x, 6, 0.5)
    owner = int(mfa.assign(x[:1]))
    with pytest.raises(ValueError, match="most responsible one for none of the 4 activations"):
        latent_quantiles(mfa, x, (owner + 1) % 6, 0.5)
