from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch

from mfa_kernels import fit
from mfa_kernels.fitting import preparation, streaming
from mfa_kernels.fitting.stream_fit import StreamFit
from mfa_kernels.fitting.streaming import RowQueue
from tests.data.test_source import refilled


def fed(*batches) -> RowQueue:
    queue = RowQueue()
    for batch in batches:
        queue.put(batch)
    return queue


@pytest.mark.parametrize("split", [[3, 1, 10, 1], [15], [1] * 15, [0, 7, 0, 8, 0]])
@pytest.mark.parametrize("wanted", [4, 1, 15])
def test_rows_come_out_in_order(split, wanted):
    x = torch.arange(30.0).view(15, 2)
    queue, out = RowQueue(), []
    for batch in x.split(split):
        queue.put(batch)
        while queue.holds(wanted):
            out.append(queue.take(wanted))
    assert all(len(rows) == wanted for rows in out)
    queue.ended = True
    assert queue.holds(wanted)
    while len(rows := queue.take(wanted)):
        out.append(rows)
    assert torch.equal(torch.cat(out), x)
    assert queue.take(wanted).shape == (0, 2)


def test_the_rows_of_the_head_are_handed_over():
    x = torch.randn(10, 3)
    queue = fed(x[:4], x[4:6].numpy(), (x[6:], "tokens"))
    assert queue.holds(10)
    assert not queue.holds(11)
    source = queue.source()
    assert torch.equal(source.chunk(0, 10), x)
    assert not queue.holds(1)
    queue.put(x[:2])
    assert torch.equal(queue.take(2), x[:2])


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_dtypes(dtype, expected):
    x = torch.randn(6, 2, 3).to(dtype)
    queue = fed(x)
    rows = queue.take(12)
    assert rows.dtype == queue.take(12).dtype == expected
    assert torch.equal(rows, x.view(12, 3).to(expected))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([torch.zeros(4, 3), torch.zeros(4, 2)], ValueError, "batch 1 has width 2, but batch 0 has width 3"),
        ([{"a": torch.zeros(4, 3)}], TypeError, "activations: batch 0 must be a tensor or an array, got dict"),
        ([torch.zeros(4, 3), torch.zeros(4)], ValueError, r"activations: batch 1 must have shape"),
        ([torch.zeros(4, 3).long()], TypeError, "activations: batch 0 must have a floating-point dtype"),
    ],
)
def test_bad_batches_are_named(batches, error, message):
    with pytest.raises(error, match=message):
        fed(*batches)


def test_nothing_to_begin_with():
    with pytest.raises(ValueError, match="activations is an iterable without batches"):
        fed().source()


def test_a_fit_looks_like_a_function():
    signature = inspect.signature(fit)
    assert list(signature.parameters)[:3] == ["activations", "n_components", "rank"]
    assert signature.return_annotation == fit.__annotations__["return"] == "MFA"
    with pytest.raises(TypeError, match="n_components must be an integer, or be left to a start"):
        fit(torch.zeros(3, 2))
    x = torch.randn(50, 3)
    assert fit(n_components=2, activations=x, rank=1, epochs=0, progress=False).means.shape == (2, 3)


def fitted(batches):
    return fit(batches, 2, 1, method="online", held_out=0.1, patience=None, progress=False)


def test_a_stream_may_refill_one_tensor():
    rows = torch.randn(900, 4, generator=torch.Generator().manual_seed(0)) + torch.arange(900).unsqueeze(1) / 300
    found, wanted = fitted(refilled(rows.split(100))), fitted(iter(rows.split(100)))
    for a, b in zip(found.parameters(), wanted.parameters()):
        assert torch.equal(a, b)


def test_none_in_a_stream_does_not_end_it():
    batches = list(torch.randn(600, 4).split(100))
    with pytest.raises(TypeError, match="activations: batch 3 must be a tensor or an array, got None"):
        fitted(iter([*batches[:3], None, *batches[3:]]))


def test_an_endless_stream_of_nothing_ends(monkeypatch):
    monkeypatch.setattr(streaming, "_MOST_EMPTY", 50)
    with pytest.raises(ValueError, match="activations: 50 batches in a row hold no row, up to batch 50"):
        fit(itertools.chain([torch.zeros(3, 4)], itertools.repeat(torch.zeros(0, 4))), 2, 1, progress=False)


@pytest.mark.parametrize("held_out", [0.0, 0.05])
@pytest.mark.parametrize("more", [0, 1])
def test_a_stream_that_ends_with_its_head(held_out, more, monkeypatch):
    """Nothing is left to compare the start on, or a single row."""
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 400)
    monkeypatch.setattr(preparation, "START_ROWS_PER_COMPONENT", 1)
    x = torch.randn(math.ceil(400 / (1 - held_out)) + more, 5, generator=torch.Generator().manual_seed(0))
    mfa = fit(iter(x.split(200)), 3, 1, held_out=held_out, progress=False)
    assert mfa.log_prob(x).isfinite().all()


def test_a_fit_is_fed_until_it_is_over(monkeypatch):
    monkeypatch.setattr(preparation, "LEAST_START_ROWS", 400)
    given = inspect.signature(fit).bind(None, 2, 1, eval_every=1, patience=1, progress=False)
    given.apply_defaults()
    rows = torch.randn(9000, 4, generator=torch.Generator().manual_seed(0))
    fitting, used = StreamFit(given.arguments), 0
    for batch in rows.split(500):
        fitting.feed(batch)
        used += 1
        if fitting.over:
            break
    mfa = fitting.finish()
    assert fitting.over
    assert used < 18
    expected = fit(iter(rows.split(500)), 2, 1, eval_every=1, patience=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(mfa.parameters(), expected.parameters()))


def test_ctrl_c_before_the_training_is_passed_on():
    given = inspect.signature(fit).bind(None, 2, 1, progress=False)
    given.apply_defaults()
    fitting = StreamFit(given.arguments)
    fitting.feed(torch.randn(50, 4))
    with pytest.raises(KeyboardInterrupt):
        fitting.finish(interrupted=True)
