"""Cost of the operators' checks of their tensors: `python -m bench.bench_checks`, us per call, one token."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from mfa_kernels.ops.common import register
from tests.ops import fuzz
from tests.ops.intervene.cases import WAYS, case

SHAPE = (1024, 576, 10)
CALLS, ROUNDS = 20_000, 7
OPERATORS = ("log_prob", "log_prob_backward", "latents", "decode", "nearest", "statistics")


def microseconds(call: Callable[[], Any]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def alone(kernel: Callable[..., Any]) -> Callable[..., None]:
    """The checks of an operator, and the nouns that it makes, without what they are made for."""
    scope = kernel.__globals__ | {"function": lambda *given: None}
    return FunctionType(kernel.__code__, scope, argdefs=kernel.__defaults__)


def main() -> None:
    made = fuzz.calls(*SHAPE, per_component=False, tokens_=1)
    calls = {name: (name, made[name]) for name in OPERATORS}
    for way in WAYS:
        given = case(way, batch=1, count=1, shape=SHAPE, dtype=torch.float32)._replace(passed=None)
        calls[f"intervene, {way}"] = ("intervene", given.operands())
    x = torch.zeros(1, SHAPE[1])
    print(f"the shape and the dtype of one tensor {microseconds(lambda: (x.shape, x.dtype)):8.2f} us")
    for name, (operator, arguments) in calls.items():
        check = alone(register.KERNELS[operator])
        print(f"{name:28}{sum(isinstance(a, torch.Tensor) for a in arguments):3} tensors"
              f"{microseconds(lambda check=check, arguments=arguments: check(*arguments)):8.2f} us")  # fmt: skip


if __name__ == "__main__":
    main()
