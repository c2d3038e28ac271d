"""Arguments are taken for what they are, or refused by name; what used to pass by accident does not."""

from __future__ import annotations

import numpy
import pytest
import torch

from mfa_kernels import MFA, fit, harvest, kmeans, steering
from mfa_kernels.common import checks
from mfa_kernels.evaluation import evaluate
from mfa_kernels.fitting import fit_sharded, start_from_clusters
from mfa_kernels.mixture import functional
from mfa_kernels.mixture.codes import Code
from tests.helpers.mixtures import mixture, tokens


class Strange:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("value", [3, numpy.int64(3), numpy.uint8(3), torch.tensor(3)])
def test_integers(value):
    assert checks.check_integer(value, "n", 1, 3) == 3
    assert type(checks.check_integer(value, "n")) is int


@pytest.mark.parametrize(
    "value",
    [
        True,
        numpy.True_,
        torch.tensor(True),
        numpy.array(True),
        "3",
        None,
        numpy.array([3]),
        torch.zeros(2),
        3.5,
        Strange(),
    ],
)
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match="n must be an integer, got ") as error:
        checks.check_integer(value, "n")
    assert "give" not in str(error.value)


@pytest.mark.parametrize("value", [3.0, numpy.float32(3), torch.tensor(3.0)])
def test_a_float_that_is_a_whole_number_is_refused_with_what_to_give(value):
    with pytest.raises(TypeError, match=r"^n must be an integer, got .+: give 3$"):
        checks.check_integer(value, "n")


@pytest.mark.parametrize("value", [True, numpy.True_])
def test_flags(value):
    assert checks.check_flag(value, "f") is True
    with pytest.raises(TypeError, match="t must be a number, got "):
        checks.check_number(value, "t")


@pytest.mark.parametrize("value", [1, 0.0, "yes", None, numpy.int64(1), torch.tensor(True)])
def test_what_is_no_flag(value):
    with pytest.raises(TypeError, match="f must be True or False, got "):
        checks.check_flag(value, "f")


@pytest.mark.parametrize("value", [
    [3, 1], (3, 1), range(3, 0, -2), numpy.array([3, 1], dtype="u1"), torch.tensor([3, 1]), iter([3, 1]),
    [numpy.int64(3), torch.tensor(1)], {3: "a", 1: "b"},
])  # fmt: skip
def test_components(value):
    found = checks.check_components(value, 4)
    assert found == [3, 1]
    assert all(type(number) is int for number in found)


@pytest.mark.parametrize(("value", "error"), [
    (3, TypeError), ("31", TypeError), ([3.0, 1.0], TypeError), ([True, False], TypeError), (None, TypeError),
    ([[3, 1]], ValueError), (torch.zeros(2, dtype=torch.long, device="meta"), ValueError), ([4], IndexError),
    ([-1], IndexError),
])  # fmt: skip
def test_what_are_no_components(value, error):
    with pytest.raises(error, match="components must "):
        checks.check_components(value, 4)


def test_numpys_scalars_are_numbers_everywhere(tmp_path):
    """They reach files as JSON, which knows Python's own only."""
    x = tokens(mixture(3, 6, 2), 90)
    one, two, seed = numpy.int64(1), numpy.int32(2), numpy.uint8(7)
    options = {"method": "em", "epochs": one, "batch_size": numpy.int16(30), "held_out": numpy.float32(0.25),
               "eval_every": one, "patience": two, "seed": seed, "lr": numpy.float64(0.01), "progress": numpy.False_,
               "checkpoint_seconds": numpy.float32(0)}  # fmt: skip
    mfa = fit(x, two, one, checkpoint=tmp_path / "fit", log=tmp_path / "log.jsonl", **options)
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in options.items()}
    again = fit(x, 2, 1, resume=tmp_path / "fit", **plain)
    assert torch.equal(again.means, mfa.means)
    mfa.save_pretrained(tmp_path / "mfa")
    assert torch.equal(MFA.from_pretrained(tmp_path / "mfa").means, mfa.means)
    clusters = kmeans(x, two, iterations=two, seed=seed, sample=numpy.int64(50), tol=numpy.float32(0), progress=False)
    assert torch.equal(
        clusters.centroids, kmeans(x, 2, iterations=2, seed=7, sample=50, tol=0, progress=False).centroids
    )
    spread = fit_sharded(x, two, one, epochs=one, seed=seed, checkpoint=tmp_path / "sharded", progress=False)
    assert torch.equal(spread.local.means, fit_sharded(x, 2, 1, epochs=1, seed=7, progress=False).local.means)
    m = MFA(two, numpy.int64(6), one, noise_floor=numpy.float32(0.5))
    m.save_pretrained(tmp_path / "floor")
    assert MFA.from_pretrained(tmp_path / "floor").noise_floor == 0.5
    assert m.sample(two).shape == (2, 6)
    assert m.posterior(x, one)[1].shape == (1, 1)


def test_integers_out_of_range():
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        checks.check_integer(0, "n", 1)
    with pytest.raises(ValueError, match="n must be an integer <= 5, got 6"):
        checks.check_integer(6, "n", 1, 5)
    with pytest.raises(IndexError, match=r"k must be in \[0, 4\), got -1"):
        checks.check_component(-1, 4, "k")


@pytest.mark.parametrize("value", [0.5, numpy.float32(0.5), torch.tensor(0.5)])
def test_numbers(value):
    assert checks.check_number(value, "t", 0, 1) == 0.5


@pytest.mark.parametrize(("value", "error"), [
    ("0.5", TypeError), (None, TypeError), (1j, TypeError), (torch.ones(2), TypeError), (10**400, ValueError),
    (float("nan"), ValueError), (float("inf"), ValueError), (2.0, ValueError),
])  # fmt: skip
def test_what_is_no_number(value, error):
    with pytest.raises(error, match="t must be "):
        checks.check_number(value, "t", 0, 1)


@pytest.mark.parametrize("value", ["", "a\0b", b"a", 1, None])
def test_what_is_no_path(value):
    with pytest.raises(TypeError, match="folder must be a path"):
        checks.check_path(value, "folder")


def test_a_device_that_is_not_here_is_named():
    with pytest.raises(ValueError, match="device must be a device that is here, got 'nowhere'"):
        MFA(3, 4, 1, device="nowhere")


@pytest.fixture
def parameters():
    m = mixture(5, 8, 2)
    return {
        "means": m.means,
        "loadings": m.loadings,
        "noise_variance": m.noise_variance,
        "weights": m.log_weights.exp(),
    }


@pytest.fixture
def mfa(parameters):
    return MFA.from_parameters(**parameters)


@pytest.mark.parametrize("name", ["means", "loadings", "noise_variance", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_are_finite(parameters, name, value):
    changed = parameters[name].clone()
    changed.view(-1)[0] = value
    with pytest.raises(ValueError, match=f"{name} must be "):
        MFA.from_parameters(**{**parameters, name: changed})


def test_weights_whose_sum_overflows(parameters):
    with pytest.raises(ValueError, match="weights must be non-negative with a positive, finite sum"):
        MFA.from_parameters(**{**parameters, "weights": torch.full((5,), 3e38)})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), torch.zeros(8), torch.full((8,), torch.nan)])
def test_the_noise_beside_centroids_is_positive(parameters, value):
    with pytest.raises(ValueError, match="noise_variance must be "):
        MFA.from_centroids(parameters["means"], 2, noise_variance=value)


@pytest.mark.parametrize(("noise", "shape"), [("shared", ()), ("shared", (8,)), ("per_component", (8,)),
                                              ("per_component", (5, 8)), ("shared", (1,))])  # fmt: skip
def test_the_noise_beside_centroids_is_what_is_given(parameters, noise, shape):
    made = MFA.from_centroids(parameters["means"], 2, noise, noise_variance=torch.full(shape, 0.3))
    torch.testing.assert_close(made.noise_variance, torch.full_like(made.log_noise, 0.3))
    with pytest.raises(ValueError, match="noise_variance must be a number or of shape"):
        MFA.from_centroids(parameters["means"], 2, noise, noise_variance=torch.ones(5, 1))


def test_a_center_has_one_dimension(parameters):
    m = mixture(5, 8, 2)
    with pytest.raises(ValueError, match="center must have shape"):
        functional.log_prob(tokens(m, 3), *m, center=m.means)


def test_an_index_of_any_integer_dtype_is_one_and_no_other_is(mfa):
    x, k = mfa.sample(5), torch.tensor([0, 4, 2, 2, 1])
    wanted = mfa.posterior(x, k)
    for dtype in (torch.uint8, torch.int16, torch.int32):  # uint8 was taken for a mask
        for a, b in zip(mfa.posterior(x, k.to(dtype)), wanted):
            assert torch.equal(a, b)
    for bad in (1.9, k.float(), k > 1, "1"):
        with pytest.raises(TypeError, match="component must "):
            mfa.posterior(x, bad)
    with pytest.raises(ValueError, match=r"component must broadcast to \(5,\)"):
        mfa.posterior(x, k[:4])


def test_a_code_fits_the_mixture_or_is_refused(mfa):
    code = mfa.encode(mfa.sample(6), top_k=3)
    parts = {name: getattr(code, name) for name in ("components", "responsibilities", "latents", "dropped")}
    for name, bad, error in (
        ("responsibilities", code.responsibilities.T, ValueError), ("latents", code.latents[..., :1], ValueError),
        ("components", code.components.float(), TypeError), ("components", code.components + 2**32, IndexError),
    ):  # fmt: skip
        with pytest.raises(error, match=name):
            mfa.decode(Code(**{**parts, name: bad}))
    with pytest.raises(TypeError, match="code must be a Code"):
        mfa.decode(code.components)


def test_draws_that_fit_into_no_memory(mfa):
    with pytest.raises(ValueError, match="n must be a number of draws that fit into memory, got "):
        mfa.sample(1 << 44)


def test_a_mapping_is_no_texts():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="texts must be .* got a mapping: give one of its values"):
        harvest(model, None, {"train": ["a text"]}, 0)


GENERATORS = {
    "from_centroids": lambda mfa, g: MFA.from_centroids(mfa.means.detach(), 2, generator=g),
    "sample": lambda mfa, g: mfa.sample(2, g),
    "reset_parameters": lambda mfa, g: MFA(2, 3, 1).reset_parameters(g),
    "prior_latents": lambda mfa, g: steering.prior_latents(mfa, generator=g),
}


@pytest.mark.parametrize("call", GENERATORS)
def test_a_seed_is_no_generator(mfa, call):
    GENERATORS[call](mfa, torch.Generator())
    GENERATORS[call](mfa, None)
    with pytest.raises(TypeError, match=r"generator must be .*, got 3: torch.Generator\(\).manual_seed\(3\) makes one"):
        GENERATORS[call](mfa, 3)


@pytest.mark.parametrize("value", [print, "print", {print: 1}, 3, None])
@pytest.mark.parametrize("fitted", [fit, fit_sharded])
def test_callbacks_are_several(fitted, value):
    with pytest.raises(TypeError, match="callbacks must be a sequence of callables, got "):
        fitted(torch.randn(20, 3), 2, 1, callbacks=value)
    with pytest.raises(TypeError, match=r"callbacks\[1\] must be callable, got 3"):
        fitted(torch.randn(20, 3), 2, 1, callbacks=[print, 3])


def test_what_kmeans_returned_is_taken_for_centroids(mfa):
    x = mfa.sample(60, torch.Generator().manual_seed(0))
    found = kmeans(x, 5, progress=False)
    for take in (
        lambda c: MFA.from_centroids(c, 2, generator=torch.Generator().manual_seed(0)).means,
        lambda c: torch.tensor(evaluate(mfa, x, c, progress=False).kmeans_mse),
        lambda c: kmeans(x, 5, init=c, progress=False).centroids,
        lambda c: start_from_clusters(x, c, 1, progress=False).means,
        lambda c: fit(x, 5, 1, clusters=c, epochs=0, progress=False).means,
    ):
        assert torch.equal(take(found), take(found.centroids))
    with pytest.raises(TypeError, match=r"centroids must be a KMeansResult or a tensor \(K, D\), got MFA"):
        MFA.from_centroids(mfa, 2)


def test_keywords_are_named_by_the_method_that_was_called(mfa, tmp_path):
    for method, place in (
        (MFA.from_pretrained, tmp_path), (mfa.save_pretrained, tmp_path), (mfa.push_to_hub, "a/b"),
        (MFA.from_reference_checkpoint, tmp_path), (mfa.to_reference_checkpoint, tmp_path / "a"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"MFA\.{method.__name__}\(\) takes the keywords .*, got 'devise'"):
            method(place, devise="cpu")
    assert not list(tmp_path.iterdir())


def test_places_that_are_none(mfa, tmp_path):
    mfa.save_pretrained(tmp_path / "mfa")
    mfa.to_reference_checkpoint(tmp_path / "paper.pt")
    for load in (
        lambda **given: MFA.from_pretrained(tmp_path / "mfa", **given),
        lambda **given: MFA.from_reference_checkpoint(tmp_path / "paper.pt", **given),
    ):
        with pytest.raises(ValueError, match="device must be a device that is here, got 'nowhere'"):
            load(device="nowhere")
        with pytest.raises(TypeError, match="dtype must be a floating-point torch.dtype, got 'float32'"):
            load(dtype="float32")
        assert load(device="cpu", dtype=torch.float64).means.dtype == torch.float64
    with pytest.raises(NotADirectoryError, match="folder must be a folder, .*paper.pt is a file"):
        mfa.save_pretrained(tmp_path / "paper.pt")


def test_a_path_is_no_activations(tmp_path):
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(TypeError, match=r"activations must be .*: ActivationStore\('.*'\) opens a store"):
            fit(path, 2, 1)


def test_several_layers_are_for_fit_many():
    batch = {1: torch.randn(20, 3), 2: torch.randn(20, 3)}
    for given in ([batch], iter([batch])):
        with pytest.raises(TypeError, match=r"batch 0.* must be a tensor or an array, got dict: fit_many fits"):
            fit(given, 2, 1, progress=False)


def test_which_of_two_shapes_is_wrong_is_not_guessed(parameters):
    means = parameters["means"].T
    with pytest.raises(ValueError, match=r"one of them is transposed, got \(8, 5\) and \(5, 8, 2\)"):
        MFA.from_parameters(**{**parameters, "means": means})


def test_a_flag_of_numpy_resumes_nothing():
    fit(torch.randn(20, 3), 2, 1, epochs=0, resume=numpy.bool_(False), progress=False)
    with pytest.raises(ValueError, match="resume = True needs a checkpoint folder"):
        fit(torch.randn(20, 3), 2, 1, epochs=0, resume=numpy.bool_(True), progress=False)


def test_an_array_of_no_dimension_is_no_list():
    for value in (numpy.array(3), torch.tensor(3)):
        with pytest.raises(ValueError, match=r"components must be of shape \(n,\), got \(\)"):
            checks.check_components(value, 5)
        with pytest.raises(TypeError, match="batches must be a stream, got"):
            checks.check_iterable(value, "batches", "a stream")
    for value in ("text", b"bytes", {"a": 1}, 3, None):
        with pytest.raises(TypeError, match="batches must be a stream, got"):
            checks.check_iterable(value, "batches", "a stream")
    assert checks.check_iterable([], "batches", "a stream") == []
