"""python -m bench.steering_launches: how many operations a steered decode step adds on a GPU; none is needed.

Counts what reaches the dispatcher and is more than a view, per call of a steered layer's hook, on fake tensors and by
the path that GPUs and compiled code take. An operator of ours counts as one; it may launch several kernels.
"""

from __future__ import annotations

import collections
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mfa_kernels import MFA
from mfa_kernels.steering import LogDensity, Offset, Reconstruct, Remove, Responsibility, Toward
from mfa_kernels.steering.apply import Program
from mfa_kernels.steering.handle import _Counts
from mfa_kernels.steering.interventions import as_rows

COMPONENTS, FEATURES, RANK = 64, 128, 10
Z = torch.linspace(-2, 2, RANK)
FIXED, MIXTURE = [Toward(17, 0.4), Offset(17, Z)], [Toward(None, 0.4), Offset(None, Z)]
WAYS: dict[str, tuple[Any, Any, Any]] = {
    "fixed": (FIXED, None, None),
    "fixed, norm": (FIXED, None, "keep"),
    "gate": (FIXED, (17, 0.5), None),
    "gate made of two": (FIXED, Responsibility(17, 0.5) & ~LogDensity(-20.0), None),
    "mixture": (MIXTURE, None, None),
    "mixture, gate, norm": (MIXTURE, (17, 0.5), "keep"),
    "reconstruct": (Reconstruct(0.4), None, None),
    "remove one region's latents": (Remove(17), None, None),
}
_FREE = {"view", "unsqueeze", "expand", "slice", "select", "alias", "detach", "permute", "transpose", "t", "empty",
         "new_empty", "_unsafe_view", "device"}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts operations that are more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operations(
    interventions: Any, gate: Any = None, norm: Any = None
) -> tuple[collections.Counter, collections.Counter]:
    """Returns the operations of steering one token in bfloat16, and of counting it for `stats()`."""
    mfa = MFA(COMPONENTS, FEATURES, RANK).requires_grad_(False)
    program = Program(mfa, as_rows(interventions, None, mfa), mfa.means.device, gate, norm)
    hidden, tally = torch.zeros(1, 1, FEATURES, dtype=torch.bfloat16), _Counts(mfa.means.device)
    program.prepare(hidden.dtype, hidden.device, (0,))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
        hidden = fake.from_tensor(hidden)
        tally.on_device = fake.from_tensor(tally.on_device)
        with mock.patch("torch.compiler.is_compiling", return_value=True), Counting() as steering:
            outcome = program(hidden, True, (0,))
        with Counting() as counting:
            if outcome.tally is not None:
                tally.add_tally(outcome.tally)
    return steering.counts, counting.counts


def main() -> None:
    print("| | steering | counting | which |\n|---|---|---|---|")
    for name, way in WAYS.items():
        steering, counting = operations(*way)
        which = ", ".join(f"{count} {op}" for op, count in (steering + counting).items())
        print(f"| {name} | {steering.total()} | {counting.total()} | {which} |")


if __name__ == "__main__":
    main()
