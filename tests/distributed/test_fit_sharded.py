"""A mixture fitted component-parallel, by two and four processes, is the one that `fit` comes to in one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mfa_kernels import MFA
from mfa_kernels.common.processes import ALONE
from mfa_kernels.fitting import em_base
from tests.distributed import worker
from tests.distributed.test_fit import assert_close, assert_same_bits, load


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three to a pass, the last one shorter, as in the processes."""
    monkeypatch.setattr(em_base, "_LEAST_BATCH", 600)
    monkeypatch.setattr(em_base, "_BATCH_ELEMENTS", 1)


def processes(found, size):
    return [load(found, size, rank)["fit_sharded"] for rank in range(size)]


@pytest.mark.parametrize("name", worker.SHARDED_FITS)
def test_several_processes_fit_what_one_fits(found, name):
    expected = worker.outcome(worker.run(**{"method": "em", **worker.SHARDED_FITS[name]}))
    if name.endswith("a region moves"):
        assert expected["report"]["revived_components"] == 1
    assert_close(worker.sharded_outcome(worker.run_sharded(**worker.SHARDED_FITS[name], group=False)), expected)
    for size in worker.SIZES:
        first, *others = [mine[name] for mine in processes(found, size)]
        assert_close(first, expected)
        for other in others:
            assert_same_bits(first, other)


@pytest.mark.parametrize("size", worker.SIZES)
def test_regions_of_two_ranks_that_are_one(found, size):
    expected = worker.sharded_outcome(worker.run_sharded(**worker.TWINS, start=worker.twins(False), group=False))
    assert expected["report"]["revived_components"] == 1
    for mine in processes(found, size):
        assert_close(mine["twins"], expected)


@pytest.mark.parametrize("size", worker.SIZES)
def test_a_saved_mixture_is_a_start(found, size):
    saved = MFA.from_pretrained(found / f"{size}, saved")
    for rank, mine in enumerate(processes(found, size)):
        assert_same_bits(dict(saved.tensors()), mine["shared"]["state"])
        assert mine["seen"] == [7] * 4, "a callback on every process, after each of three passes and the start"
        assert mine["log"] == (rank == 0)
        best = mine["shared"]["report"]["held_out_nll"]
        assert math.isclose(mine["again"]["history"][0]["held_out_nll"], best, rel_tol=1e-12)


@pytest.mark.parametrize("name", worker.SHARDED_RESUMED)
def test_what_four_have_begun_any_number_goes_on_with(found, name):
    four, two = processes(found, 4), processes(found, 2)
    for mine in four:
        assert_same_bits(mine[f"{name}, resumed"], mine[name])
    for mine in two:
        assert_same_bits(mine[f"{name}, resumed"], two[0][f"{name}, resumed"])
    assert_close(two[0][f"{name}, resumed"], four[0][name])
    one = worker.run_sharded(**worker.SHARDED_FITS[name], resume=found / f"four, for 1, {name}", group=False)
    assert_close(worker.sharded_outcome(one), four[0][name])


@pytest.mark.parametrize("size", worker.SIZES)
def test_k_means_shares_its_passes(found, size):
    expected: dict[bool, Any] = worker.clusters_of_a_sample(ALONE)
    assert expected[True]["skipped"] == 16
    first, *others = [mine["clusters"] for mine in processes(found, size)]
    for other in others:
        for weighted in (True, False):
            assert_same_bits(first[weighted], other[weighted])
    for weighted in (True, False):
        assert_close(first[weighted], expected[weighted])


def test_no_rank_holds_the_loadings_of_all(found):
    """No tensor of three dimensions is larger than R + 1 rows of D for each of the process's own components."""
    components, features, rank = worker.LARGE["n_components"], worker.LARGE_FEATURES, worker.LARGE["rank"]
    assert worker.largest_tensor(False)[0] >= components * features * rank, "in one process, it is found"
    for size in worker.SIZES:
        for mine in processes(found, size):
            elements, loadings = mine["largest"]
            assert loadings == (components // size, features, rank)
            assert elements <= components // size * features * (rank + 1)


@pytest.mark.parametrize("size", worker.SIZES)
def test_errors_reach_every_rank(found, size):
    for mine in processes(found, size):
        assert mine["other data"].startswith("ValueError: the processes that fit together have different data")
        assert "cannot be spread over" in mine["too many"]
        assert mine["other start"].startswith("ValueError: start must have (n_components, ")
