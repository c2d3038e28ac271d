"""Choice of a pass's tokens, for every kind of `positions`, with and without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels.steering.positions import check_positions, choose
from mfa_kernels.steering.tracking import Pass

CPU = torch.device("cpu")

# A prompt of 4 columns, 3 generated so far; row 0 is whole, row 1 has 2 columns of padding on the left.
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]).bool()
MASK = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 1]]).bool()
CASES: list[tuple[Any, list[list[int]]]] = [
    ("all", [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]),
    ("prompt", [[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0]]),
    ("generated", [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]),
    ("last", [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]),
    (slice(None), [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]),
    (slice(1, 4), [[0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0]]),
    (slice(1, None, 2), [[0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1, 0]]),
    (slice(0, 0), [[0] * 7, [0] * 7]),
    (MASK[0], [[1, 0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1, 1]]),
    (MASK, [[1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0]]),
]


def chosen(positions: Any, now: Pass, batch: int = 2) -> Tensor:
    out = choose(check_positions(positions), now, batch, CPU)
    return torch.as_tensor(out).expand(batch, now.tokens)


def passes(bounds: list[int], real: Tensor | None) -> list[Pass]:
    """The columns of a sequence, cut at `bounds`."""
    out = []
    for start, end in zip([0, *bounds], [*bounds, 7]):
        padding = None if real is None else (~real[:, :start]).sum(1, keepdim=True)
        out.append(Pass(start, end - start, 4, None if real is None else real[:, start:end], padding))
    return out


@pytest.mark.parametrize(("positions", "expected"), CASES, ids=lambda case: str(case)[:24])
@pytest.mark.parametrize("bounds", [[], [4, 5, 6], [1, 2, 4, 5, 6], [3, 4, 6]], ids=str)
def test_padded_batch_cut_into_passes(positions: Any, expected: list[list[int]], bounds: list[int]) -> None:
    out = torch.cat([chosen(positions, now) for now in passes(bounds, REAL)], 1)
    assert out.int().tolist() == expected


@pytest.mark.parametrize(("positions", "expected"), CASES, ids=lambda case: str(case)[:24])
@pytest.mark.parametrize("bounds", [[], [4, 5, 6], [3, 4, 6]], ids=str)
def test_without_padding(positions: Any, expected: list[list[int]], bounds: list[int]) -> None:
    out = torch.cat(
        [chosen(positions, now, batch=1 if positions is not MASK else 2) for now in passes(bounds, None)], 1
    )
    assert out[0].int().tolist() == expected[0]


def test_names_cost_nothing_where_the_answer_is_known() -> None:
    prompt, step = Pass(0, 4, 4), Pass(4, 1, 4)
    answers = {
        name: (choose(name, prompt, 2, CPU), choose(name, step, 2, CPU)) for name in ("all", "prompt", "generated")
    }
    assert answers == {"all": (True, True), "prompt": (True, False), "generated": (False, True)}
    assert choose("last", step, 2, CPU) is True


def test_last_of_right_padded_rows() -> None:
    real = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    out = chosen("last", Pass(0, 3, 3, real), batch=4)
    assert out.int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_mask_rows_repeat_over_an_expanded_batch() -> None:
    out = chosen(MASK, Pass(0, 6, 6), batch=4)
    assert torch.equal(out, MASK.repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="a mask for 2 batch rows does not fit a batch of 3"):
        chosen(MASK, Pass(0, 6, 6), batch=3)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", slice(1, 5)], ids=str)
def test_never_waits_for_the_device(positions: Any) -> None:
    meta = torch.device("meta")
    for now in (Pass(0, 5, 3), Pass(0, 5, 3, torch.ones(2, 5, dtype=torch.bool, device=meta))):
        choose(positions, now, 2, meta)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ("first", ValueError, "positions must be one of 'all', 'prompt', 'generated', 'last', got 'first'"),
        (slice(-3, None), ValueError, "positions.start must be an integer >= 0, got -3"),
        (slice(0, 5, 0), ValueError, "positions.step must be an integer >= 1, got 0"),
        (slice(0.5, 2), TypeError, "positions.start must be an integer, got 0.5"),
        (torch.ones(3), ValueError, r"a bool tensor of shape \(T,\) or \(B, T\), got torch.float32"),
        (torch.ones(1, 1, 3).bool(), ValueError, r"of shape \(1, 1, 3\)"),
        (torch.ones(0).bool(), ValueError, r"of shape \(0,\)"),
        (5, TypeError, "a slice or a bool mask, got 5"),
    ],
)  # fmt: skip
def test_bad_positions_are_named(positions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_positions(positions)
