"""Launch configurations: a pure, total function of the shape's bucket and the chip; JSON files that win over it."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from mfa_kernels.ops.common import configs
from mfa_kernels.ops.common.configs import AllLogits, Gradient, Nearest, Pairs, Scan

KINDS = tuple(configs.KINDS.values())
SIZES = (0, 1, 2, 15, 16, 17, 100, 128, 1000, 16384, 32768, 10**9)
# CUDA C++ programming guide, "technical specifications per compute capability": KB of shared memory per block.
SHARED_LIMIT = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders for the shipped and for the user's files, and a GPU named "Some GPU 80GB" to look them up for."""
    shipped, user = tmp_path / "shipped", tmp_path / "user"
    shipped.mkdir()
    user.mkdir()
    monkeypatch.setattr(configs, "FOLDER", shipped)
    monkeypatch.setenv("MFA_KERNELS_CONFIGS", str(user))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    configs.tuned_entries.cache_clear()
    yield SimpleNamespace(shipped=shipped, user=user, like=SimpleNamespace(device=torch.device("cuda", 0)))
    configs.tuned_entries.cache_clear()


def entry(config) -> dict:
    return dataclasses.asdict(config)


def write(folder, text) -> None:
    (folder / configs.file_name("Some GPU 80GB")).write_text(text if isinstance(text, str) else json.dumps(text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", SHARED_LIMIT)
def test_a_configuration_for_every_size_and_chip(kind, architecture):
    for tokens in SIZES:
        for components in SIZES:
            config = configs.default(kind, architecture, tokens, components)
            assert type(config) is kind
            assert config == configs.default(kind, architecture, tokens, components)
            for name, value in entry(config).items():
                if name in ("tokens", "components", "features", "pairs", "warps"):
                    assert value > 0, name
                    assert value & (value - 1) == 0, f"{name} = {value}: tiles and warps are powers of two"
            assert config.warps <= 16
            assert config.stages >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_frozen(kind):
    config = configs.default(kind, 90, 16384, 8192)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.warps = 1
    assert hash(config) == hash(kind(**entry(config)))


@pytest.mark.parametrize("size", range(1, 70))
def test_bucket(size):
    assert size <= configs.bucket(size) < 2 * size
    assert configs.bucket(configs.bucket(size)) == configs.bucket(size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_one_configuration_per_bucket_and_no_smaller_tiles_for_larger_problems(kind, architecture):
    previous = 0
    for exponent in range(15):
        top = 1 << exponent
        sizes = (top // 2 + 1, top)
        found = {configs.default(kind, architecture, n, k) for n in sizes for k in sizes}
        assert len(found) == 1
        config = entry(found.pop())
        tile = config.get("tokens", config.get("pairs")) * config.get("components", 1)
        assert tile >= previous
        previous = tile


@pytest.mark.parametrize("architecture", [a for a in SHARED_LIMIT if a >= 80])
def test_the_scan_fits_shared_memory(architecture):
    """Per stage a tile of fp16 tokens and `width` tiles of rows; what is compiled is checked by test_aot.py."""
    tile = pytest.importorskip("mfa_kernels.ops.scan.triton_scan", reason="no Triton on this machine").TILE
    for n in SIZES:
        for k in SIZES:
            c = configs.default(Scan, architecture, n, k)
            bytes_in_flight = c.stages * (c.tokens + c.width * tile) * c.features * 2
            assert bytes_in_flight <= SHARED_LIMIT[architecture] << 10


@pytest.mark.parametrize("architecture", [a for a in SHARED_LIMIT if a >= 80])
def test_nearest_fits_shared_memory(architecture):
    c = configs.default(Nearest, architecture, 16384, 8192)
    assert c.stages * (c.tokens + c.centroids) * c.features * 2 <= SHARED_LIMIT[architecture] << 10


def test_an_unlisted_chip_takes_the_nearest_older_entry():
    for kind in KINDS:
        of = {a: configs.default(kind, a, 16384, 8192) for a in (0, 75, 80, 89, 90, 100, 103)}
        assert of[0] == of[75] == of[80] == of[89]
        assert of[103] == of[100]


@pytest.mark.parametrize("tokens", [1, 16, 40, 100])
def test_a_tile_is_not_larger_than_few_tokens_need(tokens):
    assert configs.default(Scan, 90, tokens, 8192).tokens <= max(16, 2 * tokens)


def test_tiles_of_64_tokens_keep_their_warps_where_fewer_would_spill():
    assert configs.default(configs.Scan, 100, 64, 8192).warps == 8
    assert configs.default(configs.Scan, 90, 64, 8192).warps == 4
    assert configs.default(configs.Scan, 100, 32, 8192).warps == 4


def test_override_is_by_kind_nests_and_ends():
    like, small, other = torch.empty(0), Pairs(16, 16, 4, 1), Pairs(32, 16, 4, 1)
    scan = configs.configured(Scan, like, 64, 64)
    before = configs.configured(Pairs, like, 64, 64)
    with configs.override(small):
        assert configs.configured(Pairs, like, 64, 64) is small
        assert configs.configured(Scan, like, 64, 64) == scan
        with pytest.raises(KeyError), configs.override(other):  # noqa: PT012
            assert configs.configured(Pairs, like, 64, 64) is other
            raise KeyError
        assert configs.configured(Pairs, like, 64, 64) is small
    assert configs.configured(Pairs, like, 64, 64) == before


def test_without_files_the_default_of_the_chip(folders):
    assert configs.configured(Scan, folders.like, 16384, 8192) == configs.default(Scan, 90, 16384, 8192)


def test_tuned_files_by_bucket_and_the_users_own_wins(folders):
    key = configs.key(Pairs, 16000, 8000)
    assert key == configs.key(Pairs, 16384, 8192)
    shipped, user = Pairs(32, 64, 4, 2), Pairs(64, 64, 8, 2)
    write(folders.shipped, {key: entry(shipped)})
    assert configs.configured(Pairs, folders.like, 16000, 8000) == shipped
    assert configs.configured(Pairs, folders.like, 17000, 8000) == configs.default(Pairs, 90, 17000, 8000)
    assert configs.configured(Gradient, folders.like, 16000, 8000) == configs.default(Gradient, 90, 16000, 8000)
    write(folders.user, {key: entry(user)})
    configs.tuned_entries.cache_clear()
    assert configs.configured(Pairs, folders.like, 16000, 8000) == user
    with configs.override(shipped):
        assert configs.configured(Pairs, folders.like, 16000, 8000) is shipped


def test_files_written_under_older_names_of_classes_are_read(folders):
    """Files name kinds; the class of "dense" was called Dense."""
    chosen = AllLogits(4, 8, 64, 4, 2)
    write(folders.user, {"dense/64/64": entry(chosen)})
    assert configs.configured(AllLogits, folders.like, 64, 64) == chosen
    assert list(configs.KINDS) == ["scan", "pairs", "gradient", "dense", "statistics", "nearest"]


def test_files_are_read_once(folders):
    configs.configured(Pairs, folders.like, 64, 64)
    write(folders.user, {configs.key(Pairs, 64, 64): entry(Pairs(64, 64, 8, 2))})
    assert configs.configured(Pairs, folders.like, 64, 64) == configs.default(Pairs, 90, 64, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Some_GPU_80GB.json"),
        ("[1, 2]", "Some_GPU_80GB.json"),
        ('{"pairs/64/64": {"pairs": 16, "warp": 4}}', "warp"),
        ('{"pairs/64/64": {"pairs": 16}}', "features"),
        ('{"pairs/64/64": {"pairs": "16", "features": 64, "warps": 4, "stages": 2}}', "pairs"),
        ('{"pairs/64/64": 3}', "pairs/64/64"),
    ],
)
def test_a_bad_file_is_named(folders, text, message):
    write(folders.user, text)
    with pytest.raises(ValueError, match="Some_GPU_80GB.json") as error:
        configs.configured(Pairs, folders.like, 64, 64)
    assert message in str(error.value)


def test_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("MFA_KERNELS_CONFIGS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert configs.tuned_folder() == tmp_path / "mfa_kernels"
    monkeypatch.setenv("MFA_KERNELS_CONFIGS", str(tmp_path / "mine"))
    assert configs.tuned_folder() == tmp_path / "mine"


def test_file_name_is_safe():
    assert configs.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"
    assert "/" not in configs.file_name("a/../b")


def test_shipped_files_can_be_launched():
    """Every file in the package parses, is named like a GPU, and holds configurations that can be made."""
    for path in configs.FOLDER.glob("*.json"):
        for key, fields in json.loads(path.read_text()).items():
            kind, tokens, components = key.split("/")
            assert configs.bucket(int(tokens)) == int(tokens)
            assert configs.bucket(int(components)) == int(components)
            assert entry(configs.KINDS[kind](**fields)) == fields
