"""Array-likes of every kind are taken by everything public, and give what tensors give, to the bit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, fit, kmeans, steering
from mfa_kernels.common.arrays import as_tensor
from mfa_kernels.data import ActivationStore, ActivationStoreWriter, reservoir
from mfa_kernels.evaluation.codes import write_codes
from mfa_kernels.evaluation.reconstruction import evaluate
from mfa_kernels.fitting import start_from_clusters
from mfa_kernels.interpret import neighbors
from mfa_kernels.mixture import functional
from tests.helpers.mixtures import mixture, tokens


class Frame:
    """A stand-in for pandas' frames: their items are the names of columns, and NumPy can read them."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.array, dtype)

    def __iter__(self) -> Any:
        return iter("abc")


class OnAnotherLibrary:
    """An array that NumPy may not read, as one on a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.tensor = torch.from_numpy(array)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed")

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array: np.ndarray) -> np.ndarray:
    """A column of records, between whose numbers another byte stands."""
    records = np.zeros(array.shape, dtype=[("value", array.dtype), ("flag", "u1")])
    records["value"] = array
    return records["value"]


def mapped(array: np.ndarray, folder: Any) -> np.ndarray:
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def pandas(array: np.ndarray) -> Any:
    import pandas

    return pandas.Series(array) if array.ndim == 1 else pandas.DataFrame(array) if array.ndim == 2 else array


KINDS: dict[str, Callable[[np.ndarray, Any], Any]] = {
    "array": lambda a, folder: a,
    "backwards": lambda a, folder: a[::-1].copy()[::-1],
    "by column": lambda a, folder: np.asfortranarray(a),
    "other bytes": lambda a, folder: a.astype(a.dtype.newbyteorder(">")),
    "read-only": lambda a, folder: read_only(a),
    "unaligned": lambda a, folder: unaligned(a),
    "memory map": mapped,
    "frame": lambda a, folder: Frame(a),
    "another library": lambda a, folder: OnAnotherLibrary(a),
    "list": lambda a, folder: a.tolist(),
}
if importlib.util.find_spec("pandas"):
    KINDS["pandas"] = lambda a, folder: pandas(a)

M = mixture(5, 8, 2, spread=0.5)
X = tokens(M, 60)
MFA_ = MFA.from_parameters(M.means, M.loadings, M.noise_variance, M.log_weights.exp())
CODE = torch.no_grad()(MFA_.encode)(X[:6])
HIDDEN = X[:12].reshape(3, 4, 8)
QUIET: dict[str, Any] = {"progress": False}


def screened(x: Any) -> Tensor:
    MFA_.screen(x)
    try:
        return MFA_.log_prob(X)
    finally:
        MFA_.refresh()
        MFA_._screen = None


def decoded(of: Callable[[Tensor], Any]) -> Tensor:
    return MFA_.decode(type(CODE)(**{name: of(value) for name, value in vars(CODE).items()}))


def stored(folder: Any, of: Callable[[Tensor], Any]) -> Tensor:
    ids, places = torch.arange(70), torch.arange(3, 63)
    with ActivationStoreWriter(folder / "store", 8, overwrite=True) as writer:
        writer.add_document(of(ids), of(places), of(X))
    return ActivationStore(folder / "store").rows(of(torch.tensor([5, 3, 59])))


def codes(folder: Any, x: Any) -> Any:
    from safetensors.torch import load_file

    write_codes(MFA_, [x], folder / "codes.safetensors", **QUIET)
    return load_file(folder / "codes.safetensors")


def moved(of: Callable[[Tensor], Any], *interventions: Any) -> Tensor:
    return steering.intervene(of(HIDDEN), MFA_, interventions)


CALLS: dict[str, Callable[[Callable[[Tensor], Any], Any], Any]] = {
    "forward": lambda of, _: MFA_(of(X)),
    "log_prob": lambda of, _: MFA_.log_prob(of(HIDDEN)),
    "certificate": lambda of, _: MFA_.log_prob(of(HIDDEN), return_error_bound=True),
    "component_log_prob": lambda of, _: MFA_.component_log_prob(of(HIDDEN)),
    "responsibilities": lambda of, _: MFA_.responsibilities(of(X)),
    "assign": lambda of, _: MFA_.assign(of(HIDDEN)),
    "encode": lambda of, _: vars(MFA_.encode(of(HIDDEN))),
    "decode": lambda of, _: decoded(of),
    "reconstruct": lambda of, _: MFA_.reconstruct(of(HIDDEN)),
    "posterior": lambda of, _: MFA_.posterior(of(HIDDEN), of(torch.tensor([0, 4, 2, 1]))),
    "screen": lambda of, _: screened(of(X)),
    "functional": lambda of, _: functional.log_prob(of(X), *map(of, M), center=of(M.means[0])),
    "from_parameters": lambda of, _: MFA.from_parameters(
        of(M.means), of(M.loadings), of(M.noise_variance), of(M.log_weights.exp())
    ).state_dict(),
    "from_centroids": lambda of, _: MFA.from_centroids(
        of(M.means), 2, noise_variance=of(M.noise_variance), generator=torch.Generator().manual_seed(0)
    ).state_dict(),
    "intervene": lambda of, _: moved(
        of, steering.Toward(of(torch.tensor([0, 4, 2])), of(torch.tensor([0.1, 0.2, 0.3]))),
        steering.Offset(1, of(torch.ones(2))), steering.Add(of(torch.ones(3, 8))),
    ),
    "Function": lambda of, _: steering.SteeringFunction(MFA_, steering.Toward(1, 0.5))(of(HIDDEN)),
    "neighbors": lambda of, _: neighbors(MFA_, 2, components=of(torch.tensor([3, 1])), **QUIET),
    "centroids": lambda of, _: start_from_clusters(X, of(M.means), 2, **QUIET).state_dict(),
    "initial centroids": lambda of, _: kmeans(X, 5, init=of(M.means), **QUIET).centroids,
    "weights": lambda of, _: kmeans(X, 5, weights=of(torch.arange(60.0)), **QUIET).centroids,
    "store": lambda of, folder: stored(folder, of),
    "quantiles": lambda of, _: steering.latent_quantiles(MFA_, X, int(MFA_.assign(X)[0]), of(torch.tensor([0.0, 0.5]))),
}  # fmt: skip
CALLS_OF_A_SOURCE: dict[str, Callable[[Callable[[Tensor], Any], Any], Any]] = {  # where a list is one of batches
    "kmeans": lambda of, _: kmeans(of(X), 3, **QUIET).centroids,
    "fit": lambda of, _: fit(of(X), 3, 1, epochs=2, **QUIET).state_dict(),
    "fit, batches": lambda of, _: fit((of(x) for x in X.split(20)), 3, 1, epochs=2, **QUIET).state_dict(),
    "fit, tuples": lambda of, _: fit([(of(x), 0) for x in X.split(20)], 3, 1, epochs=2, **QUIET).state_dict(),
    "evaluate": lambda of, _: asdict(replace(evaluate(MFA_, of(X), of(M.means), **QUIET), tokens_per_second=0)),
    "latents": lambda of, _: steering.latent_quantiles(MFA_, of(X), int(MFA_.assign(X)[0]), 0.5),
    "reservoir": lambda of, _: reservoir([of(x) for x in X.split(20)], 30),
    "write_codes": lambda of, folder: codes(folder, of(X)),
}


def check_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            check_same(found[name], value)
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            check_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*CALLS, *CALLS_OF_A_SOURCE])
def test_an_array_of_any_kind_gives_what_a_tensor_gives(name, kind, tmp_path):
    if kind == "list" and name in CALLS_OF_A_SOURCE:
        pytest.skip("not applicable: a list is one of batches")
    call = {**CALLS, **CALLS_OF_A_SOURCE}[name]
    expected = call(lambda tensor: tensor, tmp_path)
    given: list[tuple[Any, np.ndarray]] = []

    def of(tensor: Tensor) -> Any:
        value = KINDS[kind](tensor.numpy().copy(), tmp_path)
        given.append((value, tensor.numpy().copy()))
        return value

    check_same(call(of, tmp_path), expected)
    if kind not in ("another library", "memory map"):
        assert all(np.array_equal(np.asarray(value), before) for value, before in given)  # nothing is written to


@pytest.mark.parametrize("name", [*CALLS, *CALLS_OF_A_SOURCE])
def test_a_mask_is_not_overlooked(name, tmp_path):
    call = {**CALLS, **CALLS_OF_A_SOURCE}[name]

    def masked(tensor: Tensor) -> Any:
        return np.ma.masked_array(tensor.numpy().copy(), np.arange(tensor.numel()).reshape(tensor.shape) == 1)

    with pytest.raises(TypeError, match=r"[\w.\[\]]+ must be an array without a mask"):
        call(masked, tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "v must be a tensor or an array, got str"),
        (np.array(["a", "b"]), "v must hold numbers, got a ndarray of dtype <U1"),
        (
            np.array([1.0, None]),
            "v must hold numbers, got a ndarray of dtype object, as text and missing values make it",
        ),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), r"v must hold numbers, got a ndarray of dtype datetime64"),
        (np.zeros(2, dtype=[("a", "f4")]), "v must hold numbers"),
        ([[1.0], [1.0, 2.0]], r"v must be a tensor or an array, got \[\[1.0\], \[1.0, 2.0\]\]"),
        ({1: 2}, "v must be a tensor or an array, got dict"),
        (np.float32(1.5), "v must be a tensor or an array, got float32"),
        (np.ndarray, "v must be a tensor or an array, got type"),
    ],
)
def test_what_holds_no_numbers_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        as_tensor(value, "v")


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize <= 8, reason="no such numbers here")
def test_numbers_that_torch_does_not_know_are_named():
    with pytest.raises(TypeError, match="v must have at most 64 bits a number"):
        as_tensor(np.zeros(3, dtype=np.longdouble), "v")


def test_a_list_is_what_torch_makes_of_it():
    assert as_tensor([1.0, 2.0], "v").dtype == torch.float32
    assert as_tensor([1, 2], "v").dtype == torch.int64
    assert as_tensor([np.float64(1)], "v").dtype == as_tensor([torch.tensor(1.0).double()], "v").dtype == torch.float64
    z = steering.intervene(HIDDEN, MFA_, steering.Offset(1, [1, 0]))
    assert torch.equal(z, steering.intervene(HIDDEN, MFA_, steering.Offset(1, torch.tensor([1.0, 0.0]))))
    with pytest.raises(TypeError, match="x must have a floating-point dtype, got torch.int64"):
        MFA_.log_prob(np.ones((3, 8), dtype=np.int64))


def test_memory_is_shared_where_it_can_be():
    array = np.zeros((3, 4), dtype=np.float32)
    as_tensor(array, "v")[1, 2] = 5
    assert array[1, 2] == 5
