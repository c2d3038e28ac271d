"""Under a user's autocast everything gives what it gives without: only the language model is the user's to round."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.data import tiny_lm
from mfa_kernels.evaluation.reconstruction import evaluate
from mfa_kernels.interpret import (
    assignments,
    axis_contexts,
    interesting_regions,
    logit_lens,
    neighbors,
    region_scatter,
    region_summaries,
    regions_map,
    top_contexts,
    write_report,
)
from mfa_kernels.mixture import functional
from mfa_kernels.steering import (
    Add,
    LogDensity,
    Offset,
    Reconstruct,
    Remove,
    Responsibility,
    SteeringFunction,
    Toward,
    intervene,
    latent_quantiles,
    prior_latents,
)
from tests.interpret.planted import Words, planted

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LOW = [torch.bfloat16, torch.float16]
K, D, R = 4, 24, 2


def _mixture(dtype: torch.dtype, per_component: bool = False) -> tuple[MFA, Any]:
    mfa, store, _ = planted(features=D, components=K, rank=R, per_component=per_component)
    return mfa.to(dtype), store


def _x(store: Any, dtype: torch.dtype) -> Tensor:
    """Activations between regions, so that responsibilities are no ones."""
    x = store.activations[10:74]
    return ((x[:32] + x[32:]) / 2).to(dtype)


def _parts(value: Any) -> list[Any]:
    """Tensors and whatever else a result is made of."""
    if is_dataclass(value) and not isinstance(value, type):
        return [part for field in fields(value) for part in _parts(getattr(value, field.name))]
    if isinstance(value, list | tuple):
        return [part for entry in value for part in _parts(entry)]
    if isinstance(value, _Gradients):
        return _parts(value.taken())
    return [value]


def _same(found: Any, expected: Any) -> None:
    found, expected = _parts(found), _parts(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
        else:
            assert one == other


class _Gradients:
    """Gradients of an output in some leaves; taken outside of autocast, as PyTorch asks for."""

    def __init__(self, output: Tensor, *leaves: Tensor) -> None:
        self.output, self.leaves = output.double().square().sum(), leaves

    def taken(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.output, self.leaves))


def _log_prob_gradients(mfa: MFA, x: Tensor) -> _Gradients:
    return _Gradients(mfa(x), *mfa.parameters())


def _decode_gradients(mfa: MFA, x: Tensor) -> _Gradients:
    x = x.clone().requires_grad_()
    return _Gradients(mfa.reconstruct(x), x, mfa.means, mfa.loadings, mfa.log_noise)


OF_MIXTURES: dict[str, Callable[[MFA, Tensor], Any]] = {
    "forward": lambda mfa, x: mfa(x),
    "log_prob": lambda mfa, x: mfa.log_prob(x),
    "its error bound": lambda mfa, x: mfa.log_prob(x, return_error_bound=True),
    "component_log_prob": lambda mfa, x: mfa.component_log_prob(x),
    "responsibilities": lambda mfa, x: mfa.responsibilities(x, 3.0),
    "assign": lambda mfa, x: mfa.assign(x),
    "encode": lambda mfa, x: mfa.encode(x),
    "decode": lambda mfa, x: mfa.decode(mfa.encode(x, None)),
    "to_dense": lambda mfa, x: mfa.encode(x).to_dense(mfa),
    "reconstruct": lambda mfa, x: mfa.reconstruct(x),
    "posterior": lambda mfa, x: mfa.posterior(x, 1),
    "posterior of each": lambda mfa, x: mfa.posterior(x, torch.arange(len(x)) % K),
    "log_weights": lambda mfa, x: mfa.log_weights,
    "noise_variance": lambda mfa, x: mfa.noise_variance,
    "sample": lambda mfa, x: mfa.sample(50, torch.Generator().manual_seed(0)),
    "varimax": lambda mfa, x: mfa.rotate("varimax").loadings.detach(),
    "principal": lambda mfa, x: mfa.rotate("principal").loadings.detach(),
    "from_parameters": lambda mfa, x: list(
        MFA.from_parameters(mfa.means, mfa.loadings, mfa.noise_variance, mfa.log_weights.exp()).state_dict().values()
    ),
    "from_centroids": lambda mfa, x: list(
        MFA.from_centroids(mfa.means.detach(), 2, generator=torch.Generator().manual_seed(0)).state_dict().values()
    ),
    "gradients": _log_prob_gradients,
    "gradients of a reconstruction": _decode_gradients,
    "prior_latents": lambda mfa, x: prior_latents(mfa, 3, torch.Generator().manual_seed(0)),
    "neighbors": lambda mfa, x: neighbors(mfa, 2, progress=False),
    "neighbors, mahalanobis": lambda mfa, x: neighbors(mfa, 2, "mahalanobis", progress=False),
    "neighbors, subspace": lambda mfa, x: neighbors(mfa, 2, "subspace", progress=False),
    **{
        f"functional.log_prob, {precision}": lambda mfa, x, precision=precision: functional.log_prob(
            x, mfa.means, mfa.loadings, mfa.noise_variance, mfa.log_weights, precision=precision
        )
        for precision in functional.PRECISIONS
    },
}  # fmt: skip


def _compared(make: Callable[[], Any], low: torch.dtype) -> None:
    expected = make()
    with torch.autocast("cpu", low):
        found = make()
    _same(found, expected)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_MIXTURES)
def test_mixtures(name: str, dtype: torch.dtype, low: torch.dtype) -> None:
    mfa, store = _mixture(dtype, per_component=name == "posterior")
    x = _x(store, dtype)
    _compared(lambda: OF_MIXTURES[name](copy.deepcopy(mfa), x), low)


@pytest.mark.parametrize("precision", ["fast", "reference"])
@pytest.mark.parametrize("name", ["forward", "log_prob", "component_log_prob", "gradients", "reconstruct", "encode"])
def test_mixtures_of_other_precisions(name: str, precision: str) -> None:
    mfa, store = _mixture(torch.float32)
    x, mfa.precision = _x(store, torch.float32), precision
    _compared(lambda: OF_MIXTURES[name](copy.deepcopy(mfa), x), torch.bfloat16)


def test_screening() -> None:
    mfa, store = _mixture(torch.float32)
    x = _x(store, torch.float32)

    def make() -> Any:
        return mfa.screen(x), mfa.log_prob(x), mfa.evaluated, _log_prob_gradients(mfa, x)

    _compared(make, torch.bfloat16)


Z = torch.tensor([1.3, -0.7])
INTERVENTIONS: dict[str, Any] = {
    "toward": Toward(1, 0.3),
    "toward all": Toward(None, 0.3),
    "offset": Offset(2, Z),
    "offset of all": Offset(None, Z),
    "add": Add(torch.linspace(-1, 1, D), 0.7),
    "reconstruct": Reconstruct(0.8),
    "remove latents": Remove(1),
    "remove a region": Remove(1, "region", 0.5),
    "remove all latents": Remove(None),
    "remove all regions": Remove(None, "region"),
    "several": [Toward(torch.tensor([0, 3]), torch.tensor([0.2, 0.9])), Offset(2, Z), Remove(1), Remove(2, "region")],
    "a schedule": [Remove(0, alpha=lambda step: 0.5 + step), Toward(3, lambda step: 0.1 * step)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions(name: str, dtype: torch.dtype) -> None:
    mfa, store = _mixture(dtype)
    x = _x(store, dtype).view(2, 16, D)

    def make() -> Any:
        gates = (None, (1, 0.2), LogDensity(-1e3) & ~Responsibility(0, 0.5))
        found = [
            intervene(x, mfa, INTERVENTIONS[name], gate=gate, norm=norm) for gate in gates for norm in (None, "keep")
        ]
        leaf = x.clone().requires_grad_()
        gradients = _Gradients(intervene(leaf, mfa, INTERVENTIONS[name], gate=gates[1]), leaf)
        return [*found, gradients, SteeringFunction(mfa, INTERVENTIONS[name])(x, step=2)]

    for low in LOW:
        _compared(make, low)


def test_quantiles_and_evaluation() -> None:
    mfa, store = _mixture(torch.float32)
    x = store.activations[10:100]

    def make() -> Any:
        score = evaluate(mfa, x, store.activations[20:24], progress=False).as_dict()
        del score["tokens_per_second"]
        return latent_quantiles(mfa, x, 3, [0.1, 0.5]), list(score.items())

    _compared(make, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_a_mixture(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mfa, store = _mixture(dtype)
    quiet: dict[str, Any] = {"progress": False}

    def make() -> Any:
        found = assignments(mfa, store, latents=True, **quiet)
        region_scatter(mfa, store, 3, tmp_path / "in.png", tokenizer=Words(), **quiet)
        regions_map(mfa, region_summaries(mfa, store, Words(), **quiet), tmp_path / "map.png")
        write_report(tmp_path / "page.html", mfa, store, Words(), figures=False, **quiet)
        return (
            [found.components, found.responsibilities, found.distances, found.latents],
            top_contexts(mfa, store, Words(), [1, 2], by="latent", axis=1, **quiet)[1],
            top_contexts(mfa, store, Words(), 3, by="distance", **quiet),
            axis_contexts(mfa, store, Words(), 3, 0, **quiet),
            interesting_regions(mfa, store, **quiet),
            [(tmp_path / name).read_bytes() for name in ("in.png", "map.png", "page.html")],
        )

    _compared(make, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", [None, 1])
def test_the_lens(direction: int | None, dtype: torch.dtype) -> None:
    model, _ = tiny_lm.load(dtype)
    mfa = MFA(3, 256, 2)
    mfa.reset_parameters(torch.Generator().manual_seed(0))
    _compared(lambda: logit_lens(model, mfa, 1, direction=direction), torch.bfloat16)
