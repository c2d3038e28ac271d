"""Wrong calls of everything public: `python -m tests.hostile.api COUNT SEED` says what became of them, as JSON.

A call is one that works, with one or two of its arguments changed into what a user may hand over by accident. It has to
work, or to be refused with a TypeError, ValueError, IndexError or OSError that names an argument or a file.
"""

from __future__ import annotations

import collections
import faulthandler
import inspect
import json
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: strange names are looked for here alone

from mfa_kernels import MFA, fit, fit_many, functional, harvest, interpret, kmeans, steer, steering, stream
from mfa_kernels.evaluation import evaluate
from mfa_kernels.steering import Add, Gate, LogDensity, Offset, Reconstruct, Remove, Responsibility, Toward
from tests.mixtures import mixture, tokens

SECONDS = 30  # that one call may take


class Call(NamedTuple):
    """A function, and arguments that work; `also` are names that an error may say instead of an argument's."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    also: tuple[str, ...] = ()


def calls(folder: Path) -> dict[str, Call]:
    from tests.data.test_harvest import TEXTS, make_model, make_tokenizer
    from tests.steering.tiny import LAYER, causal_lm, fitting_mixture

    m = mixture(5, 8, 2, spread=0.5)
    x = tokens(m, 40)
    made = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp())
    code = made.encode(x[:6])
    model, steered = causal_lm(), fitting_mixture()
    hidden = torch.randn(2, 3, steered.n_features)
    quiet = {"progress": False}
    made.save_pretrained(folder / "saved")
    given: dict[str, Call] = {
        "MFA": Call(MFA, {"n_components": 4, "n_features": 8, "rank": 2, "noise": "shared", "precision": "exact",
                          "noise_floor": 0.0, "device": "cpu", "dtype": torch.float32}),
        "MFA.from_parameters": Call(MFA.from_parameters, {"means": m.means, "loadings": m.loadings, "noise_variance":
                                                          m.noise_variance, "weights": m.log_weights.exp()}),
        "MFA.from_centroids": Call(MFA.from_centroids, {"centroids": m.means, "rank": 2, "noise": "shared",
                                                        "noise_variance": 1.0, "precision": "exact"}),
        "functional.log_prob": Call(functional.log_prob, {"x": x, **m._asdict(), "center": m.means[0],
                                                          "precision": "exact"}),
        "posterior": Call(made.posterior, {"x": x, "component": torch.zeros(40, dtype=torch.long)}),
        "decode": Call(lambda **parts: made.decode(type(code)(**parts)), {**vars(code)}, ("code", *vars(code))),
        "encode": Call(made.encode, {"x": x, "top_k": 3}),
        "responsibilities": Call(made.responsibilities, {"x": x, "temperature": 1.0}),
        "sample": Call(made.sample, {"n": 3, "generator": torch.Generator()}),
        "rotate": Call(made.rotate, {"method": "varimax", "iterations": 3}),
        "screen": Call(made.screen, {"x": x, "neighbors": None}),
        "save_pretrained": Call(made.save_pretrained, {"folder": folder / "again"}),
        "from_pretrained": Call(MFA.from_pretrained, {"folder_or_hub_id": folder / "saved"}),
        "kmeans": Call(kmeans, {"x": x, "n_clusters": 3, "weights": torch.ones(40), "iterations": 3,
                                "init": "k-means||", "tol": 1e-4, "seed": 0, "device": "cpu", **quiet}),
        "fit": Call(fit, {"activations": x, "n_components": 2, "rank": 1, "method": "em", "noise": "shared",
                          "init": "pca", "epochs": 1, "batch_size": 16, "lr": 0.01, "held_out": 0.1, "patience": 2,
                          "seed": 0, "device": "cpu", "dtype": torch.float32, "precision": "exact",
                          "row_weights": torch.ones(40), **quiet}),
        "fit, from a mixture": Call(fit, {"activations": x, "start": made, "epochs": 0, "held_out": 0.1, **quiet}),
        "evaluate": Call(evaluate, {"mfa": made, "activations": x, "centroids": m.means, **quiet}),
        "steer": Call(steer, {"model": model, "mfa": steered, "layer": LAYER, "component": 2, "alpha": 0.5,
                              "latents": None, "positions": "all", "gate": Responsibility(1, 0.1), "norm": None}),
        "intervene": Call(steering.intervene, {"x": hidden, "mfa": steered, "interventions": [Toward(1, 0.5)],
                                               "rows": None, "gate": None, "norm": "keep"}),
        "prior_latents": Call(steering.prior_latents, {"mfa": steered, "rows": 2}),
    }  # fmt: skip
    reader = make_model("llama").eval(), make_tokenizer(bos=True)
    read = {"texts": TEXTS[:3], "layer": 1, "max_tokens": 40, "context": 8, "batch_size": 2, "skip_first": 1,
            "drop_special": True, "seed": 0, "buffer_size": 5}  # fmt: skip
    harvested = harvest(*reader, **{**read, "max_tokens": None}, **quiet)  # type: ignore[arg-type]
    of_store = MFA(3, harvested.n_features, 2)
    objects = {"model": reader[0], "tokenizer": reader[1]}
    given |= {
        "harvest": Call(harvest, {**objects, **read, "dtype": torch.float32, "out": None, "resume": False, **quiet}),
        "stream": Call(lambda **given: next(iter(stream(**given))), {**objects, **read}),
        "fit_many": Call(fit_many, {"batches": [x], "fits": {"one": {"n_components": 2, "rank": 1}}, "held_out": 0.1,
                                    "method": "online", "lr": 0.1, "epochs": 1}, ("one",)),
        "assignments": Call(interpret.assignments, {"mfa": of_store, "store": harvested, "batch_size": 7, **quiet}),
        "top_contexts": Call(interpret.top_contexts, {"mfa": of_store, "store": harvested, "tokenizer": reader[1],
                                                      "component": 1, "n": 2, "by": "responsibility", "before": 2,
                                                      **quiet}),
        "neighbors": Call(interpret.neighbors, {"mfa": of_store, "n": 2, "metric": "centroid", **quiet}),
        "logit_lens": Call(interpret.logit_lens, {"model": reader[0], "mfa": of_store, "component": 1, "top": 3,
                                                  "direction": 0}),
        "to_dense": Call(code.to_dense, {"mfa": made}),
    }  # fmt: skip
    for name in ("forward", "log_prob", "component_log_prob", "assign", "reconstruct"):
        given[name] = Call(getattr(made, name), {"x": x})
    # What an action or a gate is made of is looked at when it is used, at the latest.
    actions: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "Toward": (Toward, {"component": 1, "alpha": 0.5}),
        "Offset": (Offset, {"component": 1, "latents": torch.ones(steered.rank)}),
        "Remove": (Remove, {"component": 1, "part": "latents", "alpha": 1.0}),
        "Reconstruct": (Reconstruct, {"alpha": 1.0}),
        "Add": (Add, {"direction": torch.ones(steered.n_features), "alpha": 1.0}),
        "Responsibility": (Responsibility, {"component": 1, "threshold": 0.5}),
        "LogDensity": (LogDensity, {"threshold": -100.0}),
    }
    for name, (make, arguments) in actions.items():

        def use(make: Callable[..., Any] = make, **arguments: Any) -> Tensor:
            one = make(**arguments)
            gate = one if isinstance(one, Gate) else None
            return steering.intervene(hidden, steered, Toward(1, 0.5) if gate is not None else one, gate=gate)

        given[name] = Call(use, arguments, (*arguments, "interventions", "gate"))
    return given


STRANGE: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.choice(["", "a word", "exact ", "2", "../x", "\0", "é" * 300]),
    lambda r: r.choice([0, -1, 1, 7, 2**44, 2**63, -(2**40), 10**30]),
    lambda r: r.choice([0.0, -0.5, 1.5, 1e308, float("nan"), float("inf"), -float("inf")]),
    lambda r: r.choice([True, False, 1 + 2j, b"bytes", object(), dict, len, ..., NotImplemented]),
    lambda r: r.choice([[], [1, 2], ["a"], [[]], [None], (), {}, {"a": 1}, {1, 2}, range(3), iter([]), slice(2)]),
    lambda r: numpy.array(r.choice([3, 2.5, [1, 2], [[1.0, 2.0]], "text", None, []])),
    lambda r: r.choice([numpy.int64(2), numpy.float32(0.5), numpy.float64("nan"), numpy.bool_(True)]),
    lambda r: torch.randn(r.choice([(), (0,), (3,), (3, 8), (3, 5), (0, 8), (2, 0), (2, 3, 8), (1, 1, 1, 8)])),
    lambda r: torch.randn(40, 8).to(r.choice([torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64])),
    lambda r: torch.full((40, 8), r.choice([float("nan"), float("inf"), 1e38, -1e-40, 0.0])),
    lambda r: torch.zeros(40, 8, device="meta"),
    lambda r: torch.zeros(40, 8).to_sparse(),
    lambda r: torch.randn(8, 40).T.requires_grad_(),
    lambda r: r.choice([torch.float64, torch.int8, "cuda", "mps", "no device", torch.device("meta"), Path("/none/x")]),
]  # fmt: skip
OF_TENSORS: list[Callable[[Tensor, random.Random], Any]] = [
    lambda t, r: t[:-1] if t.dim() else t,
    lambda t, r: t[..., :-1] if t.dim() else t,
    lambda t, r: t[None],
    lambda t, r: t.transpose(0, -1) if t.dim() else t,
    lambda t, r: t.flatten(),
    lambda t, r: t.reshape(-1)[:0],
    lambda t, r: t.to(r.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])),
    lambda t, r: t.to(torch.complex64),
    lambda t, r: t * r.choice([-1, 0, 10**6, 2**32]),
    lambda t, r: t * float("nan") if t.is_floating_point() else -t,
    lambda t, r: t.detach().numpy(),
    lambda t, r: t.tolist(),
    lambda t, r: t.to("meta"),
    lambda t, r: t.to_sparse() if t.dim() else t,
]  # fmt: skip


def strange(value: Any, random_: random.Random) -> Any:
    if isinstance(value, Tensor) and random_.random() < 0.6:
        return random_.choice(OF_TENSORS)(value, random_)
    return random_.choice(STRANGE)(random_)


def names_of(call: Call) -> set[str]:
    try:
        parameters = set(inspect.signature(call.function).parameters) - {"args", "kwargs"}
    except ValueError:
        parameters = set()
    return parameters | set(call.arguments) | set(call.also)


def is_named(error: Exception, names: set[str], changed: dict[str, Any]) -> bool:
    """Whether an error is one for people: its kind, and an argument or the file that was given."""
    if not isinstance(error, TypeError | ValueError | IndexError | OSError):
        return False
    if names & set(re.findall(r"\w+", str(error))):
        return True
    return any(str(value) in str(error) for value in changed.values() if isinstance(value, str | Path) and str(value))


def main(count: int, seed: int, show: int = 0) -> None:
    warnings.simplefilter("ignore")
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    done, unnamed = collections.Counter[str](), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "a" / "b"  # what is written to a strange path, "../x" too, stays in the folder
        inside.mkdir(parents=True)
        os.chdir(inside)
        given = calls(inside)
        for call in given.values():
            call.function(**call.arguments)  # it works as it is
        for number in range(count):
            name = random_.choice(sorted(given))
            call = given[name]
            if name == "screen":
                given["log_prob"].function.__self__.refresh()  # type: ignore[attr-defined]
            places = random_.sample(sorted(call.arguments), min(len(call.arguments), random_.choice([1, 1, 1, 2])))
            changed = {place: strange(call.arguments[place], random_) for place in places}
            print(number, name, {k: repr(v)[:60] for k, v in changed.items()}, file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            done["calls"] += 1
            try:
                found = call.function(**{**call.arguments, **changed})
                if name == "steer":
                    found.remove()
                done["worked"] += 1
            except Exception as error:
                done["refused"] += 1
                if not is_named(error, names_of(call), changed):
                    done["unnamed"] += 1
                    what = {k: repr(v)[:50].replace("\n", " ") for k, v in changed.items()}
                    unnamed[f"{name}: {type(error).__name__}: {str(error)[:110]!r} for {what}"] += 1
        faulthandler.cancel_dump_traceback_later()
        os.chdir(folder)
    for line in sorted(unnamed)[:show]:
        print(line)
    print(json.dumps(done))


if __name__ == "__main__":
    faulthandler.enable()
    main(*map(int, sys.argv[1:]))
