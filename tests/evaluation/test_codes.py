"""What is written of codes is what is active of them, whatever comes in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.evaluation.codes import LAYOUT, write_codes
from tests.helpers.mixtures import mixture, tokens


def made(rank: int = 3, dtype: torch.dtype = torch.float32) -> tuple[MFA, Tensor]:
    m = mixture(9, 20, rank, per_component=False, spread=0.5)
    mfa = MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).to(dtype)
    x = tokens(m, 100).to(dtype)
    x[17], x[60] = torch.nan, 1e30
    return mfa, x


@pytest.mark.parametrize("top_k", [1, 4, None])
@pytest.mark.parametrize(("rank", "dtype"), [(3, torch.float32), (3, torch.float64), (0, torch.float32)])
def test_what_is_written_is_what_is_active(tmp_path: Path, rank: int, dtype: torch.dtype, top_k: int | None) -> None:
    mfa, x = made(rank, dtype)
    done = write_codes(mfa, x.split(33), tmp_path / "codes", top_k, progress=False)
    with torch.no_grad():
        found, code = load_file(tmp_path / "codes"), mfa.encode(x, top_k)
    held = code.components >= 0
    assert done == (100, int(held.sum()), int((~held).all(1).sum()))
    assert {name: t.dtype for name, t in found.items()} == {
        "offsets": torch.int64, "components": torch.int32, "responsibilities": dtype, "latents": dtype,
        "dropped": dtype,
    }  # fmt: skip
    for n in range(100):
        pairs = slice(*found["offsets"][n : n + 2].tolist())
        assert torch.equal(found["components"][pairs], code.components[n][held[n]].int())
        torch.testing.assert_close(found["responsibilities"][pairs], code.responsibilities[n][held[n]])
        torch.testing.assert_close(found["latents"][pairs], code.latents[n][held[n]])
    assert found["latents"].shape == (done.pairs, rank)
    torch.testing.assert_close(found["dropped"], code.dropped, equal_nan=True)
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_nothing_is_held(tmp_path: Path) -> None:
    """Of batches that are gone, no tensor is left."""
    import gc
    import weakref

    mfa, x = made()
    gone: list[weakref.ref] = []

    def batches():
        for part in x.split(10):
            batch = part.clone()
            gone.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            assert sum(ref() is not None for ref in gone) <= 1

    assert write_codes(mfa, batches(), tmp_path / "codes", progress=False).tokens == 100


@pytest.mark.parametrize("nothing", [[], [torch.full((5, 20), torch.nan)]], ids=["no batch", "no density"])
def test_nothing_to_write(tmp_path: Path, nothing: list[Tensor]) -> None:
    mfa, _ = made()
    done = write_codes(mfa, nothing, tmp_path / "codes", progress=False)
    assert done == (5 * len(nothing), 0, 5 * len(nothing))
    assert load_file(tmp_path / "codes")["latents"].shape == (0, 3)


def test_an_iterable_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    mfa, x = made()
    write_codes(mfa, [x[:1]], tmp_path / "codes", progress=False)
    before = (tmp_path / "codes").read_bytes()

    def failing():
        yield x
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_codes(mfa, failing(), tmp_path / "codes", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]
    assert (tmp_path / "codes").read_bytes() == before


class Rows:
    """What `fit` takes as a store."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.n_features = x, x.shape[1]

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: Tensor) -> Tensor:
        return self.x[index]


def test_what_fit_takes_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfa_kernels.evaluation.codes._BATCH", 33)
    mfa, x = made()
    write_codes(mfa, list(x.split(33)), tmp_path / "of batches", progress=False)
    expected = (tmp_path / "of batches").read_bytes()
    for name, given in {
        "tensor": x, "array": x.numpy(), "deeper": x.reshape(4, 25, 20), "store": Rows(x),
        "loader": [(part, None) for part in x.split(33)],
    }.items():  # fmt: skip
        assert write_codes(mfa, given, tmp_path / name, progress=False).tokens == 100
        assert (tmp_path / name).read_bytes() == expected, name


def test_the_file_says_what_is_in_it(tmp_path: Path) -> None:
    mfa, x = made()
    write_codes(mfa, x, tmp_path / "codes", progress=False)
    with safe_open(tmp_path / "codes", framework="pt") as file:
        assert file.metadata() == {"layout": LAYOUT}
        assert all(name in LAYOUT for name in file.keys())  # noqa: SIM118


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    mfa, x = made()
    for given, message in (
        (x[:, :10], "activations: batch 0 has 10 features, but the mixture has 20"),
        ([x, x[:, :10]], "activations: batch 1 has 10 features, but the mixture has 20"),
        (iter([x, None]), "activations: batch 1 must be a tensor or an array, got NoneType"),
        (Rows(x[:, :10]), "activations: batch 0 has 10 features, but the mixture has 20"),
        (None, "activations must be a tensor"),
        ("store", "activations must be a tensor"),
        (x.long(), "activations must have a floating-point dtype"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            write_codes(mfa, given, tmp_path / "codes", progress=False)
    assert not list(tmp_path.iterdir())
