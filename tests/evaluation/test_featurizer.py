"""Interchanges of features: equal to featurize, mix and inverse, and the planted table of what each swap moves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, kmeans
from mfa_kernels.evaluation import MFAFeaturizer
from mfa_kernels.evaluation.featurizer import MODES
from tests.helpers.mixtures import mixture

pytestmark = pytest.mark.usefixtures("one_thread")

K, D, R = 9, 24, 3


@pytest.fixture(scope="module")
def mfa() -> MFA:
    m = mixture(K, D, R, dtype=torch.float64, spread=0.3)  # tokens of several regions
    return MFA.from_parameters(*m[:3], m.log_weights.exp())


@pytest.fixture(scope="module")
def pair(mfa: MFA) -> tuple[Tensor, Tensor]:
    x = mfa.sample(40, torch.Generator().manual_seed(1))
    return x[:20], x[20:]


def masks(featurizer: MFAFeaturizer) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    soft = torch.rand(featurizer.n_masked, generator=generator, dtype=torch.float64)
    return [soft, soft > 0.5, torch.zeros_like(soft), torch.ones_like(soft)]


@pytest.mark.parametrize("mode", MODES)
def test_sizes(mfa, pair, mode):
    featurizer = MFAFeaturizer(mfa, mode)
    features, error = featurizer.featurize(pair[0])
    assert features.shape == (20, K if mode == "centroids" else K * (1 + R))
    assert featurizer.n_features == features.shape[1]
    assert featurizer.n_masked == {"centroids": K, "regions": 2 * K, "columns": K * (1 + R)}[mode]
    assert error.shape == pair[0].shape
    torch.testing.assert_close(featurizer.inverse(features, error), pair[0], rtol=1e-12, atol=1e-12)


def test_features_are_those_of_the_formula(mfa, pair):
    """[r_k, r_k z_k], and the reconstruction of equations 11 to 13 as what they stand for."""
    x = pair[0]
    features, error = MFAFeaturizer(mfa).featurize(x)
    blocks = features.view(20, K, 1 + R)
    torch.testing.assert_close(blocks[..., 0], mfa.responsibilities(x).detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x - error, mfa.reconstruct(x).detach(), rtol=1e-10, atol=1e-10)
    of_centroids, rest = MFAFeaturizer(mfa, "centroids").featurize(x)
    torch.testing.assert_close(of_centroids @ mfa.means.detach() + rest, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(4))
def test_an_interchange_is_featurize_mix_inverse(mfa, pair, mode, number):
    featurizer, (base, source) = MFAFeaturizer(mfa, mode), pair
    mask = masks(featurizer)[number]
    (own, error), (others, _) = featurizer.featurize(base), featurizer.featurize(source)
    expected = featurizer.inverse(featurizer.mixed(own, others, mask), error)
    found = featurizer.interchange(base, source, mask)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    given = {"base_code": featurizer.code(base), "source_code": featurizer.code(source)}
    assert torch.equal(featurizer.interchange(base, None, mask, **given), found)
    if number == 2:  # nothing from the source
        assert torch.equal(found, base)
    if number == 3 and mode != "centroids":  # everything but the error
        _, of_source = featurizer.featurize(source)
        torch.testing.assert_close(found, source - of_source + error, rtol=1e-11, atol=1e-11)


def test_gradients(pair):
    """Of the mask, of base and source, and of the mixture."""
    m = mixture(4, 6, 2, dtype=torch.float64, spread=0.3)
    mfa = MFA.from_parameters(*m[:3], m.log_weights.exp())
    featurizer = MFAFeaturizer(mfa, "columns")
    base, source = (x.requires_grad_() for x in mfa.sample(4, torch.Generator().manual_seed(0)).split(2))
    mask = masks(featurizer)[0].requires_grad_()
    assert torch.autograd.gradcheck(featurizer.interchange, (base, source, mask))
    featurizer.interchange(base, source, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (mfa.means, mfa.loadings))


def test_a_gate_of_a_region_does_not_depend_on_its_rotation(mfa, pair):
    turned = MFA.from_parameters(mfa.means, mfa.loadings, mfa.noise_variance, mfa.log_weights.exp()).rotate("principal")
    mask = masks(MFAFeaturizer(mfa))[0]
    one, other = (MFAFeaturizer(which).interchange(*pair, mask) for which in (mfa, turned))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_of_kmeans(pair):
    """A decomposition without directions: a swap of all centroids moves the base by the difference of its centroids."""
    found = kmeans(torch.cat(pair), 4, progress=False)
    featurizer = MFAFeaturizer(found, "regions")
    assert (featurizer.n_features, featurizer.n_masked) == (4, 8)
    moved = featurizer.interchange(*pair, torch.ones(8))
    centroids = found.centroids
    expected = pair[0] + centroids[found.assign(pair[1])] - centroids[found.assign(pair[0])]
    torch.testing.assert_close(moved, expected.to(moved), rtol=1e-5, atol=1e-5)


def test_in_half_precision_and_large(mfa, pair):
    """The dtype is the base's; what is swapped is computed in the mixture's."""
    parameters = mfa.means, mfa.loadings, mfa.noise_variance, mfa.log_weights.exp()
    single = MFA.from_parameters(*(t.detach().float() for t in parameters))
    featurizer, mask = MFAFeaturizer(single), masks(MFAFeaturizer(mfa))[0]
    exact = MFAFeaturizer(mfa).interchange(*pair, mask)
    found = featurizer.interchange(*(x.float() for x in pair), mask.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    low = featurizer.interchange(*(x.bfloat16() for x in pair), mask.float())
    assert low.dtype == torch.bfloat16


def test_the_contract_of_other_libraries(mfa, pair):
    """featurizer(x) -> (features, error), inverse(features, error) -> x, as CausalAbstraction's `Featurizer` has it."""

    class Stub:
        def __init__(self, featurizer: torch.nn.Module, inverse: torch.nn.Module) -> None:
            self.featurizer, self.inverse = featurizer, inverse

        def interchange(self, base: Tensor, source: Tensor, chosen: list[int]) -> Tensor:
            features, error = self.featurizer(base)
            others, _ = self.featurizer(source)
            features[:, chosen] = others[:, chosen]
            return self.inverse(features, error)

    featurizer = MFAFeaturizer(mfa, "columns")
    chosen = [0, 5, 17]
    found = Stub(*featurizer.modules()).interchange(*pair, chosen)
    mask = torch.zeros(featurizer.n_masked).index_fill_(0, torch.tensor(chosen), 1)
    torch.testing.assert_close(found, featurizer.interchange(*pair, mask), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mask": torch.ones(3)}, ValueError, r'mask must have shape \(18,\), as mode "regions" has it, got \(3,\)'),
        ({"mask": "all"}, TypeError, "mask must be a tensor"),
        ({"source": torch.zeros(7, D).double()}, ValueError, "source must have the shape of base"),
        ({"base": torch.zeros(20, D + 1).double()}, ValueError, r"base must have shape \(..., 24\)"),
        ({"base_code": 3}, ValueError, "base_code must be what `code` returns"),
    ],
)
def test_what_does_not_fit_is_named(mfa, pair, given, error, message):
    call = {"base": pair[0], "source": pair[1], "mask": torch.ones(2 * K), **given}
    with pytest.raises(error, match=message):
        MFAFeaturizer(mfa).interchange(**call)


def test_modes_are_named(mfa):
    with pytest.raises(ValueError, match="mode must be"):
        MFAFeaturizer(mfa, "loadings")
    with pytest.raises(TypeError, match="mfa must be a mixture"):
        MFAFeaturizer(object())


# The planted table: regions 0 ... 7 tell A = k mod 4; inside each, B is the sign of the first latent.


def planted(seed: int) -> tuple[MFA, Tensor, Tensor]:
    """A mixture of 8 regions in 48 dimensions of rank 3, and 600 activations with their regions."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(8, 48, generator=generator, dtype=torch.float64)
    loadings = torch.linalg.qr(torch.randn(8, 48, 3, generator=generator, dtype=torch.float64)).Q * 1.5
    mfa = MFA.from_parameters(means, loadings, torch.full((48,), 0.01), torch.ones(8))
    region = torch.randint(8, (600,), generator=generator)
    z = torch.randn(600, 3, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(600, 48, generator=generator, dtype=torch.float64)
    return mfa, means[region] + (loadings[region] @ z.unsqueeze(-1)).squeeze(-1) + noise, region


def read(mfa: MFA, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of activations."""
    code = mfa.encode(x, 1)
    return code.components[:, 0] % 4, code.latents[:, 0, 0] > 0


def shares(seed: int) -> dict[str, float]:
    """Shares of pairs in which a swap moved or kept A and B."""
    mfa, x, region = planted(seed)
    every = torch.tensor(list(itertools.pairwise(range(600))))
    same = torch.cat([torch.stack([k[:-1], k[1:]], 1) for k in ((region == i).nonzero().squeeze(1) for i in range(8))])
    on, off = torch.ones, torch.zeros
    first = torch.zeros(8, 4)
    first[:, 1] = 1
    others = torch.zeros(8, 4)
    others[:, 2:] = 1
    swaps = {
        "centroids": ("regions", torch.cat([on(8), off(8)])),
        "loadings": ("regions", torch.cat([off(8), on(8)])),
        "both": ("regions", on(16)),
        "z_1": ("columns", first.flatten()),
        "z_2, z_3": ("columns", others.flatten()),
    }
    found = {}
    with torch.no_grad():
        for (name, (mode, mask)), (of, pairs) in itertools.product(swaps.items(), (("all", every), ("same", same))):
            base, source = x[pairs[:, 0]], x[pairs[:, 1]]
            moved = read(mfa, MFAFeaturizer(mfa, mode).interchange(base, source, mask))
            of_base, of_source = read(mfa, base), read(mfa, source)
            changed = of_base[1] != of_source[1]
            found[f"{name}, {of}: A from source"] = float((moved[0] == of_source[0]).double().mean())
            found[f"{name}, {of}: A kept"] = float((moved[0] == of_base[0]).double().mean())
            found[f"{name}, {of}: B from source"] = float((moved[1] == of_source[1]).double().mean())
            found[f"{name}, {of}: B from source, changed"] = float((moved[1] == of_source[1])[changed].double().mean())
            found[f"{name}, {of}: B kept"] = float((moved[1] == of_base[1]).double().mean())
    return found


def test_the_planted_table():
    """What each swap moves, over 20 seeds: exactly, by chance, or in between where latents meet foreign axes."""
    every = [shares(seed) for seed in range(20)]
    mean = {key: sum(found[key] for found in every) / 20 for key in every[0]}
    exactly = {
        "centroids, all: A from source": 1.0, "centroids, same: A kept": 1.0,
        "centroids, same: B from source": 0.5, "centroids, same: B from source, changed": 0.0,
        "loadings, same: A kept": 1.0, "loadings, same: B from source": 1.0,
        "z_1, same: A kept": 1.0, "z_1, same: B from source": 1.0,
        "z_2, z_3, same: B from source": 0.5,
        "both, all: A from source": 1.0, "both, all: B kept": 0.5,
    }  # fmt: skip
    assert {key: mean[key] for key in exactly} == pytest.approx(exactly, abs=0.01)
    # The latents of one region along the axes of another: more than chance, far from right.
    assert 0.5 < mean["centroids, all: B kept"] < 0.75, mean
    assert 0.5 < mean["loadings, all: B from source"] < 0.75, mean
