"""Checksums: what they depend on, and that pieces, threads and streams make no difference."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mfa_kernels import MFA
from mfa_kernels.common import checksum
from mfa_kernels.mixture.sharded import ShardedMFA
from tests.helpers.mixtures import random_mfa
from tests.helpers.threads import threads


def test_of_a_file(tmp_path: Path) -> None:
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 5):
        data = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
        (tmp_path / "file").write_bytes(data)
        assert checksum.of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_of_json() -> None:
    content = {"a": [1, 2.5, None], "b": {"x": float("nan")}}
    again = json.loads(json.dumps(content, indent=4))
    assert checksum.of_json(content) == checksum.of_json(dict(reversed(again.items())))
    assert checksum.of_json(content) == checksum.of_json({**content, checksum.KEY: "anything"})
    assert checksum.of_json(content) != checksum.of_json({**content, "a": [1, 2.5, 0]})
    sealed = checksum.sealed({"a": (1, 2), "b": {3: 4}})
    checksum.check_json(json.loads(json.dumps(sealed)), Path("file"))
    checksum.check_json({"a": 1}, Path("file"))  # as of an earlier version
    with pytest.raises(
        ValueError, match=r"file is corrupt.* checksum [0-9a-f]{16}\.\.\., its 'checksum' says [0-9a-f]{16}\.\.\."
    ):
        checksum.check_json({**sealed, "a": [1, 3]}, Path("file"))


TENSORS = {
    "a": torch.arange(100.0), "b": torch.arange(24).view(4, 6), "bf16": torch.arange(7).bfloat16(),
    "empty": torch.empty(0, 3), "scalar": torch.tensor(3.5),
}  # fmt: skip


def test_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "PIECE", 32)
    whole = checksum.of_tensors(TENSORS, {"x": "y"})
    for count in (1, 3):
        with threads(count):
            assert checksum.of_tensors(dict(reversed(TENSORS.items())), {"x": "y", checksum.KEY: "any"}) == whole
    assert checksum.of_tensors({**TENSORS, "b": TENSORS["b"].t().contiguous().t()}, {"x": "y"}) == whole
    others = [
        {**TENSORS, "b": TENSORS["b"].view(6, 4)}, {**TENSORS, "b": TENSORS["b"].double()},
        {**TENSORS, "c": TENSORS["a"]},
        {**TENSORS, "a": TENSORS["a"] + 1}, {**TENSORS, "empty": torch.empty(3, 0)},
        {**TENSORS, "a": TENSORS["bf16"], "bf16": TENSORS["a"]},
    ]  # fmt: skip
    assert len({whole, *(checksum.of_tensors(other, {"x": "y"}) for other in others)}) == 7
    assert checksum.of_tensors(TENSORS, {"x": "z"}) != whole
    for size in (0, 1, 31, 32, 33, 64, 100):
        data = bytes(range(size))
        written = checksum.Pieces()
        for start in range(0, size, 7):
            written.add(data[start : start + 7])
        tensor = torch.tensor(list(data), dtype=torch.uint8)
        assert written.digests() == checksum.digests(checksum.pieces({"x": tensor}))


@pytest.mark.parametrize("noise", ["shared", "per_component"])
def test_spread_mixtures_write_the_same(noise: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "PIECE", 100)
    mfa = random_mfa(noise=noise)
    mfa.save_pretrained(tmp_path / "one")
    ShardedMFA(mfa).save_pretrained(tmp_path / "spread")
    found = []
    for name in ("one", "spread"):
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as file:
            found.append(file.metadata())
    assert found[0] == found[1]
    assert len(found[0][checksum.KEY]) == 64
    assert torch.equal(MFA.from_pretrained(tmp_path / "spread").loadings, mfa.loadings)
    assert torch.equal(ShardedMFA.from_pretrained(tmp_path / "one").local.loadings, mfa.loadings)
