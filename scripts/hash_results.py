"""Hashes of public results and of the files that are written, to compare before and after a change that moves code.

    python scripts/hash_results.py > before; (change something); python scripts/hash_results.py | diff before -

On one machine, in one environment, the same hash is the same to the bit. What depends on the clock is left out. Only
names that users have are called, so that the script need not follow what moves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mfa_kernels import MFA, fit, fit_many, harvest, interpret, kmeans, steer, steering, stream
from mfa_kernels.data import reservoir
from mfa_kernels.data.language_model import continuation, load_language_model
from mfa_kernels.evaluation.codes import write_codes
from mfa_kernels.evaluation.reconstruction import evaluate
from mfa_kernels.fitting import fit_sharded, start_from_clusters
from mfa_kernels.mixture import functional

_QUIET: dict[str, Any] = {"progress": False}
_CLOCK = {"seconds", "tokens_per_second", "memory", "began", "checkpoint_seconds", "machine", "versions"}
_LAYER = 2


def _described(value: Any) -> Iterator[bytes]:
    """A value as bytes that tell it from any other, without what depends on the clock."""
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, MFA):
        yield from _described(value.state_dict())
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _described({name: getattr(value, name) for name in vars(value)})
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            if name not in _CLOCK:
                yield str(name).encode()
                yield from _described(value[name])
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _described(entry)
    elif isinstance(value, bytes):
        yield value
    else:
        yield repr(value).encode()


def _hash(value: Any) -> str:
    digest = hashlib.sha256()
    for part in _described(value):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _of_mixtures() -> Iterator[tuple[str, Callable[[], Any]]]:
    generator = torch.Generator().manual_seed(0)
    components, features, rank = 96, 48, 5
    draws = [
        torch.randn(*shape, generator=generator) for shape in ((components, features), (components, features, rank))
    ]
    noise, weights = 0.5 + torch.rand(features, generator=generator), torch.rand(components, generator=generator)
    mixtures = {
        "float32": MFA.from_parameters(2 * draws[0], draws[1], noise, weights),
        "float64": MFA.from_parameters(2 * draws[0].double(), draws[1], noise, weights),
        "own noise": MFA.from_parameters(2 * draws[0], draws[1], noise.expand(components, -1).contiguous(), weights),
        "diffuse": MFA.from_parameters(0.1 * draws[0], draws[1], noise, weights),
    }
    for name, mfa in mixtures.items():
        x = mfa.sample(300, torch.Generator().manual_seed(1)).reshape(3, 100, features)

        def gradients(mfa: MFA = mfa, x: Tensor = x) -> Any:
            x = x.clone().requires_grad_()
            mfa(x).backward()
            found = [x.grad, *(p.grad.clone() for p in mfa.parameters() if p.grad is not None)]
            mfa.zero_grad(set_to_none=True)
            return found

        def screened(mfa: MFA = mfa, x: Tensor = x) -> Any:
            worked = mfa.screen(x)
            found = worked, mfa.log_prob(x), mfa.encode(x), mfa.evaluated
            mfa.load_state_dict(mfa.state_dict())  # no screen serves it any more
            mfa.refresh()
            return found

        yield f"{name}: log_prob", lambda mfa=mfa, x=x: mfa.log_prob(x)
        yield f"{name}: certificate", lambda mfa=mfa, x=x: mfa.log_prob(x, return_error_bound=True)
        yield f"{name}: gradients", gradients
        yield f"{name}: component_log_prob", lambda mfa=mfa, x=x: mfa.component_log_prob(x)
        yield f"{name}: responsibilities", lambda mfa=mfa, x=x: mfa.responsibilities(x, temperature=2.0)
        yield f"{name}: encode", lambda mfa=mfa, x=x: [mfa.encode(x, top_k) for top_k in (1, 8, None)]
        yield f"{name}: assign", lambda mfa=mfa, x=x: mfa.assign(x)
        yield f"{name}: reconstruct", lambda mfa=mfa, x=x: mfa.reconstruct(x)
        yield f"{name}: posterior", lambda mfa=mfa, x=x: [mfa.posterior(x, 3), mfa.posterior(x, mfa.assign(x))]
        yield f"{name}: screen", screened
    mfa = mixtures["float32"]
    x = mfa.sample(300, torch.Generator().manual_seed(1))
    parameters = [t.detach() for t in mfa.parameters_in_compute_dtype()]
    for precision in functional.PRECISIONS:
        yield f"functional {precision}", lambda p=precision: functional.log_prob(x, *parameters, precision=p)
    yield "to_dense", lambda: mfa.encode(x).to_dense(mfa)
    yield "one token", lambda: [mfa.log_prob(x[:1]), mfa.encode(x[:1])]
    yield (
        "rotated",
        lambda: [
            MFA.from_parameters(*parameters[:3], parameters[3].exp()).rotate(how) for how in ("varimax", "principal")
        ],
    )
    actions = [
        steering.Toward(3, 0.5), steering.Offset(3, torch.ones(rank)), steering.Remove(None), steering.Reconstruct(0.1),
    ]  # fmt: skip
    hidden = x.reshape(3, 100, features)
    yield "intervene", lambda: steering.intervene(hidden, mfa, actions, gate=(3, 0.1), norm="keep")
    for metric in ("centroid", "mahalanobis", "subspace"):
        yield f"neighbors {metric}", lambda m=metric: interpret.neighbors(mfa, 4, metric=m, **_QUIET)


def _of_fits() -> Iterator[tuple[str, Callable[[], Any]]]:
    mfa = MFA.from_parameters(
        6 * torch.randn(12, 16, generator=torch.Generator().manual_seed(2)),
        torch.randn(12, 16, 2, generator=torch.Generator().manual_seed(3)), torch.full((16,), 0.3), torch.ones(12),
    )  # fmt: skip
    x = mfa.sample(6000, torch.Generator().manual_seed(4))
    for method in ("em", "online", "sgd"):
        for noise in ("shared", "per_component"):
            yield (
                f"fit {method} {noise}",
                lambda method=method, noise=noise: _fitted(
                    fit(x, 12, 2, method=method, noise=noise, epochs=2, **_QUIET)
                ),
            )
    yield "fit random, polished", lambda: _fitted(fit(x, 12, 2, init="random", epochs=2, polish=1, **_QUIET))
    yield "fit of a stream", lambda: _fitted(fit(iter(x.split(500)), 12, 2, epochs=1, **_QUIET))
    yield (
        "fit_many",
        lambda: {
            name: _fitted(one)
            for name, one in fit_many(
                x.split(500), {"a": {"n_components": 6}, "b": {"n_components": 9}}, rank=1, epochs=1, **_QUIET
            ).items()
        },
    )
    yield "fit_sharded", lambda: fit_sharded(x, 12, 2, epochs=2, **_QUIET).local
    yield "kmeans", lambda: [
        kmeans(x, 12, **_QUIET), kmeans(x, 5, weights=torch.arange(6000.0), init="random", **_QUIET),
        kmeans(iter(x.split(500)), 5, sample=2000, **_QUIET),
    ]  # fmt: skip
    yield "reservoir", lambda: reservoir(x.split(500), 700)
    yield (
        "start_from_clusters",
        lambda: [
            start_from_clusters(x, mfa.means.detach(), 2, noise, init=init, **_QUIET)
            for noise in ("shared", "per_component")
            for init in ("pca", "random")
        ],
    )
    yield "evaluate", lambda: replace(evaluate(mfa, x, mfa.means.detach(), **_QUIET), tokens_per_second=0)


def _fitted(mfa: MFA) -> Any:
    return mfa, mfa.fit_report


def _of_a_language_model(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    model, tokenizer = load_language_model()
    texts = [Path(module.__file__) for module in (textwrap, json, argparse) if module.__file__]
    store = harvest(model, tokenizer, texts, _LAYER, folder / "store", max_tokens=4000, **_QUIET)
    mfa = fit(store, 24, 3, epochs=2, log=folder / "fit.jsonl", checkpoint=folder / "checkpoint", **_QUIET)
    assigned = interpret.assignments(mfa, store, **_QUIET)
    options: dict[str, Any] = {"assigned": assigned, **_QUIET}
    shown = interpret.interesting_regions(mfa, store, 4, min_rows=20, **options)
    k, prompt = shown[0], "    def close(self):\n"

    def steered(**how: Any) -> Any:
        with steer(model, mfa, _LAYER, **how) as handle:
            with torch.no_grad():
                logits = model(**tokenizer([prompt], return_tensors="pt")).logits
            return logits, continuation(model, tokenizer, prompt, 12, 0.7, 0), handle.stats()

    yield "harvest", lambda: [store.tensor(), store.tokens, store.meta]
    yield "stream", lambda: list(stream(model, tokenizer, texts, [1, _LAYER], max_tokens=500))
    yield "fit of a store", lambda: _fitted(mfa)
    yield "unsteered", lambda: continuation(model, tokenizer, prompt, 12, 0.7, 0)
    yield "steer toward", lambda: steered(component=k, alpha=0.4)
    yield "steer inside", lambda: steered(component=k, latents=torch.ones(3), positions="last", norm="keep")
    yield "steer mixture", lambda: steered(alpha=0.4, gate=(k, 0.01))
    yield "steer on schedule", lambda: steered(component=k, alpha=lambda step: 0.5 / (1 + step), positions="generated")
    yield "alpha_for_kl", lambda: _alpha(model, tokenizer, mfa, k, prompt)
    yield "latent_quantiles", lambda: steering.latent_quantiles(mfa, store, k, [0.1, 0.9])
    yield "assignments", lambda: [assigned.components, assigned.counts]
    yield (
        "top_contexts",
        lambda: [
            interpret.top_contexts(mfa, store, tokenizer, k, 3, by=by, **options)
            for by in ("responsibility", "distance")
        ],
    )
    yield "axis_contexts", lambda: interpret.axis_contexts(mfa, store, tokenizer, k, 0, **options)
    yield "region_summaries", lambda: interpret.region_summaries(mfa, store, tokenizer, shown, **options)
    yield (
        "logit_lens",
        lambda: [interpret.logit_lens(model, mfa, k, direction=d, tokenizer=tokenizer) for d in (None, 1)],
    )
    yield "logit_shift", lambda: interpret.logit_shift(
        model, tokenizer, prompt, lambda: steer(model, mfa, _LAYER, k, 0.4)
    )  # fmt: skip

    mfa.save_pretrained(folder / "mfa")
    mfa.to_reference_checkpoint(folder / "paper.pt")
    write_codes(mfa, store.batches(512), folder / "codes.safetensors", **_QUIET)
    interpret.write_report(folder / "report.html", mfa, store, tokenizer, model=model, figures=False, **options)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"):
        yield f"file {path.relative_to(folder)}", lambda path=path: _content(path)


def _alpha(model: Any, tokenizer: Any, mfa: MFA, component: int, prompt: str) -> float:
    with steer(model, mfa, _LAYER, component, 0.1) as handle:
        return steering.alpha_for_kl(model, tokenizer([prompt], return_tensors="pt"), handle, 0.01)


def _content(path: Path) -> Any:
    """Returns the content of a file, without times and checksums of them."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        return {name: value for name, value in found.items() if name not in ("saved_as", "checksum", "sha256", "seal")}
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return path.read_bytes()


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for of in (_of_mixtures(), _of_fits(), _of_a_language_model(Path(folder))):
            for name, work in of:
                print(f"{_hash(work())}  {name}", flush=True)


if __name__ == "__main__":
    main()
