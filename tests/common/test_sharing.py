from __future__ import annotations

import os

import pytest

from mfa_kernels.common import sharing
from mfa_kernels.common.sharing import local_name, local_paths, shareable

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("gpt2", "gpt2"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("LlamaForCausalLM", "LlamaForCausalLM"),
        ("tiny_lm", "tiny_lm"),
        ("/usr/lib/python3/site-packages/mfa_kernels/data/tiny_lm", "tiny_lm"),
        (r"C:\Python\site-packages\mfa_kernels\data\tiny_lm", "tiny_lm"),
        (f"/home/anna/.cache/huggingface/hub/models--google--gemma-2-2b/snapshots/{HASH}", "google/gemma-2-2b"),
        (f"/home/anna/.cache/huggingface/hub/models--gpt2/snapshots/{HASH}/", "gpt2"),
        (rf"D:\anna\hub\models--google--gemma-2-2b\snapshots\{HASH}", "google/gemma-2-2b"),
        ("/home/anna/models/secret-project", "local:secret-project"),
        ("/home/anna/models/secret-project/", "local:secret-project"),
        ("/home/anna/models/secret-project/.", "local:secret-project"),
        ("/home/anna/models--a--b/other", "local:other"),
        ("~/models/secret-project", "local:secret-project"),
        ("./anna/secret-project", "local:secret-project"),
        ("../anna/secret-project", "local:secret-project"),
        ("anna/models/secret-project", "local:secret-project"),
        (r"C:\Users\anna\secret-project", "local:secret-project"),
        ("C:/Users/anna/secret-project", "local:secret-project"),
        (r"\\server\anna\secret-project", "local:secret-project"),
        (r"anna\secret-project", "local:secret-project"),
        ("file:///home/anna/secret%20project", "local:secret project"),
        ("FILE:///home/anna/secret-project", "local:secret-project"),
        ("https://somewhere/anna/secret-project", "local:secret-project"),
        ("s3://anna/secret-project", "local:secret-project"),
        ("local:secret-project", "local:secret-project"),
        ("local:/home/anna/secret-project", "local:secret-project"),
        ("/", "local:model"),
        ("", "local:model"),
    ],
)
def test_names(said, expected):
    assert shareable(said) == expected
    assert shareable(expected) == expected
    assert "anna" not in shareable(said)
    assert local_name(shareable(said)) == (expected[len("local:") :] if expected.startswith("local:") else None)


def test_a_folder_here_goes_before_a_repository_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (shareable("models/lm"), shareable("lm")) == ("models/lm", "lm")
    os.makedirs("models/lm")
    os.makedirs("lm")
    assert (shareable("models/lm"), shareable("lm")) == ("local:lm", "local:lm")
    assert shareable("tiny_lm") == sharing.BUNDLED


def test_paths_in_json(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b").mkdir()
    here = [f"{tmp_path}/a b", f"{tmp_path}/a b/", "~/a b", f"file://{tmp_path}/a%20b", f"//{tmp_path}"]
    found = list(local_paths({"one": here, "two": {"three": (here[0], 4, None)}}, "extra"))
    assert found == [
        *((f"extra['one'][{i}]", path) for i, path in enumerate(here)), ("extra['two']['three'][0]", here[0]),
    ]  # fmt: skip
    others = [
        "/",
        "a b",
        "",
        "/nowhere/at/all",
        "x" * 10**5,
        "/" + "x" * 10**5,
        "/\0",
        "~nobody-at-all/x",
        "\ud800",
        3.5,
    ]
    assert not list(local_paths(others, "extra"))
