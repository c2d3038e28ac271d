"""What operators spend on looking at their tensors: `python -m bench.bench_checks`, us per call, one token."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import torch

from mfa_kernels.ops.intervene import op as intervene
from mfa_kernels.ops.kmeans import op as kmeans
from mfa_kernels.ops.pairs import op as pairs
from mfa_kernels.ops.scan import op as scan
from mfa_kernels.ops.screen import op as screen
from mfa_kernels.ops.statistics import op as statistics
from tests.ops import fuzz
from tests.ops.intervene.cases import WAYS, case

SHAPE = (1024, 576, 10)
CALLS, ROUNDS = 20_000, 7


def microseconds(call: Callable[[], Any]) -> float:
    return min(timeit.repeat(call, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> None:
    made = fuzz.calls(*SHAPE, per_component=False, tokens_=1)
    checks: dict[str, tuple[Callable[..., None], list[Any]]] = {
        "log_prob": (scan.check_log_prob, made["log_prob"][:11]),
        "log_prob_backward": (scan._check_log_prob_backward, made["log_prob_backward"][:-1]),
        "latents": (pairs._check_latents, made["latents"]),
        "decode": (pairs._check_decode, made["decode"]),
        "nearest": (kmeans._check_nearest, made["nearest"]),
        "statistics": (statistics._check_statistics, made["statistics"]),
        "select_screened": (screen._check_select_screened, made["select_screened"][:12]),
    }
    for way in WAYS:
        given = case(way, batch=1, count=1, shape=SHAPE, dtype=torch.float32)._replace(passed=None)
        checks[f"intervene, {way}"] = (intervene._check, given.operands())
    x = torch.zeros(1, SHAPE[1])
    print(f"the shape and the dtype of one tensor {microseconds(lambda: (x.shape, x.dtype)):8.2f} us")
    for name, (check, arguments) in checks.items():
        print(f"{name:28}{sum(isinstance(a, torch.Tensor) for a in arguments):3} tensors"
              f"{microseconds(lambda check=check, arguments=arguments: check(*arguments)):8.2f} us")  # fmt: skip


if __name__ == "__main__":
    main()
