from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.autograd import forward_ad

from mfa_kernels import MFA, Code, ops
from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.screen import cost
from tests.helpers.mixtures import Mixture, mixture, tokens
from tests.helpers.refusals import check_refused


def module(*shape: int, dtype: torch.dtype = torch.float64, **kwargs) -> MFA:
    m = mixture(*shape, dtype=dtype, **kwargs)
    return MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp())


def responsibilities_fp64(mfa: MFA, x: torch.Tensor) -> torch.Tensor:
    parameters = [t.detach().double() for t in (mfa.means, mfa.loadings, mfa.noise_variance)]
    logits = reference.component_log_prob(x.double(), *parameters) + mfa.log_weights.detach().double()
    return logits.softmax(-1)


def test_names_and_shapes():
    mfa = MFA(n_components=7, n_features=5, rank=3)
    assert mfa.means.shape == (7, 5)
    assert mfa.loadings.shape == (7, 5, 3)
    assert mfa.noise_variance.shape == (5,)
    assert mfa.log_weights.shape == (7,)
    assert mfa.center.shape == (5,)
    assert MFA(7, 5, 3, noise="per_component").noise_variance.shape == (7, 5)
    assert MFA(7, 5, dtype=torch.float64, rank=0).loadings.shape == (7, 5, 0)
    x = torch.randn(2, 4, 5)
    assert mfa(x).shape == ()
    assert mfa.log_prob(x).shape == (2, 4)
    assert mfa.component_log_prob(x).shape == (2, 4, 7)
    assert mfa.responsibilities(x).shape == (2, 4, 7)
    assert mfa.assign(x).shape == (2, 4)
    assert mfa.reconstruct(x).shape == (2, 4, 5)
    code = mfa.encode(x, top_k=6)
    assert code.components.shape == code.responsibilities.shape == (2, 4, 6)
    assert code.latents.shape == (2, 4, 6, 3)
    assert code.dropped.shape == (2, 4)
    assert mfa.decode(code).shape == (2, 4, 5)
    assert mfa.encode(x, top_k=100).components.shape == (2, 4, 7)
    assert mfa.log_prob(x[0, 0]).shape == ()
    assert mfa.sample(3).shape == (3, 5)


@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_against_the_reference_policy(noise, rank):
    mfa = module(20, 15, rank, per_component=noise == "per_component", spread=0.5)
    x = mfa.sample(30)
    plain = copy.deepcopy(mfa)
    plain.precision = "reference"
    torch.testing.assert_close(mfa.log_prob(x), plain.log_prob(x), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(mfa.component_log_prob(x), plain.component_log_prob(x), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(mfa.responsibilities(x, 2.0), plain.responsibilities(x, 2.0), rtol=1e-9, atol=1e-10)


def test_one_component_is_factor_analysis():
    mfa = module(1, 12, 3)
    x = mfa.sample(40)
    covariance = mfa.loadings[0] @ mfa.loadings[0].T + torch.diag(mfa.noise_variance)
    expected = torch.distributions.MultivariateNormal(mfa.means[0], covariance).log_prob(x)
    torch.testing.assert_close(mfa.log_prob(x), expected, rtol=1e-10, atol=1e-10)


def test_rank_zero_is_a_diagonal_mixture():
    mfa = module(6, 12, 0)
    x = mfa.sample(40)
    code = mfa.encode(x)
    assert code.latents.shape == (40, 6, 0)
    expected = responsibilities_fp64(mfa, x) @ mfa.means
    torch.testing.assert_close(mfa.reconstruct(x), expected, rtol=1e-9, atol=1e-9)


def test_encode_holds_the_largest_responsibilities(backend):
    mfa = module(30, 12, 3, spread=0.3)
    x = mfa.sample(50)
    truth = responsibilities_fp64(mfa, x)
    for top_k in (1, 3, 20, 30):
        code = mfa.encode(x, top_k=top_k)
        held = code.components >= 0
        largest = truth.topk(top_k, -1).values
        torch.testing.assert_close(code.responsibilities[held], largest[held], rtol=1e-8, atol=1e-12)
        left_out = 1 - torch.where(held, largest, 0).sum(-1)
        assert (code.dropped >= left_out - 1e-12).all()
        assert (code.dropped <= left_out + 1e-12).all()
    every = mfa.encode(x, top_k=None)
    torch.testing.assert_close(every.responsibilities.sum(-1), torch.ones(50).double(), rtol=1e-12, atol=0)
    assert (every.dropped < 1e-12).all()


def test_to_dense_is_the_dictionary_order_of_the_paper(backend):
    mfa = module(9, 12, 3, spread=0.3)
    x = mfa.sample(20).reshape(4, 5, 12)
    dense = mfa.encode(x, top_k=None).to_dense(mfa)
    assert dense.shape == (4, 5, 9 * 4)
    r = responsibilities_fp64(mfa, x.reshape(20, 12))
    blocks = dense.reshape(20, 9, 4)
    torch.testing.assert_close(blocks[..., 0], r, rtol=1e-9, atol=1e-12)
    for k in range(9):
        z = mfa.posterior(x.reshape(20, 12), k)[0]
        torch.testing.assert_close(blocks[:, k, 1:], r[:, k : k + 1] * z, rtol=1e-8, atol=1e-11)
    dictionary = torch.cat([mfa.means.unsqueeze(-1), mfa.loadings], dim=-1).permute(0, 2, 1).reshape(-1, 12)
    torch.testing.assert_close(dense @ dictionary, mfa.reconstruct(x), rtol=1e-9, atol=1e-10)


def test_reconstruct_is_the_expected_signal(backend):
    """sum_k r_k (mu_k + W_k W_k^T C_k^-1 (x - mu_k)), written by its definition."""
    mfa = module(8, 10, 3, spread=0.4)
    x = mfa.sample(25)
    r = responsibilities_fp64(mfa, x)
    expected = torch.zeros_like(x)
    for k in range(8):
        w = mfa.loadings[k]
        covariance = w @ w.T + torch.diag(mfa.noise_variance)
        signal = mfa.means[k] + (w @ w.T @ torch.linalg.solve(covariance, (x - mfa.means[k]).T)).T
        expected += r[:, k : k + 1] * signal
    torch.testing.assert_close(mfa.reconstruct(x), expected, rtol=1e-8, atol=1e-9)


def test_posterior():
    mfa = module(6, 10, 3)
    x = mfa.sample(8)
    mean, covariance = mfa.posterior(x, 4)
    w = mfa.loadings[4]
    precision = torch.eye(3).double() + w.T @ (w / mfa.noise_variance.unsqueeze(-1))
    torch.testing.assert_close(covariance, torch.linalg.inv(precision), rtol=1e-9, atol=1e-10)
    expected = ((x - mfa.means[4]) / mfa.noise_variance) @ w @ torch.linalg.inv(precision)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-10)
    k = torch.tensor([0, 4, 4, 2, 1, 5, 3, 4])
    means, covariances = mfa.posterior(x, k)
    torch.testing.assert_close(means[k == 4], mean[k == 4])
    torch.testing.assert_close(covariances[1], covariance)
    check_refused(IndexError, "component", mfa.posterior, x, 6)
    check_refused(IndexError, "component", mfa.posterior, x, torch.tensor(-1))


def test_hard_code():
    mfa = module(9, 12, 3, spread=0.2)
    x = mfa.sample(20)
    code = mfa.encode(x)
    hard = code.hard()
    assert hard.components.shape == (20, 1)
    assert (hard.responsibilities == 1).all()
    torch.testing.assert_close(hard.dropped, 1 - code.responsibilities[:, 0])
    k = hard.components[:, 0]
    expected = mfa.means[k] + torch.einsum("ndr,nr->nd", mfa.loadings[k], hard.latents[:, 0])
    torch.testing.assert_close(mfa.decode(hard), expected)


def test_code_moves():
    code = module(9, 12, 3).encode(torch.zeros(2, 12)).to(torch.float32)
    assert isinstance(code, Code)
    assert code.components.dtype == torch.int64
    assert code.latents.dtype == torch.float32


def test_a_bad_token_is_bad_alone(backend):
    mfa = module(9, 12, 3)
    x = mfa.sample(20)
    x[7, 3] = math.nan
    x[8, 0] = math.inf
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[7, 8]] = True
    for out in (mfa.log_prob(x), mfa.reconstruct(x)[:, 0], mfa.encode(x).responsibilities[:, 0], mfa.encode(x).dropped):
        assert torch.equal(out.isnan(), bad)
    assert torch.equal(mfa.assign(x) == -1, bad)


def test_empty_batches(backend):
    mfa = module(9, 12, 3)
    x = torch.empty(0, 12)
    assert mfa.log_prob(x).shape == (0,)
    assert mfa.responsibilities(x).shape == (0, 9)
    assert mfa.reconstruct(x).shape == (0, 12)
    assert mfa.encode(x, top_k=None).latents.shape == (0, 1, 3)
    assert mfa.decode(mfa.encode(x)).shape == (0, 12)
    assert mfa.sample(0).shape == (0, 12)


def test_bad_arguments():
    mfa = MFA(4, 6, 2)
    check_refused(ValueError, r"x must have shape \(\.\.\., 6\), got \(3, 5\)", mfa, torch.zeros(3, 5))
    check_refused(TypeError, "floating-point dtype, got torch.int64", mfa.log_prob, torch.zeros(3, 6).long())
    check_refused(TypeError, "x must be a tensor or an array, got str", mfa.log_prob, "x")
    check_refused(ValueError, "x is on meta, but the mixture is on cpu", mfa.encode, torch.zeros(3, 6, device="meta"))
    check_refused(ValueError, "top_k", mfa.encode, torch.zeros(3, 6), top_k=0)
    check_refused(ValueError, "temperature", mfa.responsibilities, torch.zeros(3, 6), temperature=0)
    check_refused(ValueError, "rank must be at most n_features = 6, got 7", MFA, 4, 6, 7)
    check_refused(ValueError, "n_components", MFA, 0, 6)
    check_refused(ValueError, "noise must be one of", MFA, 4, 6, 2, noise="full")
    check_refused(ValueError, "precision must be one of", MFA, 4, 6, 2, precision="double")
    means, loadings, noise, log_weights = mixture(4, 6, 2)
    weights, made = log_weights.exp(), MFA.from_parameters
    check_refused(ValueError, "loadings must have shape", made, means, loadings[:3], noise, weights)
    check_refused(ValueError, "noise_variance must be positive", made, means, loadings, noise * 0, weights)
    check_refused(ValueError, "weights must be non-negative", made, means, loadings, noise, -weights)
    check_refused(ValueError, "noise_variance must have shape", made, means, loadings, noise[:5], weights)


def test_from_parameters_promotes_dtypes():
    m = mixture(4, 6, 2)
    mfa = MFA.from_parameters(m.means.double(), m.loadings.half(), m.noise_variance, torch.tensor([1.0, 1, 2, 4]))
    assert mfa.means.dtype == mfa.loadings.dtype == torch.float64
    torch.testing.assert_close(mfa.log_weights.exp(), torch.tensor([0.125, 0.125, 0.25, 0.5]).double())
    torch.testing.assert_close(mfa.noise_variance.float(), m.noise_variance)


def test_a_half_precision_module_computes_in_fp32():
    mfa = module(9, 12, 3, dtype=torch.float32)
    half = copy.deepcopy(mfa).bfloat16()
    x = mfa.sample(5)
    out = half.log_prob(x)
    assert out.dtype == torch.float32
    exact = MFA.from_parameters(
        *(t.detach().float() for t in (half.means, half.loadings, half.noise_variance, half.log_weights.exp()))
    )
    torch.testing.assert_close(out, exact.log_prob(x), rtol=2e-2, atol=0.5)
    half(x).backward()
    assert half.loadings.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["exact", "reference"])
def test_autocast_leaves_the_density_alone(backend, precision):
    mfa = module(9, 64, 3, dtype=torch.float32)
    mfa.precision = precision
    x = mfa.sample(5)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with torch.autocast("cpu", torch.bfloat16):
                inside = mfa.log_prob(x), mfa.component_log_prob(x)
            outside = mfa.log_prob(x), mfa.component_log_prob(x)
        for a, b in zip(inside, outside, strict=True):
            assert torch.equal(a, b)


def test_factors_are_cached_until_a_parameter_changes(monkeypatch):
    from mfa_kernels import ops

    calls = []
    real = ops.factorize
    monkeypatch.setattr(ops, "factorize", lambda *args: calls.append(1) or real(*args))
    mfa = module(9, 12, 3)
    x = mfa.sample(5)
    with torch.no_grad():
        for _ in range(3):
            mfa.log_prob(x), mfa.encode(x), mfa.responsibilities(x)
        assert len(calls) == 1
        before = mfa.log_prob(x)
        for change in (mfa.means, mfa.loadings, mfa.log_noise, mfa.center):
            change.add_(0.1)
            mfa.log_prob(x)
        assert len(calls) == 5
        assert not torch.equal(before, mfa.log_prob(x))
        mfa.noise_floor = 0.5
        floored = mfa.log_prob(x)
        assert len(calls) == 6
        mfa.means.data.add_(1.0)  # not counted by PyTorch
        mfa.refresh()
        assert not torch.equal(floored, mfa.log_prob(x))
        mfa.load_state_dict(module(9, 12, 3, seed=5).state_dict())
        mfa.noise_floor = 0.0
        torch.testing.assert_close(mfa.log_prob(x), module(9, 12, 3, seed=5).log_prob(x))
    frozen = module(9, 12, 3).requires_grad_(False)
    calls.clear()
    frozen.log_prob(x), frozen.encode(x)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_every_optimiser_trains_on_fresh_factors(kind):
    mfa = module(9, 12, 3, dtype=torch.float32)
    x = mfa.sample(50)
    with torch.no_grad():
        mfa.means.add_(0.5)
        mfa.log_prob(x)
    optimizer = torch.optim.Adam(mfa.parameters(), lr=0.05, **kind)
    for _ in range(5):
        optimizer.zero_grad()
        mfa(x).backward()
        optimizer.step()
        with torch.no_grad():
            wanted = MFA.from_parameters(mfa.means, mfa.loadings, mfa.noise_variance, mfa.log_weights.exp())
            torch.testing.assert_close(mfa.log_prob(x), wanted.log_prob(x), rtol=1e-4, atol=1e-3)


def test_inference_mode_and_training_mix():
    mfa = module(9, 12, 3)
    x = mfa.sample(5)
    with torch.inference_mode():
        inside = mfa.log_prob(x)
        made_inside = MFA(3, 12, 2)
        made_inside.log_prob(x.float())
    mfa(x).backward()
    assert torch.equal(inside, mfa.log_prob(x).detach())
    with torch.no_grad():
        assert torch.equal(inside, mfa.log_prob(x))


def test_second_derivatives_are_refused(backend):
    mfa = module(5, 6, 2, spread=0.5)
    x = mfa.sample(4).requires_grad_()
    for function in (mfa.log_prob, mfa.component_log_prob, mfa.reconstruct):
        (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative: use precision='reference'"):
            gradient.square().sum().backward()
    mfa.precision = "reference"
    assert torch.autograd.gradgradcheck(mfa.log_prob, x)


def test_decode_refuses_components_out_of_range():
    mfa = module(9, 12, 3)
    code = mfa.encode(mfa.sample(2), top_k=1)
    for bad in (9, -2):
        wrong = Code(torch.full_like(code.components, bad), code.responsibilities, code.latents, code.dropped)
        with pytest.raises(IndexError, match=r"components must be in \[-1, 9\)"):
            mfa.decode(wrong)


def test_center_is_only_an_offset(backend):
    mfa = module(9, 12, 3)
    x = mfa.sample(20)
    expected = mfa.log_prob(x)
    mfa.center = torch.arange(24.0, dtype=torch.float64)[::2]
    torch.testing.assert_close(mfa.log_prob(x), expected, rtol=1e-10, atol=1e-9)
    mfa.center = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"center must have shape \(D,\) = \(12,\), got \(3,\)"):
        mfa.log_prob(x)


def test_dropped_is_a_bound_in_fp32(backend):
    """Log-densities of thousands of nats are rounded to 1e-4; the certificate holds for the logits all the same."""
    mfa = module(64, 768, 4, dtype=torch.float32, spread=0.05)
    x = mfa.sample(64, generator=torch.Generator().manual_seed(0))
    truth = mfa.active_pairs(x, 64).logits.double().softmax(-1)  # every logit as computed, the largest first
    assert (truth[:, 16] > 1e-6).any()  # more than the slots hold
    for top_k in (1, 3, 8, 16, 40):
        code = mfa.encode(x, top_k=top_k)
        assert (code.dropped.double() >= 1 - truth[:, :top_k].sum(-1)).all()
        assert (code.dropped.double() <= 1 - truth[:, :top_k].sum(-1) + 5e-3).all()
    every = mfa.encode(x, top_k=None)
    torch.testing.assert_close(every.responsibilities.sum(-1), torch.ones(64), rtol=0, atol=1e-5)


def test_training_recovers_a_planted_mixture():
    truth = module(3, 8, 1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = truth.sample(4000, generator=generator)
    mfa = MFA.from_centroids(truth.means + 0.3, rank=1, generator=generator)
    optimizer = torch.optim.Adam(mfa.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        mfa(x).backward()
        optimizer.step()
    assert mfa(x) < truth(x) + 0.02


def test_gradients_equal_those_of_the_reference_policy(backend):
    mfa = module(9, 12, 3, spread=0.5)
    plain = copy.deepcopy(mfa)
    plain.precision = "reference"
    x = mfa.sample(30)
    mfa(x).backward()
    plain(x).backward()
    for (name, a), b in zip(mfa.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_encode_and_reconstruct_are_differentiable(backend):
    mfa = module(5, 6, 2, spread=0.5)
    x = mfa.sample(4).requires_grad_()
    assert torch.autograd.gradcheck(mfa.reconstruct, x)
    mfa.reconstruct(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mfa.parameters())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    mfa = module(9, 12, 3, dtype=torch.float32)
    x = mfa.sample(30)
    step = torch.compile(mfa, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(step(x), mfa(x))
    step(x).backward()
    compiled = [p.grad.clone() for p in mfa.parameters()]
    mfa.zero_grad()
    mfa(x).backward()
    for a, b in zip(compiled, mfa.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
    with torch.no_grad():
        respond = torch.compile(mfa.responsibilities, fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(respond(x), mfa.responsibilities(x))


def floored(noise: str, dtype: torch.dtype, floor: float = 0.3, seed: int = 0) -> MFA:
    """A mixture whose noise is the floor alone in dead features, and whose centre is none of zeros."""
    mfa = MFA(5, 12, 3, noise, noise_floor=floor, dtype=dtype)
    mfa.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        mfa.log_noise[..., :2] = -torch.inf
        mfa.weight_logits.normal_(generator=torch.Generator().manual_seed(seed))
        mfa.center.copy_(mfa.means[0] / 3)
    return mfa


def through_state_dict(mfa: MFA, folder: Path) -> MFA:
    other = floored(mfa.noise, mfa.means.dtype, floor=0.0, seed=1)
    other.log_prob(torch.zeros(1, 12, dtype=mfa.means.dtype))  # its factors are kept, and are no longer right
    assert other.load_state_dict(mfa.state_dict()) == ([], [])
    return other


def through_a_file(mfa: MFA, folder: Path) -> MFA:
    torch.save(mfa.state_dict(), folder / "state.pt")
    other = floored(mfa.noise, mfa.means.dtype, floor=0.0, seed=1)
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True), assign=True)
    return other


def through_safetensors(mfa: MFA, folder: Path) -> MFA:
    safetensors.torch.save_model(mfa, str(folder / "state.safetensors"))
    other = floored(mfa.noise, mfa.means.dtype, floor=0.0, seed=1)
    safetensors.torch.load_model(other, folder / "state.safetensors")
    return other


def inside_a_model(mfa: MFA, folder: Path) -> MFA:
    other = floored(mfa.noise, mfa.means.dtype, floor=0.0, seed=1)
    nn.ModuleList([other]).load_state_dict(nn.ModuleList([mfa]).state_dict())
    return other


def through_pretrained(mfa: MFA, folder: Path) -> MFA:
    mfa.save_pretrained(folder)
    return MFA.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize(
    "through",
    [
        through_state_dict, through_a_file, through_safetensors, inside_a_model, through_pretrained,
        lambda mfa, folder: copy.deepcopy(mfa),
        lambda mfa, folder: pickle.loads(pickle.dumps(mfa)),
    ],
)  # fmt: skip
def test_what_comes_back_is_the_same_mixture(through, noise, dtype, tmp_path):
    mfa = floored(noise, dtype)
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x[:, :2] = 0
    found = through(mfa, tmp_path)
    assert found.noise_floor == 0.3
    assert torch.equal(found.log_prob(x), mfa.log_prob(x))
    assert torch.equal(found.reconstruct(x), mfa.reconstruct(x))


def test_a_state_without_a_floor_leaves_the_mixtures_own():
    mfa, other = floored("shared", torch.float32), floored("shared", torch.float32, seed=1)
    assert other.load_state_dict(mfa.tensors()) == ([], [])
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert other.noise_floor == 0.3
    assert torch.equal(other.log_prob(x), mfa.log_prob(x))


@pytest.mark.parametrize("floor", [-1.0, math.nan, math.inf])
def test_a_floor_that_is_none_is_refused(floor):
    mfa = floored("shared", torch.float32)
    state = {**mfa.state_dict(), "_extra_state": torch.tensor(floor)}
    with pytest.raises(ValueError, match="noise_floor"):
        mfa.load_state_dict(state)


def test_a_layer_like_any_other():
    mfa = module(9, 12, 3, dtype=torch.float32)
    x = mfa.sample(5)
    mfa.log_prob(x)
    copies = [copy.deepcopy(mfa), pickle.loads(pickle.dumps(mfa))]
    for other in copies:
        assert torch.equal(other.log_prob(x), mfa.log_prob(x))
    assert list(mfa.tensors()) == ["means", "loadings", "log_noise", "weight_logits", "center"]
    assert list(mfa.state_dict()) == [*mfa.tensors(), "_extra_state"]
    model = nn.Sequential(nn.Linear(3, 12), mfa)
    model(torch.randn(4, 3)).backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert "n_components=9" in repr(mfa)


def test_from_centroids():
    centroids = torch.randn(5, 7)
    mfa = MFA.from_centroids(centroids, rank=2, noise="per_component", noise_variance=0.25)
    assert torch.equal(mfa.means, centroids)
    torch.testing.assert_close(mfa.noise_variance, torch.full((5, 7), 0.25))
    torch.testing.assert_close(mfa.log_weights.exp(), torch.full((5,), 0.2))
    torch.testing.assert_close(mfa.center, centroids.mean(0))


def test_sample_has_the_moments_of_the_mixture():
    mfa = module(3, 4, 2, spread=1.0)
    generator = torch.Generator().manual_seed(0)
    x = mfa.sample(200_000, generator=generator)
    weights = mfa.log_weights.exp()
    mean = weights @ mfa.means
    second = torch.einsum(
        "k,kde->de",
        weights,
        mfa.loadings @ mfa.loadings.mT
        + torch.diag(mfa.noise_variance)
        + mfa.means.unsqueeze(-1) * mfa.means.unsqueeze(-2),
    )
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T @ x / len(x), second, rtol=0, atol=0.1)
    again = mfa.sample(200_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, again)


def test_noise_floor_holds_while_training():
    x = torch.randn(200, 4)
    x[:, 2] = 1.0  # a constant dimension: its likelihood has no maximum
    mfa = MFA(1, 4, 0, noise_floor=1e-4)
    optimizer = torch.optim.Adam(mfa.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        mfa(x).backward()
        optimizer.step()
    assert mfa.noise_variance.min() >= 1e-4
    assert mfa(x).isfinite()


def test_tokens_helper_draws_from_the_mixture():
    m = mixture(4, 6, 2)
    assert tokens(m, 10).shape == (10, 6)


def mixture_of(mfa: MFA) -> Mixture:
    return Mixture(*(t.detach() for t in mfa.parameters_in_compute_dtype()))


def screened_mixture() -> tuple[MFA, torch.Tensor]:
    m = mixture(200, 64, 4, spread=3.0)
    return MFA.from_parameters(*m[:3], m.log_weights.exp()), tokens(m, 300)


@pytest.fixture
def screened(no_int8: None, monkeypatch: pytest.MonkeyPatch) -> tuple[MFA, torch.Tensor]:
    """Where stage 0 pays for so few tokens too."""
    monkeypatch.setattr(cost, "STAGE_COST", (1, 0.1))
    mfa, x = screened_mixture()
    if not mfa.screen(x):
        pytest.skip("screening needs the C++ kernels")
    return mfa, x


def test_a_screen_changes_the_cost_and_not_the_result():
    mfa, x = screened_mixture()
    with torch.no_grad():
        dense, code = mfa.log_prob(x), mfa.encode(x)
        assert mfa.evaluated is None
        if not mfa.woodbury().is_cpp:
            assert not mfa.screen(x[:100])
            return
        if not mfa.screen(x[:100]):
            assert cpp.library().int8_rate < 1
            return
        torch.testing.assert_close(mfa.log_prob(x), dense, rtol=1e-5, atol=1e-4)
        assert mfa.evaluated.shape == (300,)
        assert mfa.evaluated.double().mean() < 20  # of 200
        again = mfa.encode(x)
        assert torch.equal(again.components[:, 0], code.components[:, 0])
        torch.testing.assert_close(again.responsibilities, code.responsibilities, rtol=1e-4, atol=1e-6)


def test_nothing_is_screened_without_kernels(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "portable")
    mfa, x = screened_mixture()
    assert not mfa.screen(x)


def test_a_screen_follows_the_parameters(screened):
    mfa, x = screened
    with torch.no_grad():
        mfa.means += 0.5
        shifted = mfa.log_prob(x)
        assert mfa.evaluated is not None
        mfa.log_prob(x[:0])
        wanted = mixture_of(mfa).log_prob_fp64(x)
        torch.testing.assert_close(shifted.double(), wanted, rtol=1e-5, atol=1e-4)
        mfa.means -= 0.5
        mfa.log_prob(x[:2])  # preparing it anew for two tokens would not pay
        assert mfa.evaluated is None
        mfa.log_prob(x)
        assert mfa.evaluated is not None


def test_training_through_a_screen(screened):
    mfa, x = screened
    x.requires_grad_()
    inputs = [x, *mfa.parameters()]
    loss = mfa(x)
    assert (mfa.evaluated > 0).double().mean() > 0.9
    found = torch.autograd.grad(loss, inputs)
    mfa._screen = None
    wanted = torch.autograd.grad(mfa(x), inputs)
    assert mfa.evaluated is None
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
    mfa.requires_grad_(False)
    mfa.screen(x)
    (of_tokens,) = torch.autograd.grad(mfa(x), x)
    assert mfa.evaluated is not None
    torch.testing.assert_close(of_tokens, wanted[0], rtol=1e-4, atol=1e-6 * float(wanted[0].abs().max()))


def test_a_training_step_through_a_screen_makes_the_woodbury_terms_once(screened, monkeypatch):
    mfa, x = screened
    made, factorize = [], ops.factorize
    monkeypatch.setattr(ops, "factorize", lambda *given: made.append(1) or factorize(*given))
    for _ in range(2):
        mfa(x).backward()
        with torch.no_grad():
            mfa.means.add_(0.01)
        made.clear()
        mfa(x)
        assert len(made) == 1


@pytest.mark.usefixtures("no_int8")
def test_a_screen_on_draws_from_the_mixture():
    mfa, x = screened_mixture()
    if not mfa.screen():
        pytest.skip("screening needs the C++ kernels")
    assert mfa.screened()[0]
    with torch.no_grad():
        mfa.log_prob(x)
    assert mfa.evaluated.double().mean() < 20


@torch.no_grad()
def test_a_screen_gives_way_to_the_int8_level_where_that_costs_less(monkeypatch):
    monkeypatch.setattr(cost, "STAGE_COST", (1, 0.1))
    mfa, x = screened_mixture()
    if not (mfa.woodbury().is_cpp and mfa.woodbury().int8[0].numel()):
        pytest.skip("not applicable: the dense scan has no int8 level here")
    for shift, dense in enumerate((0.0, 1.0)):  # of the dense scan in float32
        monkeypatch.setattr(cost, "INT8_COST", dense)
        assert mfa.screen(x)
        mfa.log_prob(x)
        assert (mfa.evaluated is not None) == (dense == 1.0)
        mfa.log_prob(x[:100])  # so few have no int8 level
        assert mfa.evaluated is not None
        mfa.means += 0.1 * shift  # parameters that have moved decide in the same way
        mfa.log_prob(x)
        assert (mfa.evaluated is not None) == (dense == 1.0)


def test_the_error_bound_of_log_prob():
    mfa, x = screened_mixture()
    wanted = mixture_of(mfa).log_prob_fp64(x)
    for _ in range(2):
        log_prob, bound = mfa.log_prob(x.view(3, 100, -1), return_error_bound=True)
        assert log_prob.shape == bound.shape == (3, 100)
        assert ((log_prob.flatten().double() - wanted).abs() <= bound.flatten()).all()
        assert bound.max() < 0.05
        mfa.screen(x)
    mfa.precision = "fast"
    with pytest.raises(ValueError, match="return_error_bound needs precision \"exact\", the mixture has 'fast'"):
        mfa.log_prob(x, return_error_bound=True)


def test_a_screen_that_would_not_pay_is_not_used():
    m = mixture(50, 32, 3, spread=0.01)
    mfa, x = MFA.from_parameters(*m[:3], m.log_weights.exp()), tokens(m, 100)
    assert not mfa.screen(x)
    per_component = mixture(50, 32, 3, per_component=True)
    assert not MFA.from_parameters(*per_component[:3], per_component.log_weights.exp()).screen(x)


FORWARD_MODE = {
    "log_prob": lambda mfa, x: mfa.log_prob(x),
    "screened": lambda mfa, x: mfa.screen(x.detach()) or mfa.log_prob(x),
    "component_log_prob": lambda mfa, x: mfa.component_log_prob(x),
    "responsibilities": lambda mfa, x: mfa.responsibilities(x),
    "encode": lambda mfa, x: mfa.encode(x).latents,
    "reconstruct": lambda mfa, x: mfa.reconstruct(x),
    "posterior": lambda mfa, x: mfa.posterior(x, 2)[0],
}


@pytest.mark.parametrize("way", FORWARD_MODE)
@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_is_refused_and_not_zero(way, frozen):
    mfa = module(9, 12, 3, dtype=torch.float32).requires_grad_(not frozen)
    x = mfa.sample(5)
    with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative \(jvp, jacfwd\)"):
        torch.func.jvp(lambda x: FORWARD_MODE[way](mfa, x), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        FORWARD_MODE[way](mfa, forward_ad.make_dual(x, x))


def test_forward_mode_of_parameters_is_refused_and_of_the_reference_right():
    mfa = module(9, 12, 3, dtype=torch.float64)
    x, parameters = mfa.sample(5), {name: p.detach() for name, p in mfa.named_parameters()}
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda p: torch.func.functional_call(mfa, p, (x,)), (parameters,), (parameters,))
    mfa.precision = "reference"
    _, found = torch.func.jvp(mfa.log_prob, (x,), (torch.ones_like(x),))
    mfa.precision = "exact"
    wanted = torch.autograd.grad(mfa.log_prob(x.requires_grad_()).sum(), x)[0].sum(-1)
    torch.testing.assert_close(found, wanted)


def test_forward_mode_is_refused_whatever_pytorch_calls_its_level(monkeypatch):
    monkeypatch.delattr(forward_ad, "_current_level", raising=False)
    monkeypatch.setattr(forward_ad, "unpack_dual", lambda tensor: forward_ad.UnpackedDualTensor(tensor, tensor))
    mfa = module(9, 12, 3, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        mfa.log_prob(torch.zeros(5, 12))


@pytest.mark.parametrize("precision", ["exact", "fast", "reference"])
def test_the_loss_of_no_tokens_is_that_of_torch(precision):
    mfa = MFA(6, 10, 2, precision=precision)
    loss = mfa(torch.empty(0, 10))
    assert loss.isnan()
    assert torch.nn.functional.cross_entropy(torch.empty(0, 3), torch.empty(0, dtype=torch.long)).isnan()
    loss.backward()
    assert all(not p.grad.any() for p in mfa.parameters() if p.grad is not None)


def test_a_mixture_gets_its_memory_without_the_compiler():
    """PyTorch's own `to_empty` imports it, which takes seconds of the first mixture that is loaded or fitted."""
    code = (
        "import sys, torch; from mfa_kernels import MFA; before = set(sys.modules)\n"
        "mfa = torch.nn.utils.skip_init(MFA, 2, 3, 1, dtype=torch.float64)\n"
        "assert mfa.means.shape == (2, 3) and mfa.means.dtype == torch.float64 and mfa.means.device.type == 'cpu'\n"
        "assert isinstance(mfa.means, torch.nn.Parameter)\n"
        "more = [m for m in set(sys.modules) - before if m.startswith(('sympy', 'torch.fx', 'torch._inductor'))]\n"
        "assert not more, more[:3]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
