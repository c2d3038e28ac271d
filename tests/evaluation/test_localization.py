"""Variables that are planted in regions are found where they are, by masks and by directions."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.evaluation import MFAFeaturizer, localize
from mfa_kernels.evaluation.localization import DictionaryFeaturizer, LinearFeaturizer
from tests.evaluation.test_featurizer import planted

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"progress": False}
OTHER = MFAFeaturizer(MFA.from_centroids(torch.eye(5), 2, noise_variance=1.0))


@pytest.fixture(scope="module")
def problem() -> tuple[MFA, Tensor, Tensor, Tensor]:
    """A mixture of 8 regions, bases and sources, and the regions of both: (N, 2)."""
    mfa, x, region = planted(0)
    x, mfa = (
        x.float(),
        MFA.from_parameters(
            *(t.detach().float() for t in (mfa.means, mfa.loadings, mfa.noise_variance)), torch.ones(8)
        ),
    )
    mfa.requires_grad_(False)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(3))
    base, source = order[:300], order[300:]
    return mfa, x[base], x[source], torch.stack([region[base], region[source]], 1)


def tells_a(mfa: MFA) -> Callable[[Tensor, Tensor], Tensor]:
    """The network above the site: four logits, of the regions whose number is 0 to 3 mod 4, by distance."""

    def read(patched: Tensor, numbers: Tensor) -> Tensor:
        near = -torch.cdist(patched, mfa.means).square() / 20
        return near.view(len(patched), 2, 4).logsumexp(1)

    return read


def test_a_variable_of_regions_is_in_their_centroids(problem):
    mfa, base, source, region = problem
    labels = region[:, 1] % 4
    found = localize(
        tells_a(mfa), labels, base, source, MFAFeaturizer(mfa), epochs=6, changes=labels != region[:, 0] % 4, **QUIET
    )
    assert found.iia > 0.97
    assert found.iia_soft > 0.97
    assert found.cause > 0.95
    assert (found.theta[:8] > 0).all(), "the centroids"
    assert found.losses[-1] < 0.2 < found.losses[0]
    assert 0.05 < found.same_region < 0.25
    given = localize(
        tells_a(mfa), labels, base, source, MFAFeaturizer(mfa), mask=torch.ones(16) * (torch.arange(16) < 8), **QUIET
    )
    assert given.iia > 0.97
    assert (given.n_selected, given.n_masked, given.theta) == (8, 16, None)


def test_a_variable_that_has_to_stay(problem):
    """Isolation: the answer is the base's, and a mask that takes nothing is right."""
    mfa, base, source, region = problem
    labels = region[:, 0] % 4
    found = localize(
        tells_a(mfa),
        labels,
        base,
        source,
        MFAFeaturizer(mfa),
        changes=torch.zeros(300, dtype=torch.bool),
        penalty=1e-3,
        epochs=6,
        **QUIET,
    )
    assert found.isolation > 0.97
    assert found.cause is None
    assert found.iia == found.isolation
    assert not (found.theta[:8] > 0).any()


def test_das_finds_the_directions(problem):
    """The variable is which of two means an activation is near; one direction tells, and masks of neurons do not."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0)
    x = torch.randn(2000, 48, generator=generator)

    def read(patched: Tensor, numbers: Tensor) -> Tensor:
        score = 8 * patched @ direction
        return torch.stack([-score, score], 1)

    x = x[(x @ direction).abs() > 0.1]  # none at the border
    base, source = x[:900], x[900:1800]
    labels = (source @ direction > 0).long()
    found = localize(read, labels, base, source, das=1, epochs=20, lr=0.005, **QUIET)
    assert found.iia > 0.97
    assert found.directions.shape == (48, 1)
    assert abs(float(found.directions[:, 0] @ direction)) > 0.99
    assert (found.n_selected, found.n_masked, found.same_region, found.theta) == (1, 48, None, None)
    random = localize(read, labels, base, source, LinearFeaturizer.random(48, 1, seed=1), mask=torch.ones(1), **QUIET)
    assert random.iia < found.iia - 0.2
    whole = localize(read, labels, base, source, LinearFeaturizer(n_features=48), mask=torch.ones(48), **QUIET)
    assert whole.iia == 1.0
    along = LinearFeaturizer(direction.unsqueeze(1))
    assert localize(read, labels, base, source, along, mask=torch.ones(1), **QUIET).iia == 1.0


def test_linear_features():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 1, 1, 1, 1])
    base, source = x[:30], x[30:]
    principal = LinearFeaturizer.principal(x)
    torch.testing.assert_close(principal.interchange(base, source, torch.ones(5)), source)
    torch.testing.assert_close(principal.interchange(base, source, torch.zeros(5)), base)
    first = principal.interchange(base, source, torch.tensor([1.0, 0, 0, 0, 0]))
    assert (first - base)[:, 0].abs().mean() > 20 * (first - base)[:, 1:].abs().mean()
    neurons = LinearFeaturizer(n_features=5)
    assert torch.equal(neurons.interchange(base, source, torch.tensor([1.0, 0, 0, 0, 0]))[:, 1:], base[:, 1:])
    with pytest.raises(ValueError, match="directions must be orthonormal"):
        LinearFeaturizer(torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"directions must have shape \(D, k\)"):
        LinearFeaturizer(torch.eye(5)[:3])


def test_features_of_an_autoencoder():
    """The error of a lossy one is the base's."""
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(1))
    features = DictionaryFeaturizer(lambda x: (x @ weight).relu(), lambda f: f @ weight.mT, 4)
    base, source = x[:10], x[10:]
    assert torch.equal(features.interchange(base, source, torch.zeros(4)), base)
    moved = features.interchange(base, source, torch.ones(4))
    torch.testing.assert_close(moved - base, (features.encode(source) - features.encode(base)) @ weight.mT)


def test_codes_are_computed_once(problem, monkeypatch):
    mfa, base, source, region = problem
    features, calls = MFAFeaturizer(mfa), []
    code = features.code
    monkeypatch.setattr(features, "code", lambda x: calls.append(len(x)) or code(x))
    localize(tells_a(mfa), region[:, 1] % 4, base, source, features, epochs=2, **QUIET)
    assert [n for n in calls if n > 1] == [300, 300], "and one pair is tried before"


def test_a_mixture_that_could_be_trained_keeps_its_gradients(problem):
    mfa, base, source, region = problem
    own = copy.deepcopy(mfa).requires_grad_(True)
    localize(tells_a(own), region[:, 1] % 4, base, source, MFAFeaturizer(own), epochs=1, **QUIET)
    assert all(p.grad is None for p in own.parameters())


def test_principal_directions_of_low_precision():
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = LinearFeaturizer.principal(x).interchange(x[:30].float(), x[30:].float(), torch.ones(5))
    torch.testing.assert_close(moved, x[30:].float(), rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same(problem):
    mfa, base, source, region = problem
    one, other = (
        localize(tells_a(mfa), region[:, 1] % 4, base, source, MFAFeaturizer(mfa, mode), epochs=1, seed=3, **QUIET)
        for mode in ("columns", "columns")
    )
    assert torch.equal(one.theta, other.theta)
    assert one.losses == other.losses


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have shape \(300,\)"),
        ({"labels": torch.zeros(300)}, TypeError, "labels must have an integer dtype"),
        ({"source": torch.zeros(299, 48)}, ValueError, "source must have the shape"),
        ({"features": None}, ValueError, "features or das must be given, and not both"),
        ({"das": 3}, ValueError, "features or das must be given, and not both"),
        ({"features": None, "das": 3, "mask": torch.ones(3)}, ValueError, "mask needs features"),
        ({"changes": torch.zeros(2)}, ValueError, r"changes must have shape \(300,\)"),
        ({"features": LinearFeaturizer(n_features=40)}, ValueError, "features: .* takes no activations of width 48"),
        ({"features": LinearFeaturizer.random(40, 3)}, ValueError, "features: .* takes no activations of width 48"),
        (
            {"features": OTHER},
            ValueError,
            r"features: .* takes no activations of width 48: .* must have shape \(..., 5\)",
        ),
        ({"held_out": 1.5}, ValueError, "held_out must be"),
        ({"logits": 3}, TypeError, "logits must be"),
        ({"temperatures": (1.0, 0.0)}, ValueError, "temperatures must be"),
        (
            {"features": LinearFeaturizer(n_features=48), "mask": torch.ones(1)},
            ValueError,
            r"mask must have shape \(48,\)",
        ),
        ({"mask": torch.ones(3)}, ValueError, r"mask must have shape \(16,\)"),
    ],
)
def test_what_does_not_fit_is_named(problem, given, error, message):
    mfa, base, source, region = problem
    call = {
        "logits": tells_a(mfa),
        "labels": region[:, 1] % 4,
        "base": base,
        "source": source,
        "features": MFAFeaturizer(mfa),
    }
    with pytest.raises(error, match=message):
        localize(**{**call, "epochs": 1, **given}, **QUIET)
