"""Gates: each condition, what they combine to, one per batch row, and tokens that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.steering import LogDensity, Reconstruct, Responsibility, Toward, intervene
from tests.helpers.mixtures import mixture
from tests.steering.tiny import WIDTH, fitting_mixture, tokens

FIXED, MIXED = [Toward(2, 0.4)], [Toward(None, 0.4), Reconstruct(0.3)]


def conditions(mfa: MFA, x: Tensor) -> dict[str, tuple[Any, Tensor]]:
    """Gates at the medians of what they look at, and where they open, from the dense formulas."""
    r, density = mfa.responsibilities(x), mfa.log_prob(x)
    t0, t1, t = (float(v.median()) + 1e-4 for v in (r[..., 0], r[..., 1], density))
    first, second, inside = Responsibility(0, t0), Responsibility(1, t1), LogDensity(t)
    a, b, c = r[..., 0] > t0, r[..., 1] > t1, density > t
    return {
        "pair": ((0, t0), a),
        "region": (first, a),
        "complement": (~first, ~a),
        "inside": (inside, c),
        "out of distribution": (~inside, ~c),
        "both": (first & second, a & b),
        "either": (first | ~inside, a | ~c),
        "nested": (~(first & (second | inside)), ~(a & (b | c))),
    }


@pytest.mark.parametrize("entries", [FIXED, MIXED], ids=["fixed", "mixture"])
def test_each_opens_where_its_condition_holds(backend: str, entries: list) -> None:
    mfa, x = fitting_mixture(), tokens(60)
    everywhere = intervene(x, mfa, entries)
    for name, (gate, opens) in conditions(mfa, x).items():
        assert 3 < opens.sum() < 57, name
        out = intervene(x, mfa, entries, gate=gate)
        torch.testing.assert_close(out[opens], everywhere[opens], msg=name)
        assert torch.equal(out[~opens], x[~opens]), name


def test_one_per_row() -> None:
    mfa, x = fitting_mixture(), tokens(4, 9)
    found = conditions(mfa, x)
    names = ["region", "out of distribution", None, "region"]
    out = intervene(x, mfa, MIXED, gate=[found[name][0] if name else None for name in names])
    for row, name in enumerate(names):
        single = intervene(x[row : row + 1], mfa, MIXED, gate=found[name][0] if name else None)
        torch.testing.assert_close(out[row : row + 1], single)
    repeated = intervene(x[[0, 0, 1, 1]], mfa, FIXED, gate=[found["region"][0], found["out of distribution"][0]])
    torch.testing.assert_close(repeated[0], repeated[1])
    torch.testing.assert_close(repeated[2], intervene(x[1], mfa, FIXED, gate=found["out of distribution"][0]))


def test_a_token_that_is_not_finite_passes_no_gate() -> None:
    mfa, x = fitting_mixture(), tokens(3)
    x[1, 0] = float("nan")
    for gate in (LogDensity(1e9), ~LogDensity(1e9), ~Responsibility(0, 0.5), Responsibility(0, 0.0)):
        out = intervene(x, mfa, [Toward(1, 1.0)], gate=gate)
        assert torch.equal(out[1].isnan(), x[1].isnan())


def test_regions_beyond_the_slots_still_open_a_gate(backend: str) -> None:
    m = mixture(40, WIDTH, 3, spread=0.02, dtype=torch.float64)
    mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).requires_grad_(False)
    x = tokens(30).double()
    r = mfa.responsibilities(x)
    least = int(r.mean(0).argmin())
    threshold = float(r[:, least].median()) * 1.0001
    opens = (intervene(x, mfa, FIXED, gate=(least, threshold)) != x).any(-1)
    assert (r > r[:, [least]]).sum(1).min() > 16
    assert torch.equal(opens, r[:, least] > threshold)


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (Responsibility(6, 0.5), IndexError, r"gate component must be in \[0, 6\), got 6"),
        (~(LogDensity(0.0) & Responsibility(0, -0.1)), ValueError, r"gate threshold must be in \[0, 1\)"),
        ([None, (9, 0.5)], IndexError, r"gate\[1\] component"),
        ([], ValueError, "gate is an empty list"),
        ([None] * 3, ValueError, "gates for 3 batch rows do not fit a batch of 2"),
        ((0, 0.1, 0.2), TypeError, r"gate must be \(component, threshold\) or a gate"),
    ],
)
def test_bad_gates_are_named(gate: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        intervene(tokens(2), fitting_mixture(), FIXED, gate=gate)


def test_gates_combine_with_gates_alone() -> None:
    with pytest.raises(TypeError, match="combines with a gate"):
        Responsibility(0, 0.5) & (1, 0.5)


def test_a_threshold_is_a_number():
    for make in (LogDensity, lambda threshold: Responsibility(0, threshold)):
        with pytest.raises(ValueError, match="threshold must be finite, got nan"):
            make(float("nan"))
        with pytest.raises(TypeError, match="threshold must be a number, got 'high'"):
            make("high")
    with pytest.raises(TypeError, match=r"component must be an integer, got 1\.0"):
        Responsibility(1.0, 0.5)
