from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mfa_kernels.data import source
from mfa_kernels.fitting import as_source
from tests.fitting.planted import Store

DATA = torch.arange(24.0).view(8, 3)
INDEX = torch.tensor([7, 0, 3, 3])


def memory_map(tmp_path):
    np.save(tmp_path / "x.npy", DATA.numpy())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def read_only(tmp_path):
    array = DATA.numpy().copy()
    array.flags.writeable = False
    return array


KINDS = {
    "tensor": lambda _: DATA,
    "needs gradient": lambda _: DATA.clone().requires_grad_(),
    "leading dimensions": lambda _: DATA.view(2, 4, 3),
    "strided": lambda _: DATA.t().contiguous().t(),
    "half": lambda _: DATA.half(),
    "bfloat16": lambda _: DATA.bfloat16(),
    "array": lambda _: DATA.numpy().copy(),
    "read-only array": read_only,
    "memory map": memory_map,
    "store": lambda _: Store(DATA),
    "half store": lambda _: Store(DATA.half()),
    "list of batches": lambda _: list(DATA.split(3)),
    "generator": lambda _: (batch for batch in DATA.split(3)),
    "arrays": lambda _: [batch.numpy() for batch in DATA.split(5)],
    "loader with tokens": lambda _: [(batch, torch.zeros(len(batch))) for batch in DATA.split(3)],
    "batches of sequences": lambda _: [DATA.view(2, 4, 3)],
    "data loader": lambda _: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(DATA), batch_size=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_every_kind_reads_the_same(kind, tmp_path):
    source = as_source(KINDS[kind](tmp_path))
    assert len(source) == 8
    assert source.n_features == 3
    assert source.dtype == torch.float32
    for rows, expected in ((source.rows(INDEX), DATA[INDEX]), (source.chunk(2, 7), DATA[2:7])):
        assert rows.dtype == torch.float32
        assert not rows.requires_grad
        assert torch.equal(rows, expected)
    assert source.rows(INDEX[:0]).shape == (0, 3)


@pytest.mark.parametrize("data", [DATA.double(), DATA.double().numpy(), Store(DATA.double()), [DATA, DATA.double()]])
def test_float64_stays(data):
    source = as_source(data)
    assert source.rows(INDEX).dtype == torch.float64


def test_a_source_passes_through():
    source = as_source(DATA)
    assert as_source(source) is source


def test_a_device_by_name():
    made = source.Source(8, 6, torch.float32, lambda index: DATA[index], device="cpu")
    assert made.device == torch.device("cpu")


def test_a_tensor_is_not_copied():
    assert as_source(DATA).chunk(0, 8).data_ptr() == DATA.data_ptr()


def test_batches_keep_their_dtype_in_memory():
    source = as_source([DATA.half(), DATA.half()])
    assert source.read_range(0, 2).dtype == torch.float16


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DATA.long(), TypeError, r"activations must have a floating-point dtype, got torch.int64"),
        (DATA.long().numpy(), TypeError, r"activations must have a floating-point dtype, got torch.int64"),
        (Store(DATA.long()), TypeError, r"activations.rows must have a floating-point dtype"),
        ([DATA.long()], TypeError, r"batch 0 must have a floating-point dtype"),
        (DATA[0], ValueError, r"shape \(N, D\) or \(\.\.\., D\), got \(3,\)"),
        (DATA[:0], ValueError, r"at least one row and one feature, got 0 x 3"),
        (DATA[:, :0], ValueError, r"at least one row and one feature, got 8 x 0"),
        (Store(DATA[:0]), ValueError, r"got 0 x 3"),
        ([], ValueError, r"iterable without batches"),
        ([DATA, DATA[:, :2]], ValueError, r"batch 1 has width 2, but batch 0 has width 3"),
        ([DATA[0]], ValueError, r"batch 0 must have shape .* got \(3,\)"),
        ([[1.0, 2.0]], TypeError, r"batch 0 must be a tensor or an array, got float"),
        ("folder", TypeError, r"activations must be a tensor, .* got str"),
        (3, TypeError, r"got int"),
    ],
)
def test_what_does_not_fit_is_named(data, error, message):
    with pytest.raises(error, match=message):
        as_source(data)


def test_a_store_that_returns_the_wrong_shape_is_named():
    store = Store(DATA)
    store.n_features = 4
    with pytest.raises(ValueError, match=r"activations.rows must return a tensor of shape \(1, 4\), got \(1, 3\)"):
        as_source(store)


def test_a_sample_too_large_for_a_device_stays_with_the_data(monkeypatch):
    data, device = as_source(torch.randn(9, 5)), torch.device("meta")
    monkeypatch.setattr(source, "room", lambda device: 8 * 5 * 4)
    assert source.home(data, 8, device) == device
    assert source.home(data, 9, device) == torch.device("cpu")


def refilled(batches):
    """Yields batches as loaders that save memory do: one tensor, overwritten for each batch."""
    held = torch.empty_like(batches[0])
    for batch in batches:
        yield held[: len(batch)].copy_(batch)


def test_a_tensor_that_is_refilled_for_each_batch():
    assert torch.equal(as_source(refilled(DATA.split(3))).rows(torch.arange(8)), DATA)


def test_a_list_of_documents_is_refused_and_a_list_of_rows_and_labels_taken():
    documents = [DATA[:3], DATA[3:]]
    with pytest.raises(ValueError, match="activations: batch 0 is a list of 2 activations"):
        as_source(iter([documents]))
    for batch in ([DATA], [DATA, torch.zeros(8)], [DATA, torch.zeros(8, 2).long()], tuple(documents)):
        assert len(as_source(iter([batch]))) == len(batch[0])


class Refilled(Store):
    """A store whose rows come in one buffer."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(data)
        self.buffer = torch.empty_like(data)

    def rows(self, index: Tensor) -> Tensor:
        out = self.buffer[: len(index)]
        torch.index_select(self.data, 0, index, out=out)
        return out


def test_rows_that_come_in_one_buffer_are_copied():
    x = torch.randn(50, 4)
    source = as_source(Refilled(x))
    first, second = source.rows(torch.arange(10)), source.rows(torch.arange(10, 20))
    assert torch.equal(first, x[:10])
    assert torch.equal(second, x[10:20])


@pytest.mark.parametrize("gap", [None, "text", 3])
def test_a_list_of_activations_with_a_gap_is_refused(gap):
    with pytest.raises(ValueError, match=r"batch 0 is a list of 3 activations"):
        as_source(iter([[torch.zeros(2, 3), gap, torch.zeros(4, 3)]]))


def test_arrays_of_any_strides_and_byte_order():
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    for given, expected in (
        (x[::-1, ::-1], x[::-1, ::-1]), (x.astype(">f4"), x), (x.T[::2], x.T[::2]), (x.astype(">f8")[::-3], x[::-3]),
    ):  # fmt: skip
        source = as_source(given)
        assert source.rows(torch.tensor([1, 0])).float().tolist() == expected[[1, 0]].tolist()
        assert source.chunk(1, 3).float().tolist() == expected[1:3].tolist()
        assert as_source(iter([given])).rows(torch.tensor([0])).float().tolist() == expected[:1].tolist()


def test_a_mask_is_refused():
    masked = np.ma.masked_invalid(np.array([[1.0, np.nan], [2.0, 3.0]]))
    for given in (masked, [masked], iter([(masked, 1)])):
        with pytest.raises(TypeError, match=r"activations(: batch 0)? must be an array without a mask"):
            as_source(given)
