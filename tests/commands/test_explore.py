"""`mfa-kernels explore` and `report`: what they load, write and refuse."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mfa_kernels import MFA
from mfa_kernels.commands.cli import main
from mfa_kernels.data import ActivationStore
from mfa_kernels.data.harvest import harvest
from mfa_kernels.data.language_model import load_language_model, origin
from mfa_kernels.explorer import Explorer, server
from mfa_kernels.interpret import topics
from mfa_kernels.interpret.labels import Label, write_labels

TEXTS = [(f"{genre}/{i}", f"{genre} {i} " * 12) for genre in ("import os", "The end") for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the small model, and a mixture of it."""
    import torch

    folder = tmp_path_factory.mktemp("explore")
    model, tokenizer = load_language_model()
    store = harvest(model, tokenizer, TEXTS, 2, folder / "store", seed=None)
    x = store.tensor()
    means = x[torch.linspace(0, len(x) - 1, 6).long()]
    loadings = 0.1 * torch.randn(6, x.shape[1], 2, generator=torch.Generator().manual_seed(0))
    mfa = MFA.from_parameters(means, loadings, x.var(0) + 1e-3, torch.ones(6))
    mfa.extra = {**origin(model, tokenizer), "layer": "model.layers.2"}
    mfa.save_pretrained(folder / "mfa")
    return folder


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Explorer, bool]]:
    """What would be served, and whether a browser would open."""
    found: list[tuple[Explorer, bool]] = []
    monkeypatch.setattr(server, "serve", lambda made, listening, browser: found.append((made, browser)))
    return found


def _explore(folder: Path, *more: str) -> int:
    return main(["explore", str(folder / "mfa"), str(folder / "store"), "--port", "0", *more])


def test_the_model_is_that_of_the_mixture(folder: Path, served: Any, capsys: Any) -> None:
    assert _explore(folder) == 0
    ((explorer, browser),) = served
    assert browser is True
    assert explorer.about["can_steer"] is True
    assert explorer.about["layer"] == "model.layers.2"
    assert "tiny_lm" in capsys.readouterr().err


def test_the_tokenizer_alone(folder: Path, served: Any) -> None:
    assert _explore(folder, "--no-model", "--no-browser") == 0
    ((explorer, browser),) = served
    assert browser is False
    assert explorer.model is None
    assert explorer.about["can_read"] is False
    assert explorer.catalog.line(0)["tokens"]


def test_labels_beside_the_mixture_or_in_a_file(folder: Path, served: Any, tmp_path: Path) -> None:
    write_labels(tmp_path / "own.json", {2: Label("mine")})
    assert _explore(folder, "--no-model", "--labels", str(tmp_path / "own.json")) == 0
    write_labels(folder / "mfa" / "labels.json", {3: Label("beside")})
    try:
        assert _explore(folder, "--no-model") == 0
    finally:
        (folder / "mfa" / "labels.json").unlink()
    assert [explorer.labels for explorer, _ in served] == [{2: Label("mine")}, {3: Label("beside")}]


def test_demo_looks_at_what_the_demonstration_left(
    folder: Path, served: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explore", "--demo"]) == 1
    assert "run `mfa-kernels demo` first" in capsys.readouterr().err
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mfa").symlink_to(folder / "mfa")
    (tmp_path / "demo" / "activations").symlink_to(folder / "store")
    assert main(["explore", "--demo", "--port", "0", "--no-model"]) == 0
    assert len(served) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "name a mixture and a store, or give --demo"),
        (["{}/mfa"], 2, "name a mixture and a store"),
        (["{}/mfa", "{}/store", "--demo"], 1, "--demo looks at the folder demo"),
        (["{}/none", "{}/store", "--port", "0"], 1, "is no folder here"),
        (["{}/mfa", "{}/store", "--port", "0", "--labels", "{}/none.json"], 1, "none.json"),
        (["{}/mfa", "{}/store", "--port", "0", "--layer", "99"], 1, "layer must be in"),
    ],
)
def test_what_is_wrong_is_told(
    folder: Path, served: Any, capsys: Any, arguments: list[str], status: int, says: str
) -> None:
    assert main(["explore", *(argument.format(folder) for argument in arguments)]) == status
    assert says in capsys.readouterr().err
    assert served == []


def test_a_port_that_is_taken_is_told_before_the_work(folder: Path, served: Any, capsys: Any) -> None:
    with server.bound(0) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", str(folder / "mfa"), str(folder / "store"), "--port", str(port)]) == 1
    assert f"--port: {port} cannot be listened on" in capsys.readouterr().err


def test_without_the_packages_it_says_what_to_install(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mfa_kernels.explorer.server", raising=False)
    monkeypatch.delattr("mfa_kernels.explorer.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert _explore(folder) == 1
    assert "pip install mfa_kernels[explore]" in capsys.readouterr().err


def test_it_serves_until_ctrl_c(folder: Path) -> None:
    command = [sys.executable, "-m", "mfa_kernels", "explore", str(folder / "mfa"), str(folder / "store")]
    with subprocess.Popen(
        [*command, "--port", "0", "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a background job would ignore
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(address, timeout=60) as page:
            assert b"<title>Explorer of regions</title>" in page.read()
        root = address.split("?")[0]
        with opener.open(f"{root}api/about", timeout=60) as about:
            assert json.loads(about.read())["n_components"] == 6
        body = json.dumps({"prompt": "def f", "new_tokens": 500}).encode()
        with opener.open(urllib.request.Request(f"{root}api/steer", body), timeout=60) as text:
            text.readline()  # a text is being written
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        assert "Traceback" not in process.communicate()[1]


def test_report_writes_a_page_and_tables(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = {"--out": tmp_path / "page.html", "--json": tmp_path / "all.json", "--csv": tmp_path / "all.csv"}
    options = [str(part) for pair in out.items() for part in pair]
    command = ["report", str(folder / "mfa"), str(folder / "store"), "--no-model", "-k", "2", "4", *options]
    assert main(command) == 0
    page = out["--out"].read_text()
    assert 'id="region-2"' in page
    assert 'id="region-4"' in page
    assert 'id="region-0"' not in page
    content = json.loads(out["--json"].read_text())
    assert content["about"]["n_components"] == 6
    with open(out["--csv"], newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    printed = capsys.readouterr().out
    assert all(f"written: {path}" in printed for path in out.values())
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_report_shows_labels(folder: Path, tmp_path: Path) -> None:
    write_labels(tmp_path / "own.json", {2: Label("<b>mine</b>", "Because.")})
    command = ["report", str(folder / "mfa"), str(folder / "store"), "--no-model", "-k", "2"]
    assert main([*command, "--labels", str(tmp_path / "own.json"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h2>&lt;b&gt;mine&lt;/b&gt; (region 2:" in page
    assert "Because." in page


def test_report_shows_topics_first(folder: Path, tmp_path: Path) -> None:
    command = ["report", str(folder / "mfa"), str(folder / "store"), "--no-model", "--regions", "1"]
    assert main([*command, "--out", str(tmp_path / "page.html")]) == 0
    mfa, store = MFA.from_pretrained(folder / "mfa"), ActivationStore(folder / "store")
    (topic,) = topics(mfa, store, load_language_model()[1], 1)
    shown = re.findall(r'<section id="region-(\d+)"', (tmp_path / "page.html").read_text())
    assert shown == [str(topic.component)]


def test_report_wants_something_to_write(folder: Path, capsys: Any) -> None:
    assert main(["report", str(folder / "mfa"), str(folder / "store")]) == 2
    assert "say what to write" in capsys.readouterr().err


def test_report_replaces_nothing_else(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    command = ["report", str(folder / "mfa"), str(folder / "store"), "--overwrite", "--csv", str(tmp_path / "mine.csv")]
    assert main(command) == 1
    assert "is not replaced" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"
