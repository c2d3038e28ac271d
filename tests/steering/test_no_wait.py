"""Steering asks the device nothing: no value is read back, so on a GPU the host never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mfa_kernels.mixture import codes
from mfa_kernels.steering import (
    Add,
    LogDensity,
    Offset,
    Reconstruct,
    Remove,
    Responsibility,
    Toward,
    active_pairs,
    intervene,
    steer,
)
from mfa_kernels.steering.apply import Program
from mfa_kernels.steering.handle import Handle
from mfa_kernels.steering.interventions import as_rows
from mfa_kernels.steering.tracking import Tracker
from tests.steering.tiny import LAYER, WIDTH, Z, causal_lm, fitting_mixture, generated, prompts

BOTH = [Toward(2, 0.6), Offset(2, Z)]
MIXTURE = [Toward(None, 0.6), Offset(None, Z)]
WAYS: dict[str, dict[str, Any]] = {
    "fixed": {"interventions": BOTH},
    "fixed_norm": {"interventions": BOTH, "norm": "keep"},
    "gate": {"interventions": BOTH, "gate": (0, 0.1)},
    "composed_gate": {"interventions": BOTH, "gate": [Responsibility(0, 0.1) & ~LogDensity(-20.0), None]},
    "mixture": {"interventions": MIXTURE, "norm": "keep"},
    "gated_mixture": {"interventions": MIXTURE, "gate": ~LogDensity(-20.0)},
    "reconstruct": {"interventions": Reconstruct(0.5)},
    "several": {"interventions": [Remove(1, "region"), Remove(2), Add(torch.ones(WIDTH), 0.3), Reconstruct(0.5)]},
    "rows": {"rows": [BOTH, None], "gate": [None, (0, 0.1)], "norm": ["keep", None]},
    "scheduled": {"interventions": Toward(2, lambda step: 0.2 * step)},
    "scheduled_rows": {"rows": [Toward(None, lambda step: 0.2 * step), Toward(1, 0.5)], "gate": (0, 0.1)},
    "generated": {"interventions": BOTH, "positions": "generated"},
    "slice": {"interventions": MIXTURE, "positions": slice(5, 9)},
    "mask": {"interventions": BOTH, "positions": torch.arange(12) % 2 == 0},
}
_READ_BACK = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "tolist"}


class Watch(TorchDispatchMode):
    """Raises where a value is read back, or decides a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put_", "index_put") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in _READ_BACK or masks:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def watched(method: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with Watch():
            return method(*args, **kwargs)

    return call


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence is read as it is on a GPU: on a CPU, where asking is cheap, it asks how many slots are needed."""

    class Torch:
        compiler = SimpleNamespace(is_compiling=lambda: True)

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(active_pairs, "torch", Torch())


@contextmanager
def watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(Handle, "_act", watched(Handle._act))
        patch.setattr(Tracker, "_observe", watched(Tracker._observe))
        yield


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_generation_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mfa, inputs = causal_lm(), fitting_mixture(), prompts(padded=True)
    with steer(model, mfa, LAYER, **WAYS[name]) as handle:
        expected = generated(model, inputs)
        stats = handle.stats()
    with watching(monkeypatch), steer(model, mfa, LAYER, **WAYS[name]) as handle:
        found = generated(model, inputs)
        assert handle.stats() == stats
    assert stats[1] > 0  # tokens steered
    assert torch.equal(found[0], expected[0])


def test_the_watch_sees_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the evidence does ask: the test above can fail."""
    monkeypatch.setattr(codes, "SLOTS", 2)  # fewer than the mixture has components
    model = causal_lm()
    waits = pytest.raises(AssertionError, match="_local_scalar_dense waits for the device")
    with watching(monkeypatch), steer(model, fitting_mixture(), LAYER, None, 0.5), waits:
        generated(model, prompts())
    with pytest.raises(AssertionError, match="index waits"), Watch():
        Z[Z > 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the driver's own watch needs a GPU")
@pytest.mark.parametrize("name", WAYS)
def test_a_step_on_a_gpu_waits_for_nothing(name: str) -> None:
    mfa = fitting_mixture().cuda()
    way = {"interventions": None, "rows": None, "gate": None, "norm": None, **WAYS[name]}
    rows = as_rows(way["interventions"], way["rows"], mfa)
    x = torch.randn(2, 1, WIDTH, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        program = Program(mfa, rows, x.device, way["gate"], way["norm"])
        for step in range(2):  # kernels are compiled, and the first copy allocates
            program(x, True, (step,))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, 4):
                out = program(x, True, (step,)).hidden
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = intervene(x, mfa, way["interventions"], rows=way["rows"], gate=way["gate"], norm=way["norm"], step=3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
