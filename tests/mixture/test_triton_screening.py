"""EM's scans through bounds on a GPU: in the interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mfa_kernels import MFA
from mfa_kernels.mixture import screening
from mfa_kernels.mixture.screening import Screening
from mfa_kernels.ops.common import configs
from tests.helpers.mixtures import mixture, tokens
from tests.ops.scan.test_triton_pipeline import DEVICE, TILES

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(screening, "_APART", 100)
    monkeypatch.setattr(screening, "_STAGE_0", 0.01)
    with configs.override(TILES, configs.Pairs(pairs=16, features=64, warps=4, stages=1)):
        yield


def model(per_component: bool = False) -> tuple[MFA, torch.Tensor]:
    m = mixture(300, 160, 3, spread=4.0, per_component=per_component)
    x = tokens(m, 60).to(DEVICE)
    return MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).to(DEVICE), x


def test_rows_go_through_bounds_and_come_to_what_the_dense_scan_gives():
    mfa, x = model()
    scans = Screening(mfa, x)
    scans.prepare(len(x), 1000)
    assert scans.used
    assert scans.ready()
    assert scans.cost < 1
    found, dense = scans.scan(x), mfa.active_pairs(x)
    torch.testing.assert_close(found.log_prob, dense.log_prob, rtol=1e-5, atol=1e-3)
    assert torch.equal(found.components[:, 0], dense.components[:, 0])
    assert scans.work > 0
    scans.parameters_moved()
    assert not scans.ready()
    with torch.no_grad():
        mfa.means += 0.01
    scans.prepare(len(x), 1000)
    assert scans.ready()
    torch.testing.assert_close(scans.scan(x).log_prob, mfa.active_pairs(x).log_prob, rtol=1e-5, atol=1e-3)


def test_noise_per_component_takes_the_dense_scan():
    mfa, x = model(per_component=True)
    scans = Screening(mfa, x)
    scans.prepare(len(x), 1000)
    assert not scans.used
    torch.testing.assert_close(scans.scan(x).log_prob, mfa.active_pairs(x).log_prob)
