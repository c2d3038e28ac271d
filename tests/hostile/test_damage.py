"""Damaged, swapped and foreign files: refused by name, or the same result; never another one."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mfa_kernels import MFA
from mfa_kernels.data import ActivationStore
from tests.hostile.kinds import KINDS, outcome

FLIPS = 40


def check_all(kind, folder, changes, expected) -> dict[str, int]:
    """Reads the folder with each content of the file; how many were read, and refused."""
    path, counts, faults = kind.file(folder), {"read": 0, "refused": 0}, []
    for what, data in changes:
        path.write_bytes(data)
        how, result = outcome(lambda: kind.read(folder), folder)
        counts[how] = counts.get(how, 0) + 1
        if how in ("crashed", "unnamed"):
            faults.append(f"{what}: {how}: {result}")
        elif how == "read" and kind.sealed and result != expected:
            faults.append(f"{what}: another result")
    assert not faults, "\n".join(faults)
    return counts


def flips(data: bytes, count: int, seed: int = 0):
    """The data with one bit flipped, at random places: half of them near the ends, where headers are."""
    draw = random.Random(seed)
    for i in range(count):
        place = draw.randrange(len(data)) if i % 2 else draw.randrange(min(len(data), 2048)) * (1 if i % 4 else -1)
        place, bit = place % len(data), 1 << draw.randrange(8)
        changed = bytearray(data)
        changed[place] ^= bit
        yield f"bit {bit} of byte {place}", bytes(changed)


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bits(name, made, copied):
    kind, folder = KINDS[name], copied(name)
    expected, data = kind.read(folder), kind.file(folder).read_bytes()
    counts = check_all(kind, folder, flips(data, FLIPS), expected)
    if kind.sealed:
        assert counts["refused"] > 0.5 * FLIPS, counts


@pytest.mark.more
@pytest.mark.parametrize("name", KINDS)
def test_every_bit(name, made, copied):
    kind, folder = KINDS[name], copied(name)
    expected, data = kind.read(folder), kind.file(folder).read_bytes()
    check_all(kind, folder, flips(data, 2000, seed=1), expected)


def test_a_flipped_config_leaves_the_weights_as_they_are(copied):
    """It may be an edit by hand of what is not in the weights."""
    folder = copied("config")
    (_, expected), data = KINDS["config"].read(folder), (folder / "config.json").read_bytes()
    for what, changed in flips(data, 100):
        (folder / "config.json").write_bytes(changed)
        how, result = outcome(lambda: KINDS["config"].read(folder), folder)
        assert how == "refused" or result[1] == expected, (what, how, result)


@pytest.mark.parametrize("name", KINDS)
def test_truncated_longer_and_foreign(name, made, copied):
    kind, folder = KINDS[name], copied(name)
    expected, data = kind.read(folder), kind.file(folder).read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(9))
    sizes = sorted({0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 9, len(data) - 1} & set(range(len(data))))
    changes = [(f"{size} bytes", data[:size]) for size in sizes]
    changes += [
        ("twice", data + data),
        ("zeros", bytes(len(data))),
        ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(64)),
        ("an array", array.getvalue()),
        ("another model's weights", save({"wte.weight": torch.zeros(3, 4)})),
        ("no tensors", save({})),
        ("Latin-1", "naïve".encode("latin-1")),
        ("deep", b"[" * 200_000),
        ("deep objects", b'{"a":' * 200_000),
        ("null", b"null"),
        ("a number", b"1" * 5000),
        ("twice the same key", b'{"format": 1, "format": 1}'),
    ]
    counts = check_all(kind, folder, changes, expected)
    if kind.sealed:
        # JSON without its last line end, and an archive that something stands before, are read as they were.
        assert counts["read"] <= 1, counts


@pytest.mark.parametrize("name", KINDS)
def test_swapped_with_another_of_its_kind(name, made, copied):
    kind, folder, other = KINDS[name], copied(name), made(name, 1)
    expected, others = kind.read(folder), None
    if name.startswith(("config", "weights", "reference")):  # all of it is in the one file: the other mixture, whole
        others = kind.read(other)
    shutil.copy(kind.file(other), kind.file(folder))
    how, result = outcome(lambda: kind.read(folder), folder)
    assert how == "refused" or (how == "read" and (not kind.sealed or result in (expected, others))), (how, result)
    if kind.sealed and others is None:
        assert how == "refused"


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_a_pipe_and_nothing_in_its_place(name, made, copied):
    kind, folder = KINDS[name], copied(name)
    kind.read(folder)
    path = kind.file(folder)
    for make in (lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path)):
        path.unlink() if not path.is_dir() else path.rmdir()
        make()
        how, result = outcome(lambda: kind.read(folder), folder)
        assert how == "refused", result
        assert path.name in result
        if not os.path.lexists(path):
            path.touch()


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="not applicable: only root can become another user")
@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_may_not_be_read(name, made, copied, tmp_path):
    kind, folder = KINDS[name], copied(name)
    kind.read(folder)
    path = kind.file(folder)
    path.chmod(0)
    for part in (folder, *folder.rglob("*")):
        if part.is_dir():
            part.chmod(0o755)
    opened, part = [], tmp_path
    while part.stat().st_uid == 0 and not part.stat().st_mode & 0o001:
        opened.append((part, part.stat().st_mode))
        part.chmod(0o711)
        part = part.parent
    try:
        os.seteuid(65534)
        how, result = outcome(lambda: kind.read(folder), folder)
    finally:
        os.seteuid(0)
        for part, mode in opened:
            part.chmod(mode)
    assert how == "refused", result
    assert path.name in result


def header(text: str, length: int | None = None) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


CLAIMS = {
    "a header of exabytes": header("{}", (1 << 63) + 1),
    "a header of terabytes": header("{}", 1 << 40),
    "a tensor of terabytes": header(
        json.dumps({"means": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    ),
    "a shape that overflows": header(
        json.dumps({"means": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 0]}})
    ),
    "nothing of a huge shape": header(
        json.dumps({"means": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}})
    ),
    "an unknown dtype": header(json.dumps({"means": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}})) + b"x",
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize(
    "name", [name for name in KINDS if name == "shard" or name.startswith("weights") or "state" in name]
)
def test_claims_are_not_believed(name, claim, made, copied):
    kind, folder = KINDS[name], copied(name)
    expected = kind.read(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_all(kind, folder, [(claim, CLAIMS[claim])], expected)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def rewritten(path: Path, old: bytes, new: bytes) -> None:
    """Replaces bytes in what the archive says of its tensors; its checksums are right again."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


def test_claims_of_the_papers_files(copied):
    folder = copied("reference")
    path, expected = folder / "mfa.pt", KINDS["reference"].read(folder)
    data = path.read_bytes()
    huge = b"\x8a\x06" + (1 << 43).to_bytes(6, "little")  # of a pickle: the integer 2 ** 43
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for old, new in (
        (b"K\x12", huge),
        (b"K\x03K\x06\x86", b"K\x03" + huge + b"\x86"),
        (b"K\x03K\x06", huge + b"K\x06"),
    ):
        path.write_bytes(data)
        rewritten(path, old, new)
        assert path.read_bytes() != data
        how, result = outcome(lambda: KINDS["reference"].read(folder), folder)
        assert how == "refused" or result == expected, result
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mfa/data.pkl", bytes(1 << 28))
    with pytest.raises(ValueError, match=r"mfa\.pt.*claims 268435456 bytes"):
        MFA.from_reference_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10

    shutil.copy(folder / "mfa.pt", folder / "other.pt")
    state = {"mu": torch.zeros(1).expand(1 << 20, 1 << 20), "dir_raw": torch.zeros(1).expand(1 << 20, 1 << 20, 1)}
    state |= {"scale_rho": torch.zeros(1).expand(1 << 20, 1), "psi_rho": torch.zeros(1).expand(1 << 20)}
    torch.save({**state, "pi_logits": torch.zeros(1).expand(1 << 20)}, path)
    with pytest.raises(ValueError, match=r"mfa\.pt: its tensors claim"):
        MFA.from_reference_checkpoint(path, eps_floor=1e-5)


def test_the_papers_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        KINDS["reference"].make(tmp_path / "without", 0)
    finally:
        torch.serialization.set_crc32_options(True)
    KINDS["reference"].make(tmp_path / "with", 0)
    assert KINDS["reference"].read(tmp_path / "without") == KINDS["reference"].read(tmp_path / "with")


def test_a_shard_is_verified_once_and_by_whoever_reads_it_first(copied, monkeypatch):
    from mfa_kernels.common import checksum

    folder, seen = copied("shard"), []
    whole = checksum.of_file
    monkeypatch.setattr(checksum, "of_file", lambda path: seen.append(path.name) or whole(path))
    store = ActivationStore(folder)
    assert not seen
    for _ in range(3):
        store.rows(torch.tensor([0]))
    assert seen == ["activations-00000.safetensors"]
    store.tensor()
    store.token(20)
    assert sorted(seen) == sorted({shard["file"] for shard in store.shards})
    copy = ActivationStore.__new__(ActivationStore)
    copy.__dict__.update(store.__getstate__())  # as another process unpickles it
    copy.tensor()
    assert len(seen) == len(store.shards)
    path = folder / "activations-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    copy._open.clear()
    with pytest.raises(ValueError, match=r"activations-00000\.safetensors: corrupt"):
        copy.rows(torch.tensor([0]))
