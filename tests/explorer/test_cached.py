"""What is kept beside a store."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.data import ActivationStore, ActivationStoreWriter
from mfa_kernels.explorer import cached
from mfa_kernels.explorer.cached import Cache, cached_assignments
from mfa_kernels.interpret.contexts import assignments


@pytest.fixture
def cache(mfa: MFA, store: ActivationStore, tmp_path, monkeypatch) -> Cache:
    made = Cache(mfa, store)
    made.folder = tmp_path / "explored"
    return made


def test_a_second_look_reads_what_the_first_wrote(cache: Cache, mfa: MFA, store: ActivationStore, monkeypatch) -> None:
    first = cached_assignments(cache, mfa, store)
    expected = assignments(mfa, store, latents=True)
    monkeypatch.setattr(cached, "assignments", None)  # would raise
    second = cached_assignments(cache, mfa, store)
    for found in (first, second):
        assert torch.equal(found.components, expected.components)
        assert torch.equal(found.responsibilities, expected.responsibilities)
        assert torch.equal(found.distances, expected.distances)
        assert torch.equal(found.latents, expected.latents)


def test_latents_that_are_too_many_are_left_out(cache: Cache, mfa: MFA, store: ActivationStore, monkeypatch) -> None:
    monkeypatch.setattr(cached, "_MOST_LATENTS", 10)
    assert cached_assignments(cache, mfa, store).latents is None


def test_another_mixture_or_store_has_another_key(mfa: MFA, store: ActivationStore, tmp_path) -> None:
    key = Cache(mfa, store).key
    assert Cache(mfa, store).key == key
    with torch.no_grad():
        mfa.means[0, 0] += 1e-3
    changed = Cache(mfa, store).key
    assert changed != key
    mfa.precision = "fast"
    assert Cache(mfa, store).key != changed
    other = ActivationStoreWriter(tmp_path / "other", mfa.n_features)
    with other:
        other.add_document([3], [0], torch.zeros(1, mfa.n_features), "x")
    assert Cache(mfa, ActivationStore(tmp_path / "other")).key not in (key, changed, Cache(mfa, store).key)


def test_a_file_of_another_shape_is_made_again(cache: Cache, mfa: MFA, store: ActivationStore) -> None:
    expected = cached_assignments(cache, mfa, store)
    for wrong in ({"components": torch.zeros(3)}, {"other": torch.zeros(3)}):
        cache.write("assignments", wrong)
        assert torch.equal(cached_assignments(cache, mfa, store).components, expected.components)


def test_a_damaged_file_is_made_again(cache: Cache) -> None:
    cache.write("layout", {"places": torch.ones(3)})
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(UserWarning, match=r"is made again"):
        found = cache.get("layout", lambda: {"places": torch.zeros(3)})
    assert torch.equal(found["places"], torch.zeros(3))
    written = cache.read("layout")
    assert written is not None
    assert torch.equal(written["places"], torch.zeros(3))


def test_a_folder_that_cannot_be_written_is_told(cache: Cache, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    cache.folder = tmp_path / "file" / "explored"
    with pytest.warns(UserWarning, match=r"cannot be written, nothing is kept there"):
        found = cache.get("layout", lambda: {"places": torch.ones(2)})
    assert torch.equal(found["places"], torch.ones(2))
