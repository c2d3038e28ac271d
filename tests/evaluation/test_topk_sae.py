"""A sparse autoencoder that finds planted directions, with k of them active."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels.evaluation.topk_sae import TopKSAE

pytestmark = pytest.mark.usefixtures("one_thread")

D, PLANTED, ACTIVE = 32, 24, 2


@pytest.fixture(scope="module")
def planted():
    """Tokens that are sums of two of 24 directions, around a mean that is not 0, of very different norms."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(PLANTED, D, generator=generator), dim=1)
    places = torch.rand(12_000, PLANTED, generator=generator).argsort(1)[:, :ACTIVE]
    weights = torch.zeros(12_000, PLANTED).scatter(1, places, 1 + torch.rand(12_000, ACTIVE, generator=generator))
    scale = torch.exp(2 * torch.rand(12_000, 1, generator=generator))
    return directions, scale * (weights @ directions) + torch.linspace(-1, 1, D)


def test_planted_directions_are_found(planted):
    directions, x = planted
    sae = TopKSAE.fit(x, 48, ACTIVE + 1, epochs=12, lr=3e-3, batch_size=256, progress=False)
    alike = (directions @ sae.decoder.mT).amax(1)
    assert (alike > 0.9).double().mean() > 0.8
    features = sae.encode(x)
    assert int((features > 0).sum(1).max()) <= ACTIVE + 1
    assert (features >= 0).all()
    left = (sae.decode(features) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert left < 0.15
    assert not any(p.requires_grad for p in sae.parameters())
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(48))


def test_features_grow_with_a_token(planted):
    """So that a swap between a small token and a large one takes the size along."""
    _, x = planted
    sae = TopKSAE(D, 40, 5, torch.Generator().manual_seed(1))
    sae.mean.copy_(x.mean(0))
    moved = sae.mean + 3 * (x[:9] - sae.mean)
    torch.testing.assert_close(sae.encode(moved), 3 * sae.encode(x[:9]), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same(planted):
    _, x = planted
    one, other = (TopKSAE.fit(x[:2000], 40, 4, epochs=1, seed=3, progress=False) for _ in range(2))
    assert torch.equal(one.decoder, other.decoder)
    assert not torch.equal(one.decoder, TopKSAE.fit(x[:2000], 40, 4, epochs=1, seed=4, progress=False).decoder)


def test_what_does_not_fit_is_named(planted):
    _, x = planted
    with pytest.raises(ValueError, match="k must be"):
        TopKSAE(D, 40, 41)
    with pytest.raises(ValueError, match="x must"):
        TopKSAE(D, 40, 4).encode(x[:, :3])
    with pytest.raises(ValueError, match="lr must be"):
        TopKSAE.fit(x, 40, 4, lr=0.0, progress=False)
    broken = x[:500].clone()
    broken[3, 2] = torch.inf
    with pytest.raises(ValueError, match="activations must be finite"):
        TopKSAE.fit(broken, 40, 4, progress=False)
