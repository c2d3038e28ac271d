"""Every logit by the GPU's kernel: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.scan import triton_all_logits
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.helpers import budgets
from tests.helpers.budgets import Terms
from tests.helpers.mixtures import Mixture, drawn, rounded_factors

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted or emulated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (N, K, D, R): tiles of 4 tokens, 2 components in a band, 16 features and up to 16 ranks: three and a ragged tail each.
SHAPES = [(13, 7, 50, 10), (5, 3, 50, 49), (3, 1, 50, 1), (5, 3, 50, 0), (1, 2, 1, 1)]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    with configs.override(configs.AllLogits(tokens=4, components=2, features=16, warps=1, stages=2)):
        yield


def case(shape: tuple[int, int, int, int], per_component: bool = False) -> tuple[Mixture, torch.Tensor, Woodbury]:
    m, x = drawn(*shape, device=DEVICE, per_component=per_component)
    return m, x, rounded_factors(m)


def check(m: Mixture, x: torch.Tensor, woodbury: Woodbury) -> None:
    constants = woodbury.constants(m.log_weights)
    found = triton_all_logits.all_logits(x, woodbury, constants)
    assert found.dtype == torch.float32
    budgets.check(found, m.logits_fp64(x), Terms(m, x).logits())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.usefixtures("poisoned")
def test_all_logits(shape, per_component):
    check(*case(shape, per_component))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_all_logits_reads_halves(dtype):
    m, x, woodbury = case((13, 3, 50, 10))
    check(m, x.to(dtype), woodbury)


@pytest.mark.usefixtures("poisoned")
def test_few_programs_walk_over_many_tiles(monkeypatch):
    monkeypatch.setattr(triton_all_logits, "_PROGRAMS", 3)
    check(*case((13, 7, 50, 10)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("used", [0, 1, 6, 9])
def test_only_the_tokens_of_an_index(used):
    m, x, woodbury = case((13, 7, 50, 3))
    constants = woodbury.constants(m.log_weights)
    whole = triton_all_logits.all_logits(x, woodbury, constants)
    index = torch.tensor([12, 3, 3, 0, 7, 1, 2, 11, 5], dtype=torch.int32, device=DEVICE)
    count = torch.tensor([used], dtype=torch.int32, device=DEVICE)
    out = torch.full((9, 7), 123.0, device=DEVICE)
    found = triton_all_logits.all_logits(x, woodbury, constants, index, count, out)
    assert found is out
    assert torch.equal(out[:used], whole[index[:used].long()])
    assert (out[used:] == 123).all()
    assert torch.equal(triton_all_logits.all_logits(x, woodbury, constants, index), whole[index.long()])


def test_a_bad_token_is_alone():
    m, x, woodbury = case((6, 3, 50, 10))
    constants = woodbury.constants(m.log_weights)
    expected = triton_all_logits.all_logits(x, woodbury, constants)
    x = x.clone()
    x[2, 3] = math.nan
    found = triton_all_logits.all_logits(x, woodbury, constants)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], expected[others])


def test_no_tokens():
    m, x, woodbury = case((1, 3, 50, 2))
    assert triton_all_logits.all_logits(x[:0], woodbury, woodbury.constants(m.log_weights)).shape == (0, 3)
