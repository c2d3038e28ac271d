"""A model with a mixture in its loss: DistributedDataParallel and FSDP take the step of one process."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels import MFA
from tests.distributed.test_fit import load
from tests.distributed.training import FEATURES, METHODS, Reader, ids, outcome, step
from tests.distributed.worker import SIZES

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
CASES = [(size, rank) for size in SIZES for rank in range(size)]


@pytest.fixture(scope="module")
def one() -> Reader:
    return Reader()


@pytest.fixture(scope="module")
def expected(one: Reader) -> dict[str, torch.Tensor]:
    return outcome(one, step(one, list(ids())))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("size", "rank"), CASES)
def test_distributed_data_parallel(found, expected, size, rank):
    assert_same(load(found, size, rank)["training, ddp"], expected)


@pytest.mark.parametrize(("size", "rank"), CASES)
def test_fully_sharded(found, expected, size, rank):
    assert_same(load(found, size, rank)["training, fsdp"]["step"], expected)


@pytest.mark.parametrize(("size", "rank"), CASES)
def test_what_a_spread_mixture_refuses(found, size, rank):
    """A method reads all parameters, which no process has between two calls of the module."""
    mine = load(found, size, rank)["training, fsdp"]
    assert set(mine["methods"]) == set(METHODS)
    for name, said in {**mine["methods"], "save": mine["save"], "paper": mine["paper"]}.items():
        assert said.startswith("RuntimeError: the parameters of the mixture are spread over processes"), (name, said)
    assert mine["x"].startswith("TypeError: x must be a tensor of one process, got a DTensor")


@pytest.mark.parametrize(("size", "rank"), CASES)
def test_ways_out_of_it(found, expected, one, size, rank):
    """What the error says to do gives the mixture of one process."""
    x = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(load(found, size, rank)["training, fsdp"]["log_prob"], one.mfa.log_prob(x))
    saved = MFA.from_pretrained(found / f"whole-{size}-{rank}")
    for name, tensor in saved.named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[f"value mfa.{name}"], **CLOSE)
