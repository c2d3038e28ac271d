"""The same bits in every global mode of PyTorch, which is left as it was found."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA, fit, fit_many, harvest, kmeans, steer, stream
from mfa_kernels.common.modes import ORDINARY, Modes
from mfa_kernels.data import ActivationStore, ActivationStoreWriter, reservoir
from mfa_kernels.evaluation.reconstruction import evaluate
from mfa_kernels.fitting import fit_sharded, start_from_clusters
from mfa_kernels.ops.common import cpp
from mfa_kernels.steering import Add, Reconstruct, Remove, Toward, intervene
from tests.fitting.planted import draw, planted
from tests.helpers.language import make_model, make_tokenizer, words
from tests.steering.tiny import causal_lm, fitting_mixture

pytestmark = pytest.mark.usefixtures("one_thread")

COMPONENTS, FEATURES, RANK, ROWS = 4, 8, 2, 600


@contextmanager
def _set(set_: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(before)


def _precision() -> AbstractContextManager[None]:
    return _set(torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision())


@contextmanager
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(12345)
        yield


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad_off": lambda: torch.set_grad_enabled(False),
    "autocast_bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", torch.float16),
    "float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default_device": lambda: _set(torch.set_default_device, "meta", None),  # as a GPU, but nothing can be read there
    "in_device": lambda: torch.device("meta"),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "products": _precision,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "seed": _seed,
}


@contextmanager
def _all_of(*names: str) -> Iterator[None]:
    if not names:
        yield
        return
    with MODES[names[0]](), _all_of(*names[1:]):
        yield


TOGETHER = ("bfloat16", "in_device", "deterministic", "autocast_bfloat16", "products", "inference_mode")


# What the work below is done on: made at its first, ordinary call, and found by the later ones.


@cache
def rows() -> Tensor:
    return draw(planted(COMPONENTS, FEATURES, RANK), ROWS)


@cache
def mixed() -> MFA:
    """Frozen, and its tokens are not all of one component."""
    return planted(COMPONENTS, FEATURES, RANK, spread=1.0).requires_grad_(False)


def fresh(noise: str = "shared") -> MFA:
    m = mixed()
    variance = m.noise_variance if noise == "shared" else m.noise_variance.expand(COMPONENTS, FEATURES)
    return MFA.from_parameters(m.means, m.loadings, variance, m.log_weights.exp())


def fitted(**arguments: Any) -> dict[str, Any]:
    """The mixture's state, and what is said of it but for times."""
    options: dict[str, Any] = {"epochs": 2, "batch_size": 128, "progress": False}
    mfa = fit(arguments.pop("activations", rows()), COMPONENTS, RANK, **{**options, **arguments})
    return result(mfa)


def result(mfa: Any) -> dict[str, Any]:
    """A result of a fit; it can be trained on, under whatever mode it was made."""
    assert all(p.requires_grad and p.is_leaf and not p.is_inference() for p in mfa.parameters())
    return {**mfa.state_dict(), "history": [record["held_out_nll"] for record in mfa.fit_report.history]}


def batches() -> Iterator[Tensor]:
    yield from rows().split(100)


def many() -> dict[str, Any]:
    own = {"n_components": COMPONENTS, "rank": RANK, "progress": False}
    found = fit_many(batches(), {"a": own, "b": {**own, "noise": "per_component"}})
    return {name: result(mfa) for name, mfa in found.items()}


def clusters() -> Any:
    return vars(kmeans(rows(), COMPONENTS, progress=False))


@cache
def centroids() -> Tensor:
    return rows()[:: ROWS // COMPONENTS][:COMPONENTS].clone()


def from_clusters(noise: str, init: str) -> Any:
    return start_from_clusters(rows(), centroids(), RANK, noise, init=init, progress=False).state_dict()


def from_centroids() -> Any:
    generator = torch.Generator().manual_seed(3)
    return MFA.from_centroids(centroids(), RANK, noise_variance=0.5, generator=generator).state_dict()


def evaluated() -> dict[str, float]:
    found = evaluate(mixed(), rows(), centroids(), progress=False).as_dict()
    del found["tokens_per_second"]
    return found


def gradients(**options: Any) -> dict[str, Tensor]:
    """Returns the gradients of a training step."""
    mfa = fresh(**options)
    with torch.inference_mode(False), torch.enable_grad():
        loss = mfa(rows())
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in mfa.named_parameters() if p.grad is not None}}


def explained() -> Any:
    m, x = mixed(), rows()[:64]
    code = m.encode(x, top_k=None)
    every = torch.arange(64, device="cpu") % COMPONENTS
    return {
        "log_prob": m.log_prob(x),
        "bounded": m.log_prob(x, return_error_bound=True),
        "of_components": m.component_log_prob(x),
        "responsibilities": m.responsibilities(x),
        "owner": m.assign(x),
        "code": vars(code),
        "top": vars(m.encode(x, top_k=2)),
        "hard": vars(code.hard()),
        "dense": code.to_dense(m),
        "decoded": m.decode(code),
        "reconstructed": m.reconstruct(x),
        "posterior": m.posterior(x, 1),
        "posteriors": m.posterior(x, every),
        "sample": m.sample(5, torch.Generator().manual_seed(0)),
        "loss": m(x),
    }


def by_formula() -> Any:
    m = MFA.from_parameters(
        mixed().means, mixed().loadings, mixed().noise_variance, mixed().log_weights.exp(), precision="reference"
    )
    return m.log_prob(rows()[:64]).detach(), m.component_log_prob(rows()[:64]).detach()


@cache
def wide_one() -> tuple[MFA, Tensor]:
    wide = planted(256, 32, 2, spread=2.0).requires_grad_(False)
    return wide, wide.sample(300, torch.Generator().manual_seed(0))


def screened() -> Any:
    wide, x = wide_one()
    wide.screen(x)
    return wide.log_prob(x), vars(wide.encode(x))


@cache
def models() -> tuple[Any, Any, MFA]:
    return causal_lm(), make_model("llama"), fitting_mixture()


def steered_states() -> Any:
    m = models()[2]
    x = m.sample(24, torch.Generator().manual_seed(0)).view(2, 12, -1)
    return [
        intervene(x, m, what)
        for what in (Toward(1, 0.3), Toward(None, 0.3), Remove(2), Reconstruct(), [Remove(0), Add(x[0, 0].clone())])
    ] + [intervene(x, m, Toward(1, 0.3), gate=(1, 0.5), norm="keep")]


def generated() -> Any:
    model, _, m = models()
    ids = torch.tensor([[3, 9, 27, 5], [8, 4, 2, 60]], device="cpu")
    with steer(model, m, 1, component=2, alpha=0.4, positions="generated"):
        out = model.generate(ids, attention_mask=torch.ones_like(ids, device="cpu"), max_new_tokens=4, do_sample=False)
    return out


def harvested() -> Any:
    texts = [words(*range(i, i + 9)) for i in range(6)]
    model = models()[1]
    store = harvest(model, make_tokenizer(True), texts, 1, context=8, progress=False)
    streamed = list(stream(model, make_tokenizer(True), texts, 1, context=8))
    return store.rows(torch.arange(len(store), device="cpu")), streamed


def stored() -> Any:
    with TemporaryDirectory() as folder:
        with ActivationStoreWriter(folder, FEATURES, rows_per_shard=3) as writer:
            writer.add_document([1, 2, 3], [0, 2], rows()[:2])
            writer.add_document([4, 5], [0, 1], rows()[2:4])
        store = ActivationStore(folder)
        return {
            "rows": store.rows([3, 0]),
            "all": store.tensor(),
            "tokens": store.tokens,
            "context": store.context(1),
            "batches": list(store.batches(3, shuffle=True)),
            "problems": store.verify(progress=False),
        }


WORK: dict[str, Callable[[], Any]] = {
    "fit_em": lambda: fitted(method="em"),
    "fit_em_per_component": lambda: fitted(method="em", noise="per_component"),
    "fit_online": lambda: fitted(method="online"),
    "fit_stream": lambda: fitted(activations=batches(), method="online"),
    "fit_batches": lambda: fitted(activations=list(batches()), method="em", epochs=1),
    "fit_sgd": lambda: fitted(method="sgd"),
    "fit_sgd_per_component": lambda: fitted(method="sgd", noise="per_component"),
    "fit_polish": lambda: fitted(method="em", polish=1),
    "fit_random": lambda: fitted(method="em", init="random", epochs=1),
    "fit_float64": lambda: fitted(method="em", dtype=torch.float64, epochs=1),
    "fit_many": many,
    "fit_sharded": lambda: result(
        fit_sharded(rows(), COMPONENTS, RANK, epochs=2, progress=False, method="em", group=False)
    ),
    "kmeans": clusters,
    "kmeans_stream": lambda: vars(kmeans(batches(), COMPONENTS, progress=False, sample=200)),
    "reservoir": lambda: reservoir(batches(), 50),
    "start_pca": lambda: from_clusters("shared", "pca"),
    "start_random": lambda: from_clusters("per_component", "random"),
    "from_centroids": from_centroids,
    "from_parameters": lambda: fresh().state_dict(),
    "evaluate": evaluated,
    "varimax": lambda: fresh().rotate("varimax").state_dict(),
    "principal": lambda: fresh().rotate("principal").state_dict(),
    "tokens": explained,
    "reference": by_formula,
    "screened": screened,
    "gradients": gradients,
    "gradients_per_component": lambda: gradients(noise="per_component"),
    "intervene": steered_states,
    "generate": generated,
    "harvest": harvested,
    "store": stored,
}
THE_CALLERS = ("tokens", "reference", "screened", "intervene", "generate")
"""What gives tensors of inference mode there, as PyTorch does."""


def entries(value: Any, name: str = "") -> dict[str, Any]:
    """The tensors and numbers in something nested, by where they are."""
    if isinstance(value, dict):
        found = [entries(inner, f"{name}.{key}") for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        found = [entries(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    else:
        return {} if value is None else {name: value}
    return {key: inner for part in found for key, inner in part.items()}


@cache
def ordinary_result(name: str, backend: str) -> dict[str, Any]:
    assert Modes.now() == ORDINARY
    return entries(WORK[name]())


def check(name: str, backend: str, *names: str) -> None:
    expected = ordinary_result(name, backend)
    with _all_of(*names):
        before, random = Modes.now(), torch.get_rng_state()
        found = entries(WORK[name]())
        assert Modes.now() == before, "the modes are not what they were"
        assert torch.equal(torch.get_rng_state(), random), "the global generator has moved"
    assert found.keys() == expected.keys()
    for where, value in found.items():
        if isinstance(value, Tensor):
            assert value.dtype == expected[where].dtype, where
            assert value.device == expected[where].device, where
            assert name in THE_CALLERS or not value.is_inference(), where
            assert torch.equal(value.nan_to_num(7.0), expected[where].nan_to_num(7.0)), where
        else:
            assert value == expected[where], where


def is_the_models(name: str, mode: str) -> bool:
    """True where the language model, which is the caller's, does something else in this mode."""
    return name == "generate" and mode.startswith("autocast")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORK)
def test_results_do_not_depend_on_the_mode(name, mode):
    if not is_the_models(name, mode):
        check(name, "default", mode)


@pytest.mark.parametrize("name", [name for name in WORK if name != "generate"])
def test_nor_on_all_of_them_at_once(name):
    check(name, "default", *TOGETHER)


@pytest.fixture
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the C++ kernels, whose factors have a layout of their own."""

    def refresh() -> None:
        for mfa in (mixed(), wide_one()[0], models()[2]):
            mfa.refresh()

    refresh()
    with monkeypatch.context() as patch:
        patch.setattr(cpp, "library", lambda: None)
        yield
    refresh()


@pytest.mark.more
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORK)
def test_nor_in_plain_pytorch(name, mode, plain_pytorch):
    if not is_the_models(name, mode):
        check(name, "portable", mode)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_what_was_prepared_there_serves_gradients_elsewhere(mode):
    x = rows()[:10].clone()
    for frozen in (fresh().requires_grad_(False), wide_one()[0]):
        x = frozen.sample(10, torch.Generator().manual_seed(0)).requires_grad_()
        with MODES[mode]():
            frozen.refresh()
            frozen.screen()
            frozen.log_prob(x)
        (expected,) = torch.autograd.grad(copy.deepcopy(frozen).log_prob(x).sum(), x)
        (found,) = torch.autograd.grad(frozen.log_prob(x).sum(), x)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "bfloat16", "in_device", "autocast_bfloat16"])
@pytest.mark.parametrize("method", ["em", "sgd"])
def test_what_is_fitted_there_is_trained_on_elsewhere(method, mode):
    with MODES[mode]():
        mfa = fit(rows(), COMPONENTS, RANK, method=method, epochs=1, progress=False)
    before = mfa.means.detach().clone()
    optimizer = torch.optim.SGD(mfa.parameters(), 0.1)
    mfa(rows()).backward()
    optimizer.step()
    assert not torch.equal(mfa.means, before)
    with MODES[mode]():
        assert mfa(rows()).isfinite()


@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_saved_and_loaded_in_any_mode(mode, tmp_path):
    mfa, other = fresh(), fresh("per_component")
    mfa.noise_floor = 1e-3
    expected = mfa.log_prob(rows()[:32]).detach()
    with MODES[mode]() if mode in MODES else torch.enable_grad():
        mfa.save_pretrained(tmp_path / "a")
        mfa.to_reference_checkpoint(tmp_path / "a.pt")
        file = io.BytesIO()
        torch.save(mfa.state_dict(), file)
        file.seek(0)
        loaded = {
            "pretrained": MFA.from_pretrained(tmp_path / "a", device="cpu"),
            "pickle": pickle.loads(pickle.dumps(mfa)),
            "state": fresh(),
        }
        reference = MFA.from_reference_checkpoint(tmp_path / "a.pt", device="cpu")
        loaded["state"].load_state_dict(torch.load(file, weights_only=True))
        copied = copy.deepcopy(other)
    for name, found in loaded.items():
        assert torch.equal(found.log_prob(rows()[:32]), expected), name
    for found in (loaded["pretrained"], loaded["pickle"], loaded["state"], reference):
        assert all(p.requires_grad and not p.is_inference() and p.dtype == torch.float32 for p in found.parameters())
        found(rows()).backward()
    assert torch.allclose(reference.log_prob(rows()[:32]), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(copied.log_prob(rows()[:32]), other.log_prob(rows()[:32]))


def test_loaded_where_the_caller_makes_tensors(tmp_path):
    fresh().save_pretrained(tmp_path)
    with torch.device("meta"):
        assert MFA.from_pretrained(tmp_path).means.is_meta


def test_what_the_caller_hands_over_runs_in_the_callers_modes():
    seen = []

    def note(*_: Any) -> None:
        seen.append(Modes.now())

    def noting() -> Iterator[Tensor]:
        for batch in rows().split(100):
            note()
            yield batch

    with _all_of(*TOGETHER):
        here = Modes.now()
        for method in ("em", "online", "sgd"):
            fit(noting(), COMPONENTS, RANK, method=method, epochs=1, callbacks=[note], progress=False)
        kmeans(noting(), COMPONENTS, progress=False)
    assert here != ORDINARY
    assert len(seen) > 4 * 6
    assert set(seen) == {here}


def test_a_callback_may_fit_in_turn():
    found = []

    def again(mfa: MFA, record: dict[str, Any]) -> None:
        found.append(entries(fitted(method="em")))

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fit(rows(), COMPONENTS, RANK, method="em", epochs=1, callbacks=[again], progress=False)
        assert torch.is_inference_mode_enabled()
    expected = ordinary_result("fit_em", "default")
    assert len(found) == 2
    assert all(torch.equal(found[1][name], t) for name, t in expected.items() if isinstance(t, Tensor))


def test_a_callback_may_change_the_mixture_in_inference_mode():
    def double(mfa: MFA, record: dict[str, Any]) -> None:
        mfa.weight_logits.mul_(1 + (record["step"] == 0))

    def state() -> dict[str, Any]:
        return fitted(method="em", callbacks=[double])

    with torch.no_grad():
        expected = state()
    with torch.inference_mode():
        found = state()
    assert found["history"] == expected["history"]
    assert torch.equal(found["means"], expected["means"])


@pytest.mark.parametrize(
    "what", [Remove(2), Remove(2, part="region"), Toward(1, 0.3), Toward(None, 0.3), Reconstruct()]
)
def test_a_steered_layer_does_the_same_under_autocast(what):
    """To what the model, whose products are others there, has computed."""
    model, _, mfa = models()
    ids = torch.tensor([[3, 9, 27, 5], [8, 4, 2, 60]])
    states = []
    for steered in (False, True):
        hook = model.model.layers[2].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            handle = steer(model, mfa, 1, interventions=what)
            with handle if steered else handle.paused():
                model(ids)
            handle.remove()
        hook.remove()
    plain, found = states
    assert torch.equal(found, intervene(plain, mfa, what))


def test_errors_leave_the_modes_alone():
    with _all_of(*TOGETHER):
        here = Modes.now()
        with pytest.raises(ValueError, match="n_components"):
            fit(rows(), ROWS + 1, RANK, progress=False)
        assert Modes.now() == here
    assert Modes.now() == ORDINARY


def test_modes_are_entered_and_left():
    """Each by itself: what `now` sees is what `entered` makes."""
    for name, mode in MODES.items():
        with mode():
            there = Modes.now()
        assert (there == ORDINARY) == (name in ("seed", "deterministic")), name
        with there.entered():
            assert Modes.now() == there, name
        assert Modes.now() == ORDINARY, name
