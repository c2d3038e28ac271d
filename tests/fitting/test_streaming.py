from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch

from mfa_kernels import fit
from mfa_kernels.fitting import preparation, streaming
from mfa_kernels.fitting.streaming import Feed
from tests.data.test_source import refilled


def fed(*batches) -> Feed:
    streaming = Feed()
    for batch in batches:
        streaming.put(batch)
    return streaming


@pytest.mark.parametrize("split", [[3, 1, 10, 1], [15], [1] * 15, [0, 7, 0, 8, 0]])
@pytest.mark.parametrize("wanted", [4, 1, 15])
def test_rows_come_out_in_order(split, wanted):
    x = torch.arange(30.0).view(15, 2)
    streaming, out = Feed(), []
    for batch in x.split(split):
        streaming.put(batch)
        while streaming.holds(wanted):
            out.append(streaming.take(wanted))
    assert all(len(rows) == wanted for rows in out)
    streaming.put(None)
    assert streaming.holds(wanted)
    while len(rows := streaming.take(wanted)):
        out.append(rows)
    assert torch.equal(torch.cat(out), x)
    assert streaming.take(wanted).shape == (0, 2)


def test_the_rows_of_the_head_are_handed_over():
    x = torch.randn(10, 3)
    streaming = fed(x[:4], x[4:6].numpy(), (x[6:], "tokens"))
    assert streaming.holds(10)
    assert not streaming.holds(11)
    source = streaming.source()
    assert torch.equal(source.chunk(0, 10), x)
    assert not streaming.holds(1)
    streaming.put(x[:2])
    assert torch.equal(streaming.take(2), x[:2])


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2]
)
def test_dtypes(dtype, expected):
    x = torch.randn(6, 2, 3).to(dtype)
    streaming = fed(x, None)
    rows = streaming.take(12)
    assert rows.dtype == streaming.take(12).dtype == expected
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
        fed(None).source()


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
