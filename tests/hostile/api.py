"""Wrong calls of everything public: `python -m tests.hostile.api COUNT SEED` says what became of them, as JSON.

A call is one that works, with one or two of its arguments changed into what a user may hand over by accident. It has to
work, or to be refused with a TypeError, ValueError, IndexError or OSError that names an argument or a file.
"""

from __future__ import annotations

import collections
import faulthandler
import importlib.util
import inspect
import json
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: strange names are looked for here alone

from mfa_kernels import MFA, data, fit, fit_many, fitting, harvest, interpret, kmeans, steer, steering, stream
from mfa_kernels.data import language_model
from mfa_kernels.evaluation import MFAFeaturizer, evaluate, localize
from mfa_kernels.evaluation.codes import write_codes
from mfa_kernels.mixture import functional
from mfa_kernels.steering import Add, Gate, LogDensity, Offset, Reconstruct, Remove, Responsibility, Toward
from tests.helpers.mixtures import mixture, tokens

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
    features = MFAFeaturizer(made)
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
        "screen": Call(made.screen, {"x": x}),
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
        "MFAFeaturizer": Call(MFAFeaturizer, {"mfa": made, "mode": "regions"}),
        "featurize": Call(features.featurize, {"x": x}),
        "inverse": Call(features.inverse, dict(zip(("features", "error"), features.featurize(x)))),
        "interchange": Call(features.interchange, {"base": x, "source": x.flip(0), "base_code": features.code(x),
                                                   "mask": torch.ones(features.n_masked)}),
        "localize": Call(localize, {"logits": lambda patched, pairs: patched[:, :2], "labels": torch.ones(40).long(),
                                    "base": x, "source": x.flip(0), "features": features, "mask": None,
                                    "changes": torch.ones(40).bool(), "held_out": 0.5, "epochs": 1, "batch_size": 8,
                                    "lr": 0.01, "penalty": 0.0, "seed": 0, **quiet}),
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
        "stream": Call(lambda **given: next(iter(stream(**given)), None), {**objects, **read}),
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
        "associate": Call(interpret.associate, {"code": code, "labels": torch.arange(len(code.dropped)) % 3,
                                                "groups": torch.arange(len(code.dropped)), "n_permutations": 5,
                                                "min_rows": 3, "seed": 0}),
    }  # fmt: skip
    apart = MFA.from_centroids(harvested.tensor()[[0, 7, 13]], 2, noise_variance=1e-3)
    given |= of_text(folder, reader, apart, harvested)
    given |= of_files(folder, made, x)
    given |= {
        "start_from_clusters": Call(fitting.start_from_clusters, {
            "activations": x, "clusters": m.means, "rank": 1, "noise": "shared", "init": "pca", "precision": "exact",
            "dtype": torch.float32, "device": "cpu", "seed": 0, **quiet}),
        "reservoir": Call(fitting.reservoir, {"batches": [x, x], "rows": 7, "seed": 0}),
        "fit_sharded": Call(fitting.fit_sharded, {
            "activations": x, "n_components": 2, "rank": 1, "method": "em", "clusters": m.means[:2], "epochs": 1,
            "batch_size": 16, "held_out": 0.1, "seed": 0, "device": "cpu", "callbacks": [], "resume": False, **quiet}),
        "fit's other arguments": Call(fit, {
            "activations": x, "n_components": 2, "rank": 1, "epochs": 0, "clusters": m.means[:2], "callbacks": [],
            "polish": 0, "schedule": "cosine", "eval_every": 5, "log": None, "checkpoint": None,
            "checkpoint_seconds": 1.0, "resume": False, **quiet}),
        "from_centroids, random": Call(MFA.from_centroids, {"centroids": m.means, "rank": 2,
                                                            "generator": torch.Generator()}),
        "reset_parameters": Call(MFA(2, 3, 1).reset_parameters, {"generator": torch.Generator()}),
        "prior_latents, random": Call(steering.prior_latents, {"mfa": steered, "generator": torch.Generator()}),
        "latent_quantiles": Call(steering.latent_quantiles, {"mfa": made, "activations": x, "component": int(
            made.assign(x)[0]), "q": [0.1, 0.5]}),
        "SteeringFunction": Call(lambda x, **given: steering.SteeringFunction(**given)(x), {
            "x": hidden, "mfa": steered, "interventions": Toward(1, 0.5), "rows": None, "gate": Responsibility(1, 0.1),
            "norm": "keep"}, ("hidden",)),
        "MFASteerer": Call(lambda prompts, alpha, k, z, **given: steering.MFASteerer(
            **given).intervene_to_latent_two_stage(prompts, alpha, z, k), {
            "model": model, "mfa": steered, "layer": LAYER, "tokenizer": reader[1], "site": "resid_post",
            "prompts": torch.ones(1, 4, dtype=torch.long), "alpha": 0.5, "k": 1, "z": torch.ones(steered.rank)},
            ("component", "latents", "interventions")),
        "alpha_for_kl": Call(lambda steered=steered, **given: alpha_of(model, steered, LAYER, **given), {
            "inputs": {"input_ids": torch.ones(1, 4, dtype=torch.long)}, "kl": 0.01, "spec": None, "most": 1.0,
            "tolerance": 0.01}, ("alpha",)),
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


def alpha_of(model: Any, mfa: MFA, layer: Any, **given: Any) -> float:
    with steer(model, mfa, layer, 1, 0.1) as handle:
        return steering.alpha_for_kl(model, handle=handle, **given)


def of_text(folder: Path, reader: tuple[Any, Any], mfa: MFA, store: data.ActivationStore) -> dict[str, Call]:
    """Functions that show regions, and read and write text."""
    model, tokenizer = reader
    own = {"mfa": mfa, "store": store}
    region = int(interpret.assignments(mfa, store, progress=False).counts.argmax())
    shown = {**own, "tokenizer": tokenizer}
    quiet = {"progress": False}
    around = {"before": 2, "after": 2, "assigned": None, **quiet}
    summaries = interpret.region_summaries(mfa, store, tokenizer, n_contexts=0, **quiet)
    steered = partial(steer, model, mfa, 1, 1, 0.5)
    counted = interpret.genre_counts(mfa, store, **quiet)
    genre = counted.names[int(counted.genres[counted.telling.argmax()])]
    calls = {
        "axis_contexts": Call(interpret.axis_contexts, {**shown, "component": region, "axis": 0, "n": 2, "quantiles": (
            0.0, 1.0), **around}),
        "region_summaries": Call(interpret.region_summaries, {**shown, "components": [0, region], "n_tokens": 2,
                                                              "n_contexts": 1, **around}),
        "interesting_regions": Call(interpret.interesting_regions, {**own, "n": 2, "min_rows": 1, "samples": 4,
                                                                    "assigned": None, **quiet}),
        "logit_shift": Call(interpret.logit_shift, {"model": model, "tokenizer": tokenizer, "prompt": "a b", "steering":
                                                    steered, "top": 2}),
        "show_token": Call(interpret.show_token, {"tokenizer": tokenizer, "token_id": 5}),
        "continuation": Call(language_model.continuation, {"model": model, "tokenizer": tokenizer, "prompt": "a b",
                                                   "new_tokens": 2, "temperature": 0.5, "seed": 0}),
        "load_language_model": Call(
            language_model.load_language_model, {"name": None, "dtype": torch.float32, "tokenizer": None}
        ),
        "read_texts": Call(lambda **given: next(data.read_texts(**given), None), {"paths": Path(__file__)}),
        "write_report": Call(interpret.write_report, {
            "path": folder / "page.html", **shown, "model": model, "components": [region], "n_regions": 2,
            "n_contexts": 1, "n_axes": 1, "figures": False, "title": "A title", "labels": None, "assigned": None,
            **quiet}),
    }  # fmt: skip
    labels = {region: interpret.Label("a", "b", "c")}
    interpret.write_labels(folder / "labels.json", labels)
    (folder / "answers").mkdir(exist_ok=True)
    (folder / "answers" / f"region-{region}.answer.txt").write_text("a label")
    asked = {**shown, "components": [region], "n_contexts": 1, "assigned": None, **quiet}
    calls |= {
        "genre_counts": Call(interpret.genre_counts, {**own, "assigned": None, **quiet}),
        "topic_regions": Call(interpret.topic_regions, {"counts": counted, "genre": genre, "n": 2, "least": -1.0}),
        "topic_direction": Call(interpret.topic_direction, {"mfa": mfa, "counts": counted, "genre": genre, "n": 2,
                                                            "least": -1.0}),
        "topics": Call(interpret.topics, {**shown, "n": 2, "n_words": 2, "min_rows": 1, "assigned": None, **quiet}),
        "genres_of": Call(interpret.genres_of, {"sources": ["a/1", "b/2"]}),
        "label_prompt": Call(interpret.label_prompt, {"summary": summaries[region]}),
        "parse_label": Call(interpret.parse_label, {"answer": "a label", "by": "me"}),
        "label_regions": Call(interpret.label_regions, {
            "labeller": lambda question: "a label", **asked, "by": "me", "path": folder / "written.json"}),
        "write_prompts": Call(interpret.write_prompts, {"folder": folder / "questions", **asked}),
        "read_answers": Call(interpret.read_answers, {"folder": folder / "answers", "n_components": 5, "by": "me"}),
        "read_labels": Call(interpret.read_labels, {"path": folder / "labels.json", "n_components": 5}),
        "write_labels": Call(interpret.write_labels, {"path": folder / "again.json", "labels": labels}),
        "write_delphi_cache": Call(interpret.write_delphi_cache, {
            "folder": folder / "delphi", **own, "context": 4, "strength": "closeness", "splits": 2, "overwrite": True,
            "assigned": None, **quiet}),
    }  # fmt: skip
    if importlib.util.find_spec("matplotlib"):
        calls |= {
            "regions_map": Call(interpret.regions_map, {"mfa": mfa, "summaries": summaries, "path": folder / "map.png",
                                                        "labelled": [1], "title": "A title"}),
            "region_scatter": Call(interpret.region_scatter, {
                **shown, "component": region, "path": folder / "in.png", "axes": (0, 1), "labels": 2, "assigned": None,
                "title": None, **quiet}),
        }  # fmt: skip
    return calls


def of_files(folder: Path, mfa: MFA, x: Tensor) -> dict[str, Call]:
    """Functions that write files, and read them again."""
    ids, places = torch.arange(8), torch.arange(3)
    quiet = {"progress": False}
    with data.ActivationStoreWriter(folder / "store", 8) as writer:
        writer.add_document(ids, places, x[:3])
    store = data.ActivationStore(folder / "store")
    mfa.to_reference_checkpoint(folder / "paper.pt", **quiet)

    def write(token_ids: Any, positions: Any, activations: Any, source: Any, **given: Any) -> None:
        with data.ActivationStoreWriter(**given) as writer:
            writer.add_document(token_ids, positions, activations, source)

    return {
        "write_codes": Call(write_codes, {"mfa": mfa, "activations": [x], "path": folder / "codes", "top_k": 2,
                                          **quiet}),
        "ActivationStore": Call(data.ActivationStore, {"folder": folder / "store"}),
        "ActivationStoreWriter": Call(write, {
            "folder": folder / "written", "n_features": 8, "dtype": torch.float32, "meta": {"a": 1}, "rows_per_shard":
            5, "overwrite": True, "resume": False, "token_ids": ids, "positions": places, "activations": x[:3],
            "source": "here"}),
        "store.rows": Call(store.rows, {"index": torch.tensor([2, 0]), "dtype": torch.float32}),
        "store.tensor": Call(store.tensor, {"dtype": torch.float32}),
        "store.batches": Call(lambda **given: list(store.batches(**given)), {
            "batch_size": 2, "shuffle": True, "seed": 0, "dtype": torch.float32}),
        "store.context": Call(store.context, {"row": 1, "before": 1, "after": 1}),
        "store.document": Call(store.document, {"row": 1}),
        "store.position": Call(store.position, {"row": 1}),
        "store.token": Call(store.token, {"row": 1}),
        "store.source": Call(store.source, {"document": 0}),
        "store.document_tokens": Call(store.document_tokens, {"document": 0}),
        "from_pretrained's arguments": Call(MFA.from_pretrained, {
            "folder_or_hub_id": folder / "saved", "device": "cpu", "dtype": torch.float32, "precision": "exact",
            "subfolder": None, "layer": None, "filename": None}),
        "save_pretrained's arguments": Call(mfa.save_pretrained, {"folder": folder / "again", "extra": {"a": 1}}),
        "from_reference_checkpoint": Call(MFA.from_reference_checkpoint, {
            "path": folder / "paper.pt", "eps_floor": None, "device": "cpu", "dtype": torch.float32, **quiet}),
        "to_reference_checkpoint": Call(mfa.to_reference_checkpoint, {"path": folder / "again.pt", "format": 1,
                                                                      **quiet}),
    }  # fmt: skip


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
    """True for an error that is one for people: its kind, and an argument or the file that was given."""
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
