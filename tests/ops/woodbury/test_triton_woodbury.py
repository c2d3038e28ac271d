"""Stage 0 in Triton against float64: it serves GPUs whose machine has no nvcc."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mfa_kernels.ops.common import backends, cuda, first_use
from mfa_kernels.ops.woodbury import op, reference, triton_woodbury
from mfa_kernels.ops.woodbury.portable import portable
from mfa_kernels.ops.woodbury.triton_woodbury import woodbury
from mfa_kernels.ops.woodbury.types import TRITON_RANK
from tests.helpers import budgets
from tests.helpers.mixtures import mixture
from tests.ops.woodbury.test_woodbury import collinear, log_det_by_singular_values

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1), (3, 130, 1), (2, 150, 3), (2, 150, 10), (2, 75, 17), (1, 75, 32)]  # three tiles, one ragged


def found_of(m):
    return tuple(t.cpu() for t in woodbury(*(t.to(DEVICE) for t in m[:3])))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
def test_rounds_what_float64_finds(shape, per_component):
    """Everything is computed in float64: what is left is one rounding of each value, and of what was cancelled."""
    m = mixture(*shape, per_component=per_component)
    wide = m.to(torch.float64)
    rows, cholesky, log_det = found_of(m)
    a, lower, wanted = reference.woodbury(wide.loadings, wide.noise_variance)
    rank = shape[2]
    assert torch.equal(rows[:, 0], m.means)
    budgets.check(rows[:, 1 : rank + 1], a, a.abs(), "rows")
    budgets.check(cholesky, lower, lower.abs(), "cholesky")
    budgets.check(log_det, wanted, wanted.abs() + 1, "log_det")
    assert torch.equal(cholesky, cholesky.tril())
    assert rows.shape[1] == rank + 1 + per_component
    if per_component:
        scale = wide.noise_variance.rsqrt()
        budgets.check(rows[:, -1], scale, scale, "scale")


@pytest.mark.parametrize("length", [1.0, 1e3, 1e7])
def test_of_collinear_loadings(length):
    """A pivot near 1 is off by what the square of the length is off by in float64."""
    m = collinear(torch.float32, length)
    _, _, log_det = found_of(m)
    allowed = 1e-3 + 64 * torch.finfo(torch.float64).eps * length**2
    torch.testing.assert_close(log_det.double(), log_det_by_singular_values(m), rtol=1e-6, atol=allowed)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with
def test_broken_parameters_spoil_their_own_component():
    m = mixture(5, 130, 3, per_component=True)
    healthy = found_of(m)
    m.noise_variance[1, 7] = -1.0
    m.noise_variance[2, 129] = torch.nan
    m.noise_variance[3, 0] = 0.0
    m.loadings[4, 40, 1] = torch.inf
    rows, cholesky, log_det = found_of(m)
    assert log_det[1].isnan()
    assert log_det[2].isnan()
    assert not log_det[3].isfinite()
    assert not log_det[4].isfinite()
    for own, expected in zip((rows, cholesky, log_det), healthy):
        assert torch.equal(own[0], expected[0])


def test_two_runs_give_the_same_bits():
    m = mixture(3, 100, 5)
    assert all(torch.equal(one, other) for one, other in zip(found_of(m), found_of(m)))


def test_which_ranks_it_serves(monkeypatch):
    """On a GPU; the others, and the interpreter, take plain PyTorch."""
    assert not op._fits_triton(torch.empty(2, 3, 4))
    monkeypatch.setattr(op, "_fits_triton", lambda loadings: 0 < loadings.shape[2] <= TRITON_RANK)
    monkeypatch.setattr(cuda, "library", lambda: None)
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    m = mixture(2, 20, 3)
    found, wanted = torch.ops.mfa_kernels.factors(*m[:3]), found_of(m)
    assert all(torch.equal(one, other.to(one)) for one, other in zip(found, wanted))
    for rank in (0, 33):
        m = mixture(2, 40, rank)
        torch.ops.mfa_kernels.factors(*m[:3])  # served, without the kernel


def test_a_wrong_one_gives_way_to_plain_pytorch(monkeypatch, tmp_path):
    """As at the first use on a chip: a warning, and the right terms."""
    monkeypatch.setattr(op, "_fits_triton", lambda loadings: True)
    monkeypatch.setattr(cuda, "library", lambda: None)
    monkeypatch.setattr(triton_woodbury, "woodbury", lambda *given: tuple(1.01 * t for t in woodbury(*given)))
    monkeypatch.setattr(backends, "serving", lambda like, rank: "triton")
    monkeypatch.setenv("MFA_KERNELS_TRUST", "check")
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "_settled", {})
    m = mixture(2, 20, 3)
    with pytest.warns(RuntimeWarning, match="factors did not pass its first use .* plain PyTorch serves it"):
        found = op._factors(*m[:3])
    assert all(torch.equal(one, other) for one, other in zip(found, portable(*m[:3])))
