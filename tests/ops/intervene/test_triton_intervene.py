"""The kernel that steers on a GPU: on a GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mfa_kernels.ops.common import trust
from mfa_kernels.ops.intervene import triton_intervene
from mfa_kernels.ops.intervene.op import intervene
from mfa_kernels.ops.woodbury.types import Woodbury
from tests.helpers.mixtures import portable_factors
from tests.ops.intervene.cases import WAYS, Case, case, same, within_budget

pytestmark = pytest.mark.gpu  # and on a CPU: interpreted

_TILES = triton_intervene._tiles
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 features a tile: 50 are three tiles and a ragged tail."""
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")

    monkeypatch.setattr(triton_intervene, "_tiles", lambda *sizes: {**_TILES(*sizes), "BD": 16, "VEC": 1})


def run(c: Case) -> tuple[torch.Tensor, torch.Tensor]:
    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if isinstance(value, Woodbury):
            return Woodbury(*(moved(v) for v in vars(value).values()))
        if isinstance(value, tuple):
            return type(value)(*map(moved, value)) if hasattr(value, "_fields") else tuple(map(moved, value))
        return value

    out, tally = intervene(*moved(c.arguments(portable_factors(c.mixture))))
    return out.cpu(), tally.cpu()


def check(c: Case) -> None:
    out, tally = run(c)
    exact, expected = c.oracle()
    assert out.dtype == c.hidden.dtype
    truncates = DEVICE == "cpu" and out.dtype == torch.bfloat16  # the interpreter does; a GPU rounds
    within_budget(out, exact, c.terms(), 1.0 if truncates else 0.5)
    torch.testing.assert_close(tally.double(), expected, rtol=0, atol=1e-6)
    alone = tally[..., 0] == 0
    assert torch.equal(out[alone].nan_to_num(7), c.hidden[alone].nan_to_num(7))


@pytest.mark.parametrize(("way", "shape"), [
    *((way, (5, 50, 10)) for way in WAYS), ("all", (3, 50, 17)), ("all", (1, 1, 1)), ("spread", (4, 16, 0)),
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_matches_the_definitions(way: str, shape: tuple[int, int, int]) -> None:
    check(case(way, shape=shape, dtype=torch.float32, count=2))


@pytest.mark.parametrize("given", [
    {"rows": 1, "way": "latents"}, {"rows": 3, "steps": True}, {"steps": True, "mask": (6, 2)},
    {"mask": (1, 2), "way": "latents"}, {"mask": (6, 1)}, {"passes": True, "mask": (1, 1)}, {"slots": 1}, {"slots": 9},
    {"per_component": True}, {"batch": 13, "count": 1},
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("poisoned")
def test_rows_positions_masks_and_slots(given: dict[str, Any]) -> None:
    check(case(**{"dtype": torch.float32, "count": 2, **given}))


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_halves_are_rounded_once(hidden_dtype: torch.dtype) -> None:
    check(case(shape=(5, 50, 10), count=2, dtype=torch.float32, hidden_dtype=hidden_dtype))


def test_float64_tokens_take_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_intervene, "intervene", lambda *args: pytest.fail("the kernel computes in float32"))
    check(case("fixed", dtype=torch.float32, hidden_dtype=torch.float64))


def test_no_tokens_and_same_bits_twice() -> None:
    for batch, count in ((0, 3), (6, 0)):
        out, tally = run(case(batch=batch, count=count, rows=1, dtype=torch.float32))
        assert (out.shape, tally.shape) == ((batch, count, 33), (batch, count, 3))
    c = case(dtype=torch.float32)
    assert same(run(c), run(c))


def test_a_kept_norm_that_does_not_change_costs_no_bits() -> None:
    c = case("norm", dtype=torch.float32, finite=True)
    same = torch.zeros_like(c.edit.coefficients)
    same[..., 0] = 1
    edit = c.edit._replace(coefficients=same, shift=torch.zeros_like(c.edit.shift))
    assert torch.equal(run(c._replace(edit=edit))[0], c.hidden)


def test_tiles_fit_the_registers() -> None:
    for rank in (0, 1, 10, 64):
        tiles = _TILES(16, rank, 4096)
        assert tiles["BR"] >= rank
        assert tiles["BR"] * tiles["BD"] <= 128 * 64


@pytest.mark.parametrize("wrong", [9, 10**6, -5])
def test_what_is_no_component_is_no_pair(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """On a GPU nobody asks whether components are in range: the kernel touches no memory but its own."""
    monkeypatch.setattr(trust, "check_range", lambda *rest: None)
    c = case("all", shape=(9, 50, 3), dtype=torch.float32)
    empty = c.active.components.clone()
    empty[::2, 0] = -1
    good = run(c._replace(active=c.active._replace(components=empty)))
    bad = run(c._replace(active=c.active._replace(components=torch.where(empty == -1, wrong, empty).int())))
    assert same(good, bad)
