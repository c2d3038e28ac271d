from __future__ import annotations

import math

import pytest
import torch

from mfa_kernels.ops.scan.candidates import scan_candidates
from tests.helpers.mixtures import drawn
from tests.ops.scan.test_scan import check_slots

# (N, K, D, R, C). Pairs of a component are computed eight at a time, two at a time and alone.
SHAPES = [(1, 3, 5, 0, 2), (50, 3, 33, 2, 3), (300, 40, 61, 10, 9), (40, 70, 391, 13, 1), (500, 7, 64, 4, 20)]


def candidates_of(n: int, components: int, count: int) -> torch.Tensor:
    """Some twice, and some none."""
    return torch.randint(-1, components, (n, count), dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("spread", [3.0, 0.05], ids=["one_hot", "diffuse"])
def test_as_a_scan_of_the_candidates_alone(backend, shape, per_component, spread):
    n, components, features, rank, count = shape
    m, x = drawn(n, components, features, rank, per_component=per_component, spread=spread, dtype=torch.float64)
    candidates = candidates_of(n, components, count)
    found = scan_candidates(x, candidates, m.woodbury(), m.log_weights, 4)
    truth = m.logits_fp64(x)
    counted = torch.full_like(truth, -math.inf)
    for token in range(n):
        known = set()
        for column, k in enumerate(candidates[token].tolist()):
            if k < 0 or k in known:
                assert found.logits[token, column] == -math.inf
            else:
                counted[token, k] = truth[token, k]
                torch.testing.assert_close(found.logits[token, column], truth[token, k], rtol=1e-12, atol=1e-9)
            known.add(k)
    some = counted.isfinite().any(1)
    active = found.active._replace(**{name: part[some] for name, part in found.active._asdict().items()})
    torch.testing.assert_close(active.log_prob, counted[some].logsumexp(1), rtol=1e-12, atol=1e-9)
    check_slots(active, counted[some], 4, 1e-9)
    assert found.active.log_prob[~some].isnan().all()
    assert (found.active.components[~some] == -1).all()


def test_all_components_give_the_scan(backend):
    m, x = drawn(200, 30, 40, 5, spread=0.5)
    every = torch.arange(30, dtype=torch.int32).expand(200, -1)
    found, whole = scan_candidates(x, every, m.woodbury(), m.log_weights, 8).active, m.active(x, slots=8)
    assert torch.equal(found.components, whole.components)
    torch.testing.assert_close(found.log_prob, whole.log_prob, rtol=1e-6, atol=1e-4)


def test_a_token_that_is_not_finite_has_no_pairs(backend):
    m, x = drawn(20, 30, 40, 5)
    x[3], x[4, 7] = math.nan, math.inf
    found = scan_candidates(x, candidates_of(20, 30, 6), m.woodbury(), m.log_weights).active
    assert found.log_prob[3:5].isnan().all()
    assert (found.components[3:5] == -1).all()


def test_candidates_out_of_range_are_refused(backend):
    m, x = drawn(20, 30, 40, 5)
    for wrong in (-2, 30):
        with pytest.raises((IndexError, ValueError), match="candidates"):
            scan_candidates(x, torch.full((20, 2), wrong, dtype=torch.int32), m.woodbury(), m.log_weights)


def test_the_number_of_threads_changes_no_bit():
    m, x = drawn(700, 50, 40, 5, spread=0.5)
    candidates, before = candidates_of(700, 50, 9), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(scan_candidates(x, candidates, m.woodbury(), m.log_weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*([*pairs.active, pairs.logits] for pairs in found)))
