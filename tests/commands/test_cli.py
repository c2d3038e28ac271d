"""Every command, on the small language model and a few thousand activations."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mfa_kernels
from mfa_kernels import MFA, fit, kmeans
from mfa_kernels.commands.cli import main
from mfa_kernels.commands.options import parser
from mfa_kernels.common import checksum, locks, sharing
from mfa_kernels.data import ActivationStore, ActivationStoreWriter, language_model
from mfa_kernels.fitting.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A store of 3,000 activations, and a mixture fitted to it, both by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text"
    text.mkdir()
    for i in range(6):
        lines = [f"def function_{i}_{j}(self, x):\n    return self.value_{j} + {j}\n\n" for j in range(60)]
        (text / f"{i}.py").write_text("".join(lines))
    store = ["--text", str(text), "--layer", "1", "--max-tokens", "3000", "--out", str(folder / "store")]
    assert main(["harvest", *store]) == 0
    fitting = ["-K", "16", "-R", "3", "--epochs", "2", "--log", str(folder / "fit.jsonl")]
    assert main(["fit", str(folder / "store"), "--out", str(folder / "mfa"), *fitting]) == 0
    return folder


def test_harvest_and_fit(folder):
    store, mfa = ActivationStore(folder / "store"), MFA.from_pretrained(folder / "mfa")
    assert len(store) == 3000
    assert (mfa.n_components, mfa.n_features, mfa.rank) == (16, 256, 3)
    assert mfa.extra["layer"] == "model.layers.1"
    assert mfa.extra["model"] == mfa.extra["tokenizer"] == "tiny_lm"
    records = [json.loads(line) for line in (folder / "fit.jsonl").read_text().splitlines()]
    assert mfa.fit_report.history == records
    data = mfa.fit_report.run["data"]
    assert (data["rows"], data["model"], data["layer"]) == (3000, "tiny_lm", "model.layers.1")
    assert data["model_fingerprint"] == mfa.extra["model_fingerprint"]
    assert records[-1]["held_out_nll"] < records[0]["held_out_nll"]


@pytest.mark.parametrize("method", ["sgd", "em", "online"])
def test_fit_by_every_method(folder, method, capsys):
    log = folder / f"{method}.jsonl"
    arguments = ["-K", "8", "-R", "2", "--epochs", "1", "--method", method, "--log", str(log)]
    arguments += ["--polish", "1"] if method == "em" else []
    assert main(["fit", str(folder / "store"), "--out", str(folder / method), *arguments]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["epoch"] for record in records] == ([0, 1, 2] if method == "em" else [0, 1])
    best = min(record["held_out_nll"] for record in records)
    assert f"{best:.3f} nats per token" in capsys.readouterr().out


def test_fit_exposes_all_of_fit(folder, tmp_path, monkeypatch):
    """But for what is no word on a command line, and the resumption from a folder that is not the checkpoint's."""
    seen: dict[str, object] = {}

    def stand_in(activations, **options):
        seen.clear()
        seen.update(options)
        return fit(activations, **{**options, "epochs": 0})

    monkeypatch.setattr(mfa_kernels, "fit", stand_in)
    given = {
        "--method": "sgd", "--noise": "per_component", "--init": "random", "--epochs": 3, "--batch-size": 70,
        "--lr": 0.5, "--schedule": "constant", "--held-out": 0.2, "--eval-every": 4, "--patience": 6, "--seed": 7,
        "--device": "cpu", "--dtype": "float64", "--precision": "reference", "--log": tmp_path / "log",
        "--checkpoint": tmp_path / "checkpoint", "--checkpoint-seconds": 8.0,
    }  # fmt: skip
    words = [str(word) for option in given.items() for word in option]
    command = ["fit", str(folder / "store"), "-K", "4", "-R", "1", "--out", str(tmp_path / "mfa"), "--overwrite"]
    assert main([*command, "--resume", *words]) == 0
    expected = {name[2:].replace("-", "_"): value for name, value in given.items()}
    expected |= {"n_components": 4, "rank": 1, "polish": 0, "resume": True, "start": None, "split": "rows"}
    assert seen == {**expected, "dtype": torch.float64, "device": torch.device("cpu")}
    assert set(inspect.signature(fit).parameters) - set(seen) == {
        "activations", "clusters", "row_weights", "callbacks", "progress", "group",
    }  # fmt: skip
    assert main([*command, "--patience", "0"]) == 0
    assert seen["patience"] is None
    assert main(command) == 0
    defaults = {name: of_fit.default for name, of_fit in inspect.signature(fit).parameters.items()}
    own = {"n_components", "rank", "device"}
    assert {name: defaults[name] for name in seen.keys() - own} == {name: seen[name] for name in seen.keys() - own}


def test_device(folder, capsys):
    commands = [
        ["evaluate", "{}/mfa", "{}/store"],
        ["encode", "{}/mfa", "{}/store", "--out", "{}/on_a_device", "--overwrite"],
        ["steer", "{}/mfa", "x", "-k", "1", "--max-new-tokens", "1"],
        ["harvest", "--text", "{}/text", "--layer", "1", "--max-tokens", "9", "--out", "{}/few", "--overwrite"],
    ]
    for command in commands:
        words = [word.format(folder) for word in command]
        assert main([*words, "--device", "cpu"]) == 0
        assert main([*words, "--device", "abacus"]) == 1
        assert f"mfa-kernels {command[0]}: --device abacus: " in capsys.readouterr().err
        if not torch.cuda.is_available():
            assert main([*words, "--device", "cuda"]) == 1
            assert f"mfa-kernels {command[0]}: --device cuda: " in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--shard-components", "--method", "em"]], ids=["whole", "sharded"])
def test_fit_goes_on_from_a_mixture(folder, tmp_path, more):
    command = ["fit", str(folder / "store"), "--start", str(folder / "mfa"), "--epochs", "0", *more]
    assert main([*command, "--out", str(tmp_path / "mfa")]) == 0
    before, after = MFA.from_pretrained(folder / "mfa"), MFA.from_pretrained(tmp_path / "mfa")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters()))
    assert after.extra["layer"] == before.extra["layer"]


def test_fit_needs_a_size(folder, tmp_path, capsys):
    assert main(["fit", str(folder / "store"), "--out", str(tmp_path / "mfa")]) == 2
    assert "-K: say how many regions" in capsys.readouterr().err


def test_fit_shards_the_components(folder, tmp_path, capsys):
    """In one process, which holds them all; several are compared with it in tests/distributed."""
    command = ["fit", str(folder / "store"), "-K", "8", "-R", "2", "--epochs", "1", "--method", "em", "--out"]
    assert main([*command, str(tmp_path / "expected")]) == 0
    sharded = [*command, str(tmp_path / "mfa"), "--shard-components", "--checkpoint", str(tmp_path / "checkpoint")]
    assert main(sharded) == 0
    found, expected = (MFA.from_pretrained(tmp_path / name) for name in ("mfa", "expected"))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    assert found.extra == expected.extra == {**found.extra, "layer": "model.layers.1"}
    assert main(sharded) == 1
    assert "checkpoint.json is there already: --resume goes on with it" in capsys.readouterr().err
    sharded.append("--overwrite")
    assert main([*sharded, "--resume"]) == 0
    assert main([*sharded, "--polish", "1"]) == 1
    assert "--shard-components starts from --init pca, and goes without --polish" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("order", "components", "rank"),
    [
        (["store", "-K", "8", "16"], [8, 16], None),
        (["-K", "8", "store"], [8], None),
        (["-K", "8", "16", "-R", "2", "3", "store"], [8, 16], [2, 3]),
        (["-R", "2", "store", "-K", "8", "16"], [8, 16], [2]),
        (["-K", "8", "--epochs", "1", "store"], [8], None),
    ],
)
def test_sizes_before_and_after_the_store(order, components, rank):
    found = parser().parse_args(["fit", "--out", "mfa", *order])
    assert (found.store, found.components, found.rank) == (Path("store"), components, rank)


def test_sizes_that_are_no_integers(capsys):
    for order in (["-K", "store"], ["store", "-K", "8", "other"], ["-K", "8.5", "store"], ["-K", "8", "one", "two"]):
        with pytest.raises(SystemExit):
            parser().parse_args(["fit", "--out", "mfa", *order])
        assert "argument -K/--components: expected integers, got" in capsys.readouterr().err


def test_fit_says_that_a_store_is_not_complete(folder, tmp_path, capsys):
    shutil.copytree(folder / "store", tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps(checksum.sealed({**json.loads(manifest.read_text()), "complete": False})))
    options = ["-K", "4", "-R", "2", "--epochs", "0", "--out", str(tmp_path / "mfa"), "--overwrite"]
    for store, said in ((folder / "store", False), (tmp_path / "store", True)):
        assert main(["fit", str(store), *options]) == 0
        assert ("incomplete): harvest --resume would bring the rest" in capsys.readouterr().err) == said


def test_encode(folder, capsys):
    out = folder / "codes.safetensors"
    assert main(["encode", str(folder / "mfa"), str(folder / "store"), "--out", str(out), "--top-k", "2"]) == 0
    codes = load_file(out)
    expected = MFA.from_pretrained(folder / "mfa").encode(ActivationStore(folder / "store").tensor(), top_k=2)
    held = expected.components >= 0
    assert torch.equal(codes["offsets"], torch.nn.functional.pad(held.sum(1).cumsum(0), (1, 0)))
    assert torch.equal(codes["components"], expected.components[held].int())
    torch.testing.assert_close(codes["latents"], expected.latents[held], rtol=1e-4, atol=1e-4)
    assert f"{len(codes['components']):,} active pairs of a token and a component" in capsys.readouterr().out


def test_encode_says_how_many_tokens_have_no_component(folder, tmp_path, capsys):
    mfa = MFA.from_pretrained(folder / "mfa")
    x = mfa.means.detach()[[0, 1, 2]].clone()
    x[1] = 1e30
    with ActivationStoreWriter(tmp_path / "store", mfa.n_features) as writer:
        writer.add_document([1, 2, 3], [0, 1, 2], x)
    arguments = ["encode", str(folder / "mfa"), "--out", str(tmp_path / "codes.safetensors")]
    assert main([*arguments, str(tmp_path / "store")]) == 0
    assert "\n1 of them have no density" in capsys.readouterr().out
    assert main([*arguments, str(folder / "store"), "--overwrite"]) == 0
    assert "no density" not in capsys.readouterr().out


def test_evaluate(folder, capsys):
    assert main(["evaluate", str(folder / "mfa"), str(folder / "store")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"3,000 activations of {folder / 'store'} ")
    assert re.search(r"^negative log-likelihood, nats per token +-?[\d.]+  less$", out, re.M)
    began = MFA.from_pretrained(folder / "mfa").fit_report.run["began"]
    fitted = f"The mixture was fitted: {began}, em (asked for: auto), seed 0, K 16, R 3, epochs 2"
    assert out.splitlines()[-1] == fitted


@pytest.fixture(scope="module")
def pairs(folder):
    """A file of pairs, with what the small model says to each prompt as its right answer."""
    model, tokenizer = language_model.load_language_model()
    bodies = ("self", "(x", "x[0]", "not", "(1", "None if x", "len", "'a'")
    prompts, said = [], []
    for prompt in [f"def f_{name}(self):\n    return {body}" for name in "abcdefgh" for body in bodies]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            answer = tokenizer.decode(model(ids).logits[0, -1].argmax())
        if tokenizer(prompt + answer).input_ids[:-1] == ids[0].tolist():  # not one that is read together with the end
            prompts, said = [*prompts, prompt], [*said, answer]
    lines = [
        {"base": p, "source": q, "answer": b, "changes": a != b, "base_answer": a, "source_answer": b}
        for p, a in zip(prompts, said)
        for q, b in zip(prompts[::5], said[::5])
        if tokenizer(p + b).input_ids[:-1] == tokenizer(p).input_ids
    ]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_localize(folder, pairs, tmp_path, capsys):
    command = [
        "localize",
        str(folder / "mfa"),
        "--pairs",
        str(pairs),
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--count",
        "200",
    ]
    command += ["--layer", "-1", "--at-least", "0.5"]
    out = tmp_path / "found.json"
    assert main([*command, "--json", str(out), "--methods", "full vector", "regions"]) == 0
    captured = capsys.readouterr()
    assert re.search(
        r"^The model answers \d+% of the prompts right; \d+ pairs of such are taken\.$", captured.out, re.M
    )
    assert "| full vector | 1.000 |" in captured.out, "of the last token of the last layer"
    assert "localize: the mixture is of layer model.layers.1, --layer names model.layers.4" in captured.err
    content = json.loads(out.read_text())
    assert [one["method"] for one in content["results"]] == ["full vector", "regions"]
    assert content["results"][0]["iia"] == 1
    assert main([*command, "--json", str(out), "--methods", "random"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--store", str(folder / "store"), "--methods", "K-means", "--das", "4"]) == 0
    assert "| K-means |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "say which pairs: --task mcqa, --task ravel, or --pairs FILE"),
        (["--task", "mcqa", "--variable", "weather"], 1, "--variable must be one of 'pointer', 'answer'"),
        (["--task", "mcqa"], 1, "and at least 60% are asked for"),
        (["--pairs", "{}/nothing"], 1, "nothing"),
        (["--pairs", "{}/pairs.jsonl", "--at", "last"], 1, "--variable and --at go with --task"),
        (["--pairs", "{}/pairs.jsonl", "--methods", "PCA"], 2, "--store: PCA is fitted to activations"),
        (["--pairs", "{}/pairs.jsonl", "--methods", "guessing"], 1, "--methods must be"),
    ],
)
def test_localize_says_what_is_wrong(folder, pairs, capsys, words, status, message):
    words = [word.format(folder) for word in words]
    assert main(["localize", str(folder / "mfa"), "--count", "20", *words]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_steer_changes_the_text(folder, capsys):
    arguments = ["steer", str(folder / "mfa"), "def f(self):", "-k", "3", "--max-new-tokens", "8"]
    texts = []
    for alpha in ("0", "0.9"):
        assert main([*arguments, "--alpha", alpha]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
    assert all(text.startswith("def f(self):") for text in texts)
    assert main([*arguments, "--latents", "1", "2", "-3", "--gate", "0.5", "--positions", "generated"]) == 0


def _steer(folder, capsys, *arguments, extra=None, mixture=None):
    """Exit status, and lines of standard error, of steering with a mixture that says something else of itself."""
    mfa = MFA.from_pretrained(folder / "mfa") if mixture is None else mixture
    mfa.extra = {**mfa.extra, **(extra or {})}
    mfa.extra = {key: value for key, value in mfa.extra.items() if value is not None}
    mfa.save_pretrained(folder / "told")
    capsys.readouterr()
    status = main(["steer", str(folder / "told"), "def f", "-k", "1", "--max-new-tokens", "2", *arguments])
    captured = capsys.readouterr()
    assert captured.out == "" if status else captured.out.startswith("def f")
    return status, [line for line in captured.err.splitlines() if line.startswith(("mfa-kernels ", "model ", "token"))]


@pytest.fixture(scope="module")
def narrow(folder):
    """A model of 64 features, two layers, and the bundled tokenizer; its folder."""
    import transformers

    from mfa_kernels.data import tiny_lm

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "narrow")
    transformers.AutoTokenizer.from_pretrained(tiny_lm.path()).save_pretrained(folder / "narrow")
    return str(folder / "narrow")


@pytest.mark.parametrize("name", ["tiny_lm", "/old/site-packages/mfa_kernels/data/tiny_lm"])
def test_steer_takes_the_bundled_model_where_the_mixture_says_so(folder, capsys, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # nobody looks it up
    status, said = _steer(folder, capsys, extra={"model": name, "tokenizer": name})
    assert status == 0
    assert said == ["model tiny_lm, which the mixture was fitted to"]


def test_steer_takes_the_model_of_the_mixture(folder, capsys, narrow):
    mfa = MFA(4, 64, 2)
    extra = {"model": narrow, "layer": "model.layers.0", "tokenizer": "tiny_lm"}
    status, said = _steer(folder, capsys, mixture=mfa, extra=extra)
    assert status == 0
    assert said == [f"model {narrow}, which the mixture was fitted to"]
    assert _steer(folder, capsys, "--model", narrow, mixture=mfa, extra={"model": None})[0] == 0
    status, said = _steer(folder, capsys, "--model", narrow, extra={"model": "tiny_lm"})
    assert status == 1
    assert "is of another architecture or size than the model that the mixture was fitted to (fingerprint " in said[1]
    del said[1]
    assert said == [
        f"model {narrow}, as --model says; the mixture is of tiny_lm",
        "mfa-kernels steer: mfa has n_features = 256, but model.layers.1 of LlamaForCausalLM is 64 wide",
    ]


@pytest.mark.parametrize("way", ["store", "text"])
def test_a_local_model_is_named_without_its_folder(folder, capsys, narrow, way, tmp_path):
    """From the harvest to steering; a mixture of earlier versions, which has its path, finds it there."""
    out, store = tmp_path / "mfa", tmp_path / "store"
    read = ["--model", narrow, "--text", str(folder / "text"), "--layer", "0", "--max-tokens", "900"]
    size = ["-K", "4", "-R", "2", "--epochs", "1", "--log", str(tmp_path / "log.jsonl"), "--out", str(out)]
    if way == "store":
        assert main(["harvest", *read, "--out", str(store)]) == 0
        assert main(["fit", str(store), *size]) == 0
        assert main(["encode", str(out), str(store), "--out", str(tmp_path / "codes.safetensors")]) == 0
    else:
        assert main(["fit", *read, *size]) == 0
    mfa = MFA.from_pretrained(out)
    assert (mfa.extra["model"], mfa.extra["tokenizer"]) == ("local:narrow", "local:narrow")
    written = [out / "config.json", out / "model.safetensors", tmp_path / "log.jsonl"]
    written += [tmp_path / "codes.safetensors"] if way == "store" else []
    for path in written:
        assert str(folder).encode() not in path.read_bytes(), path
    assert not list(sharing.local_paths(vars(mfa.fit_report) | mfa.extra, "")), "nor of anything else that is here"
    steering = ["steer", str(out), "def f", "-k", "1", "--max-new-tokens", "2"]
    capsys.readouterr()
    assert main(steering) == 2
    assert capsys.readouterr().err == (
        "mfa-kernels steer: --model: the mixture is of the local model 'narrow'; name its folder with --model\n"
    )
    assert main([*steering, "--model", narrow]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("mfa-kernels ", "model "))]
    assert said == [f"model {narrow}, as --model says"]
    mfa.extra = {**mfa.extra, "model": narrow, "tokenizer": narrow}
    mfa.save_pretrained(tmp_path / "before")
    assert main(["steer", str(tmp_path / "before"), *steering[2:]]) == 0


def test_steer_tells_another_model_of_the_same_width(folder, capsys, narrow, tmp_path):
    import transformers

    config = transformers.AutoConfig.from_pretrained(narrow)
    config.num_hidden_layers = 1
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "shallow")
    transformers.AutoTokenizer.from_pretrained(narrow).save_pretrained(tmp_path / "shallow")
    model, _ = language_model.load_language_model(narrow)
    extra = {"model": "local:narrow", "layer": "model.layers.0", "model_fingerprint": language_model.fingerprint(model)}
    found = language_model.fingerprint(language_model.load_language_model(str(tmp_path / "shallow"))[0])
    assert found != extra["model_fingerprint"]
    shallow = str(tmp_path / "shallow")
    status, said = _steer(folder, capsys, "--model", shallow, mixture=MFA(4, 64, 2), extra=extra)
    assert status == 0
    assert said == [
        f"model {shallow}, as --model says; the mixture is of the local model 'narrow'",
        f"mfa-kernels steer: {shallow} is of another architecture or size than the model that the mixture was fitted "
        f"to (fingerprint {found}, there {extra['model_fingerprint']})",
    ]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (None, "it does not say which model it is of"),
        (7, "it does not say which model it is of"),
        ("LlamaForCausalLM", "it says no more of its model than the class, LlamaForCausalLM"),
        ("/somewhere/else/llama", "its model is /somewhere/else/llama, which is no folder here"),
        ("../llama/", "its model is ../llama/, which is no folder here"),
    ],
)
def test_steer_asks_for_a_model_that_nothing_names(folder, capsys, model, problem):
    status, said = _steer(folder, capsys, extra={"model": model})
    assert status == 2
    (line,) = said
    assert line.startswith("mfa-kernels steer: --model: ")
    assert problem in line


def test_steer_runs_no_code_of_a_repository(folder, capsys, monkeypatch):
    import transformers

    seen = []

    def load(name, **options):
        seen.append((name, options["trust_remote_code"]))
        raise OSError("no such repository\nand much more")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    status, said = _steer(folder, capsys, extra={"model": "maker/model"})
    assert status == 2
    assert seen == [("maker/model", False)]
    assert said[1] == (
        "mfa-kernels steer: --model: maker/model, which the mixture was fitted to, cannot be loaded "
        "(no such repository); name another"
    )


def test_another_tokenizer_than_the_models_is_the_mixtures(folder, capsys, narrow, monkeypatch):
    import transformers

    read, own = [], transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **o: read.append(str(name)) or own(name, **o)
    )
    assert _steer(folder, capsys, extra={"model": "tiny_lm", "tokenizer": narrow})[0] == 0
    assert read[-1] == narrow
    status, said = _steer(folder, capsys, extra={"model": "tiny_lm", "tokenizer": "PreTrainedTokenizerFast"})
    assert status == 0
    assert "tokenizer of the model; the mixture is of PreTrainedTokenizerFast" in said[1]


@pytest.mark.parametrize("command", ["evaluate", "encode"])
def test_a_store_of_something_else_is_told(folder, capsys, command):
    mfa = MFA.from_pretrained(folder / "mfa")
    out = ["--out", str(folder / "codes.safetensors"), "--overwrite"] if command == "encode" else []
    for extra, differences in (
        ({"model": "tiny_lm"}, []),
        ({"model": "maker/model", "layer": "model.layers.2"}, ["model maker/model", "layer model.layers.2"]),
    ):
        mfa.extra = {**mfa.extra, **extra}
        mfa.save_pretrained(folder / "other")
        assert main([command, str(folder / "other"), str(folder / "store"), *out]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfa-kernels ")]
        assert len(said) == len(differences)
        assert all(f"the mixture is of {told}, {folder / 'store'} of" in line for told, line in zip(differences, said))


def test_convert_both_ways(folder):
    assert main(["convert", str(folder / "mfa"), str(folder / "reference.pt")]) == 0
    assert main(["convert", str(folder / "reference.pt"), str(folder / "again")]) == 0
    x = ActivationStore(folder / "store").tensor()[:50]
    first, second = (MFA.from_pretrained(folder / name) for name in ("mfa", "again"))
    torch.testing.assert_close(first.log_prob(x), second.log_prob(x), rtol=1e-5, atol=1e-2)


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "C++ compiler", "kernel cache", "cpu, float32"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{folder}/nothing", "{folder}/store"], "nothing"),
        (["evaluate", "{folder}/mfa", "{folder}/nothing"], "nothing"),
        (["steer", "{folder}/mfa", "x", "-k", "16"], "component must be in [0, 16), got 16"),
        (["steer", "{folder}/mfa", "x", "-k", "1", "--layer", "9"], "layer must be in [-5, 5), got 9"),
        (["steer", "{folder}/mfa", "x", "--gate", "0.5"], "--gate needs --component"),
        (["fit", "{folder}/store", "--out", "{folder}/x", "-K", "5000"], "5000"),
        (["fit", "{folder}/store", "--out", "{folder}/fit.jsonl", "-K", "8"], "--out must be a folder"),
        (["fit", "{folder}/store", "--out", "{folder}/x", "-K", "8", "--log", "{folder}/text"], "log must name a file"),
        (["fit", "{folder}/store", "--out", "{folder}/x", "--start", "{folder}/nothing"], "nothing"),
        (
            ["fit", "{folder}/store", "--out", "{folder}/x", "--start", "{folder}/mfa", "-K", "8"],
            "-K/--components must be that of start, 16, or left out, got 8",
        ),
        (["fit", "--out", "{folder}/x", "-K", "8"], "a store or --text"),
        (["fit", "{folder}/store", "--text", "{folder}/text", "--out", "{folder}/x", "-K", "8"], "a store or --text"),
        (["fit", "{folder}/store", "--out", "{folder}/x", "-K", "8", "--layer", "1"], "--layer goes with --text"),
        (["fit", "--text", "{folder}/text", "--out", "{folder}/x", "-K", "8"], "--text needs --layer"),
        (
            ["fit", "--text", "{folder}/text", "--layer", "1", "--out", "{folder}/x", "-K", "8", "--method", "em"],
            "--method em, truncated or sgd, and --polish, go with a store",
        ),
        (
            ["fit", "--text", "{folder}/text", "--layer", "1", "--out", "{folder}/x", "-K", "8", "--shard-components"],
            "--shard-components goes with a store",
        ),
        (["harvest", "--text", "{folder}/text", "--layer", "1", "--out", "{folder}/store"], "store"),
        (["harvest", "--text", "{folder}/missing", "--layer", "1", "--out", "{folder}/y"], "missing"),
        (["convert", "{folder}/missing.pt", "{folder}/y"], "missing.pt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_are_one_line(folder, capsys, arguments, message):
    assert main([argument.format(folder=folder) for argument in arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfa-kernels ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_two_demos_in_one_folder_do_not_mix(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with locks.alone(tmp_path):
        assert main(["demo", "--small", "--out", str(tmp_path)]) == 1
    assert f"mfa-kernels demo: {tmp_path}: another process" in capsys.readouterr().err
    assert main(["demo", "--small", "--out", str(tmp_path), "--component", "256"]) == 1
    locks.hold(tmp_path).release()  # one that failed holds nothing


def test_demo(tmp_path, capsys):
    small = ["--small", "--tokens", "4000", "-K", "16", "-R", "3", "--epochs", "1"]
    assert main(["demo", "--out", str(tmp_path), *small]) == 0
    out = capsys.readouterr().out
    assert "negative log-likelihood" in out
    assert "unsteered:" in out
    for name in ("mfa/model.safetensors", "evaluation.json", "fit.jsonl", "regions.png", "region.png", "regions.html"):
        assert (tmp_path / name).is_file(), name
        assert name.split("/")[0] in out
        told = (tmp_path / name).read_bytes()
        assert str(tmp_path).encode() not in told, name
        assert str(Path(mfa_kernels.__file__).parent).encode() not in told, name
    mfa = MFA.from_pretrained(tmp_path / "mfa")
    assert mfa.extra["model"] == mfa.fit_report.run["data"]["model"] == "tiny_lm"


def test_fit_and_harvest_go_on(folder, tmp_path, capsys):
    arguments = ["fit", str(folder / "store"), "-K", "8", "-R", "2", "--epochs", "1", "--method", "em"]
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint"), "--checkpoint-seconds", "0"]
    assert main([*arguments, "--out", str(tmp_path / "a"), *checkpoint, "--resume"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b"), *checkpoint]) == 1
    assert main([*arguments, "--out", str(tmp_path / "b"), *checkpoint, "--resume"]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert main([*arguments, "--out", str(tmp_path / "c"), *checkpoint, "--resume", "--seed", "1"]) == 1
    assert "seed = 1, there 0" in capsys.readouterr().err

    manifest = (folder / "store" / "manifest.json").read_bytes()
    again = ["--text", str(folder / "text"), "--layer", "1", "--max-tokens", "3000", "--out", str(folder / "store")]
    assert main(["harvest", *again, "--resume"]) == 0
    assert (folder / "store" / "manifest.json").read_bytes() == manifest


def test_fit_while_harvesting(folder, tmp_path, capsys):
    arguments = ["fit", "--text", str(folder / "text"), "--max-tokens", "1000", "--context", "64", "-R", "2"]
    written = ["--log", str(tmp_path / "logs"), "--checkpoint", str(tmp_path / "checkpoints")]
    assert main([*arguments, "--layer", "1", "-2", "-K", "4", "--out", str(tmp_path / "all"), *written]) == 0
    names = {"layer1-K4-R2", "layer-2-K4-R2"}
    assert {path.name for path in (tmp_path / "all").iterdir()} == names
    assert {path.stem for path in (tmp_path / "logs").iterdir()} == names
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == names
    assert len([line for line in capsys.readouterr().out.splitlines() if "held out by row); saved in" in line]) == 2

    assert main([*arguments, "--layer", "1", "-K", "4", "--out", str(tmp_path / "one")]) == 0
    assert f"mfa-kernels explore {tmp_path / 'one'} STORE" in capsys.readouterr().out
    alone, one_of_them = (MFA.from_pretrained(tmp_path / name) for name in ("one", "all/layer1-K4-R2"))
    assert all(torch.equal(a, b) for a, b in zip(alone.state_dict().values(), one_of_them.state_dict().values()))
    assert alone.extra == one_of_them.extra
    assert alone.extra["layer"] == "model.layers.1"
    assert MFA.from_pretrained(tmp_path / "all/layer-2-K4-R2").extra["layer"] == "model.layers.3"


@pytest.mark.parametrize("sharded", [[], ["--shard-components"]])
def test_fit_several_sizes_to_a_store(folder, tmp_path, sharded):
    arguments = ["fit", str(folder / "store"), "-R", "2", "--epochs", "1", *sharded]
    assert main([*arguments, "-K", "4", "8", "--out", str(tmp_path / "all")]) == 0
    assert main([*arguments, "-K", "8", "--out", str(tmp_path / "one")]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"K4-R2", "K8-R2"}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "all/K8-R2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# What is there already, and what is interrupted


def test_nothing_is_replaced_by_accident(folder, tmp_path, capsys, monkeypatch):
    """One rule for whatever writes; and it is asked before the work begins."""
    store, mfa = str(folder / "store"), str(folder / "mfa")
    commands = {
        "fit": (["fit", store, "-K", "4", "-R", "1", "--epochs", "1", "--out"], "config.json"),
        "encode": (["encode", mfa, store, "--out"], ""),
        "convert": (["convert", mfa], ""),
        "harvest": (
            ["harvest", "--text", str(folder / "text"), "--layer", "1", "--max-tokens", "50", "--out"], "manifest.json",
        ),
    }  # fmt: skip
    for name, (command, file) in commands.items():
        out = tmp_path / name / "out"
        assert main([*command, str(out)]) == 0, name
        before = (out / file).read_bytes()
        assert main([*command, str(out)]) == 1, name
        error = capsys.readouterr().err
        assert str(out) in error
        assert "already" in error
        assert (out / file).read_bytes() == before
        assert main([*command, str(out), "--overwrite"]) == 0, name
    monkeypatch.setattr("mfa_kernels.MFA.from_pretrained", lambda *_, **__: pytest.fail("work had begun"))
    assert main(["encode", mfa, store, "--out", str(tmp_path / "encode" / "out")]) == 1


@pytest.mark.parametrize("command", ["fit", "encode", "convert", "demo", "harvest"])
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(command, folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    store, mfa = str(folder / "store"), str(folder / "mfa")
    arguments = {
        "fit": [store, "-K", "4", "--out", out],
        "encode": [mfa, store, "--out", out],
        "convert": [mfa, out],
        "demo": ["--out", out],
        "harvest": ["--text", str(folder / "text"), "--layer", "1", "--out", out],
    }
    monkeypatch.setattr(
        import_module("mfa_kernels.fitting.stages"), "kmeans", lambda *_, **__: pytest.fail("work had begun")
    )
    monkeypatch.setattr("mfa_kernels.data.harvest.hidden_states", lambda *_, **__: pytest.fail("work had begun"))
    assert main([command, *arguments[command]]) == 1
    assert f"{out}" in (error := capsys.readouterr().err)
    assert "cannot be written" in error
    assert "Traceback" not in error


def test_an_interrupted_fit_says_so_and_keeps_the_best(folder, tmp_path, capsys, monkeypatch):
    evaluate, calls = Run._evaluate, []

    def interrupted(self, *arguments):
        evaluate(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    command = ["fit", str(folder / "store"), "-K", "4", "8", "-R", "1", "--epochs", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(Run, "_evaluate", interrupted)
    assert main(command) == 130
    out, error = capsys.readouterr()
    told = f"mfa-kernels fit: interrupted: what is saved is the best so far, {tmp_path / 'K8-R1'} missing\n"
    assert error == told, "once"
    assert f"saved in {tmp_path / 'K4-R1'}" in out
    assert MFA.from_pretrained(tmp_path / "K4-R1").n_components == 4
    assert not (tmp_path / "K8-R1").exists()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_ctrl_c_before_there_is_anything_to_keep(folder, tmp_path, capsys, monkeypatch, checkpoint):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("mfa_kernels.fitting.stages"), "kmeans", interrupted)
    more = ["--checkpoint", str(tmp_path / "checkpoint")] if checkpoint else []
    assert main(["fit", str(folder / "store"), "-K", "4", "--out", str(tmp_path / "out"), *more]) == 130
    assert capsys.readouterr().err.endswith("mfa-kernels fit: interrupted\n")
    assert not (tmp_path / "out").exists()


def test_a_fit_without_held_out_rows_is_told_of(folder, tmp_path, capsys):
    command = ["fit", str(folder / "store"), "-K", "4", "-R", "1", "--epochs", "1", "--held-out", "0"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"the last state, as nothing was held out; saved in {tmp_path}\nNext:\n")


def test_of_several_fits_each_is_saved_when_it_is_there(folder, tmp_path, capsys, monkeypatch):
    def interrupted(x, n_components, **options):
        if n_components == 8:
            raise KeyboardInterrupt
        return kmeans(x, n_components, **options)

    monkeypatch.setattr(import_module("mfa_kernels.fitting.stages"), "kmeans", interrupted)
    command = ["fit", str(folder / "store"), "-R", "1", "--epochs", "1", "--out", str(tmp_path), "-K", "4"]
    assert main([*command, "8"]) == 130
    assert f"the best so far, {tmp_path / 'K8-R1'} missing" in capsys.readouterr().err
    assert MFA.from_pretrained(tmp_path / "K4-R1").n_components == 4
    assert main([*command, "9999", "--overwrite"]) == 1
    assert "--components must be at most the 3,000 rows" in capsys.readouterr().err


def test_ctrl_c_that_is_taken_for_something_else(monkeypatch, capsys):
    """By code that catches what it should not, and goes on."""

    def report():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        return [("what", "state")]

    monkeypatch.setattr("mfa_kernels.commands.doctor.report", report)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["doctor"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "mfa-kernels doctor: interrupted\n"


@pytest.mark.parametrize("kept", ["regions.html", "evaluation.json", "fit.jsonl", "mfa/model.safetensors"])
def test_a_demonstration_replaces_nothing_of_anybody(tmp_path, capsys, kept):
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    (tmp_path / kept).write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert f"{tmp_path / kept} is there already" in capsys.readouterr().err
    assert (tmp_path / kept).read_text() == "mine"


def test_what_is_read_is_not_written_to(folder, capsys):
    shard = folder / "store" / "activations-00000.safetensors"
    before = shard.read_bytes()
    assert main(["encode", str(folder / "mfa"), str(folder / "store"), "--out", str(shard), "--overwrite"]) == 1
    assert "--out must not be in a folder that is read" in capsys.readouterr().err
    assert shard.read_bytes() == before


def test_a_log_is_not_replaced_by_accident(folder, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("mine")
    command = ["fit", str(folder / "store"), "-K", "4", "--out", str(tmp_path / "out"), "--log"]
    assert main([*command, str(tmp_path / "log.jsonl")]) == 1
    assert "--log: " in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "mine"


def test_steering_that_steered_nothing_is_told(folder, capsys):
    _, said = _steer(folder, capsys, "--positions", "generated", "--max-new-tokens", "1")
    assert re.fullmatch(r"mfa-kernels steer: none of the \d+ tokens was steered: no position or gate let one", said[-1])
    _, said = _steer(folder, capsys, "--positions", "prompt")
    assert not any("was steered" in line for line in said)


@pytest.mark.parametrize("given", [[], ["--model-dtype", "bfloat16"]])
def test_the_dtype_of_the_model_is_asked_for(folder, tmp_path, given):
    command = ["harvest", "--text", f"{folder}/text", "--layer", "1", "--max-tokens", "40", *given]
    assert main([*command, "--out", str(tmp_path / "store")]) == 0
    x = ActivationStore(tmp_path / "store").tensor()
    assert torch.equal(x, x.bfloat16().float()) == bool(given), "rows that the model made in that dtype"
