"""Every key of every file of JSON, with every hostile value: no crash, and whatever is refused is refused by name.

Files are given as earlier versions wrote them, without checksums, which would refuse all of these at once.
"""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mfa_kernels.common.checksum import KEY, of_file
from tests.hostile.kinds import KINDS, outcome

DEEP: Any = 1
for _ in range(100):
    DEEP = [DEEP]
ABSENT = object()
HOSTILE: dict[str, Any] = {
    "absent": ABSENT, "null": None, "true": True, "0": 0, "-1": -1, "huge": 1 << 62, "beyond int64": 10**30,
    "thousands of digits": 10**4000, "a fraction": 0.5, "tiny": 5e-324, "large": 1e308, "infinite": float("inf"),
    "NaN": float("nan"), "empty": "", "text": "a", "long": "x" * 100_000, "NUL": "\0", "half a pair": "\ud800",
    "a path": "../../etc/passwd", "a list": [], "numbers": [1, 2], "an object": {}, "objects": [{}], "deep": DEEP,
    "a float's text": "1e999",
}  # fmt: skip


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in JSON; of a list, to those of its first and last."""
    if at:
        yield at
    keys = (
        content
        if isinstance(content, dict)
        else sorted({0, len(content) - 1})
        if content and isinstance(content, list)
        else ()
    )
    for key in keys:
        yield from places(content[key], (*at, key))


def changed(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    content = copy.deepcopy(content)
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    if value is ABSENT:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return content


def fuzz(content: Any, write: Callable[[Any], None], use: Callable[[], Any], folder: Path, most: int) -> Counter[str]:
    """Counts what came of each change; raises where one crashed."""
    content.pop(KEY, None) if isinstance(content, dict) else None
    cases = [(at, name) for at in places(content) for name in HOSTILE]
    if len(cases) > most:
        cases = random.Random(0).sample(cases, most)
    counts: Counter[str] = Counter()
    faults = []
    for at, name in cases:
        write(changed(content, at, HOSTILE[name]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how, result = outcome(use, folder)
        counts[how] += 1
        if how in ("crashed", "unnamed"):
            faults.append(f"{at} = {name}: {how}: {result[:300]}")
    assert not faults, "\n".join(faults)
    return counts


JSON = [
    "manifest",
    "sgd checkpoint",
    "em checkpoint",
    "online checkpoint",
    "sharded checkpoint",
    "config",
    "tuned",
    "texts",
]


@pytest.mark.parametrize("most", [100, pytest.param(100_000, marks=pytest.mark.more, id="all")])
@pytest.mark.parametrize("name", JSON)
def test_json(name, most, copied):
    kind, folder = KINDS[name], copied(name)
    kind.use(folder)
    path = kind.file(folder)
    if name in ("manifest", "config", "tuned", "texts"):
        most *= 8  # they are quick
    content = json.loads(path.read_text())
    counts = fuzz(content, lambda value: path.write_text(json.dumps(value)), lambda: kind.use(folder), folder, most)
    assert counts["refused"] > 0.2 * counts.total(), counts


@pytest.mark.parametrize("place", ["config", "weights"])
def test_the_report_of_a_fit(place, copied):
    """What no value that `json` writes can be; and a curve that is endless."""
    folder = copied(place)
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    whole = json.dumps(config["fit"])
    values = {
        "deep": "[" * 10**5 + "]" * 10**5, "deep objects": '{"a":' * 10**5 + "1" + "}" * 10**5,
        "a deep run": whole.replace('"a/model"', "[" * 10**5 + "]" * 10**5), "NaN": '{"held_out_nll": NaN}',
        "overflow": '{"held_out_nll": 1e999}', "twice": '{"method": "em", "method": "sgd"}', "cut off": "{",
        "long": '{"history": [' + ", ".join(["3"] * 10**6) + "]}", "digits": '{"best_step": ' + "1" * 10**4 + "}",
    }  # fmt: skip
    for name, value in values.items():
        text = json.dumps({**config, "fit": "HERE"}).replace('"HERE"', value)
        if place == "config":
            (folder / "config.json").write_text(text)
        else:
            (folder / "config.json").write_text(json.dumps({**config, "saved_as": "another save"}))
            save_file(tensors, folder / "model.safetensors", {"format": "pt", "config": text})
        how, result = outcome(lambda: KINDS["config"].use(folder), folder)
        assert how == "refused", (name, how, result)
        assert KINDS[place].file(folder).name in result
        assert len(result) < 2000, name


def test_a_config_of_gigabytes(copied):
    folder = copied("config")
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 32)
    how, result = outcome(lambda: KINDS["config"].use(folder), folder)
    assert how == "refused", result


def test_the_config_in_the_weights(copied):
    folder = copied("weights")
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    (folder / "config.json").write_text(json.dumps({**config, "saved_as": "another save"}))

    def write(value: Any) -> None:
        text = json.dumps(value)
        save_file(tensors, path, {"format": "pt", "config": text})

    fuzz(config, write, lambda: KINDS["weights"].use(folder), folder, 100_000)


@pytest.mark.parametrize("noise_floor", ["", "nan", "inf", "-1", "1e999", "abc", "1" * 5000, "\0"])
def test_the_noise_floor_in_old_weights(noise_floor, copied):
    folder = copied("weights")
    path = folder / "model.safetensors"
    save_file({name: t.clone() for name, t in load_file(path).items()}, path, {"noise_floor": noise_floor})
    how, result = outcome(lambda: KINDS["weights"].use(folder), folder)
    assert how == "refused", result


def test_what_the_papers_files_say(copied):
    folder = copied("reference")
    path = folder / "mfa.pt"
    content = torch.load(path, weights_only=True)
    for key in ("cls", "rank"):
        content["meta"].setdefault(key, {"cls": "MFA", "rank": 2}[key])

    def write(meta: Any) -> None:
        torch.save({**content, **meta}, path)

    counts = fuzz({"meta": content["meta"]}, write, lambda: KINDS["reference"].use(folder), folder, 400)
    assert counts["refused"] > 0.2 * counts.total(), counts
    state = content["state_dict"]
    for name in [name for name in state if not name.startswith("_rot_T")]:
        for value in (
            None, 3, "text", [1.0], torch.zeros(()), torch.zeros(0), state[name].long(), state[name].to_sparse(),
            state[name].to("meta"), torch.full_like(state[name], torch.nan), state[name].to(torch.float8_e5m2),
            state[name].bool(), state[name].to(torch.complex64), state[name][:0], state[name].unsqueeze(0),
        ):  # fmt: skip
            torch.save({**content, "state_dict": {**state, name: value}}, path)
            how, result = outcome(lambda: KINDS["reference"].use(folder), folder)
            assert how == "refused" or (how == "read" and name.startswith("_rot")), (name, value, result)


@pytest.mark.parametrize("name", ["activations", "document", "position", "tokens", "lengths"])
def test_tensors_of_a_shard(name, copied):
    """Of a store whose checksums are right, or are not asked for."""
    folder = copied("shard")
    path = folder / "activations-00000.safetensors"
    whole = {key: tensor.clone() for key, tensor in load_file(path).items()}
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[KEY]
    own = whole[name]
    counts: Counter[str] = Counter()
    for value in (
        None, own.double(), own.long(), own[:-1].clone(), own.unsqueeze(0), own + 1, own - 1, own * 0 - 1,
        own * 0 + 2**31 - 1,
        own.flip(0), torch.zeros(()), torch.zeros(0, dtype=own.dtype),
    ):  # fmt: skip
        tensors = {**whole, name: value} if value is not None else {k: t for k, t in whole.items() if k != name}
        save_file(tensors, path, {"sources": json.dumps(["a", "b"])})
        manifest["shards"][0] |= {"bytes": path.stat().st_size, "sha256": of_file(path)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        how, result = outcome(lambda: KINDS["shard"].use(folder), folder)
        assert how in ("read", "refused"), (value, result)
        counts[how] += 1
    assert counts["refused"] >= 5, counts


@pytest.mark.parametrize("most", [60, pytest.param(10_000, marks=pytest.mark.more, id="all")])
@pytest.mark.parametrize("name", ["sgd", "em", "online", "sharded"])
def test_tensors_of_a_state(name, most, copied):
    """Of a checkpoint without checksums: tensors of other shapes and dtypes, and none."""
    kind, folder = KINDS[f"{name} state"], copied(f"{name} state")
    path = kind.file(folder)
    whole = {key: tensor.clone() for key, tensor in load_file(path).items()}
    content = json.loads((folder / "checkpoint.json").read_text())
    del content[KEY]
    told = content["ranks"][0] if "ranks" in content else content
    del told["sha256"]
    faults, counts = [], Counter()
    others = {
        "no tensor": lambda own: None,
        "three": lambda own: own.unsqueeze(0).repeat(3, *[1] * own.dim()),
        "nothing": lambda own: own.flatten()[:0].clone(),
        "bool": lambda own: own.bool(),
    }
    cases = [(key, other) for key in whole for other in others]
    for key, other in random.Random(0).sample(cases, min(most, len(cases))):
        tensors = {**whole, key: others[other](whole[key])}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        told["bytes"] = path.stat().st_size
        (folder / "checkpoint.json").write_text(json.dumps(content))
        how, result = outcome(lambda: kind.use(folder), folder)
        counts[how] += 1
        if how in ("crashed", "unnamed"):
            faults.append(f"{key}, {other}: {how}: {result[:200]}")
    assert not faults, "\n".join(faults)
    assert counts["refused"] > 0.5 * counts.total(), counts
