"""The paper's .pt files, against the paper's formulas."""

from __future__ import annotations

import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.mixture import paper_format
from tests.helpers.mixtures import random_mfa


def _official(
    components=4, features=10, rank=3, *, per_component=False, rotation=None, dtype=torch.float64
) -> dict[str, Tensor]:
    """A state dict as the paper's class writes it."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    identity = torch.eye(rank, dtype=dtype).repeat(components, 1, 1)
    return {
        "mu": 2 * normal(components, features),
        "dir_raw": normal(components, features, rank) / features**0.5,
        "scale_rho": 1 + normal(components, rank),
        "psi_rho": normal(components, features) if per_component else normal(features),
        "pi_logits": normal(components),
        "_rot_T": identity if rotation is None else rotation.to(dtype),
        "_rot_inv_Tt": identity if rotation is None else torch.linalg.inv(rotation.double()).mT.to(dtype),
    }


def _meta(state: dict[str, Tensor], format: int = 1, **changes: Any) -> dict[str, Any]:
    components, features, rank = state["dir_raw"].shape
    meta = {"K": components, "D": features, "psi_per_component": state["psi_rho"].dim() == 2, "version": 1}
    meta["eps_floor"] = 1e-5
    if format == 1:
        meta |= {"q": rank, "dtype": str(state["mu"].dtype)}
        meta |= {"rotation_on": False, "rotation_kind": None, "rotation_params": {}}
    else:
        meta |= {"cls": "MFA", "rank": rank}
    return meta | changes


def _official_loadings(state: dict[str, Tensor], eps: float) -> Tensor:
    direction = state["dir_raw"].double()
    norm = direction.square().sum(1, keepdim=True).sqrt().clamp_min(eps)
    return direction / norm * torch.log1p(state["scale_rho"].double().exp()).unsqueeze(1)


def _official_density(x: Tensor, state: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """log p(x) and responsibilities as the paper's class defines them, float64, from the full covariances."""
    state = {name: tensor.double() for name, tensor in state.items()}
    loadings = _official_loadings(state, eps)
    noise = (torch.log1p(state["psi_rho"].exp()) + eps).expand_as(state["mu"])
    covariance = loadings @ loadings.mT + torch.diag_embed(noise)
    normal = torch.distributions.MultivariateNormal(state["mu"], covariance)
    joint = normal.log_prob(x.double().unsqueeze(1)) + state["pi_logits"].log_softmax(0)
    return joint.logsumexp(1), joint.softmax(1)


def _x(features: int = 10, count: int = 50) -> Tensor:
    return 2 * torch.randn(count, features, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def _assert_same_density(mfa: MFA, state: dict[str, Tensor], eps: float) -> None:
    log_prob, responsibilities = _official_density(_x(), state, eps)
    with torch.no_grad():
        torch.testing.assert_close(mfa.log_prob(_x()), log_prob, rtol=0, atol=1e-10)
        torch.testing.assert_close(mfa.responsibilities(_x()), responsibilities, rtol=0, atol=1e-10)


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("per_component", [False, True])
def test_official_density(tmp_path, monkeypatch, format, per_component):
    monkeypatch.setattr(paper_format, "_CHUNK_ELEMENTS", 3 * 10 * 3)  # three components, then one
    state = _official(per_component=per_component)
    torch.save({"state_dict": state, "meta": _meta(state, format, eps_floor=1e-2)}, tmp_path / "mfa.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    _assert_same_density(mfa, state, 1e-2)
    assert mfa.means.dtype == torch.float64
    assert mfa.noise_floor == 1e-2
    assert mfa.noise == ("per_component" if per_component else "shared")
    torch.testing.assert_close(mfa.center, state["mu"].mean(0))
    assert all(p.requires_grad for p in mfa.parameters())


def test_official_float32_file(tmp_path):
    state = _official(dtype=torch.float32)
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "mfa.pt")
    assert MFA.from_reference_checkpoint(tmp_path / "mfa.pt").means.dtype == torch.float32
    wide = MFA.from_reference_checkpoint(tmp_path / "mfa.pt", dtype=torch.float64)  # no digit is lost on the way
    _assert_same_density(wide, state, 1e-5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_and_unknown_keys(tmp_path, prefix):
    state = _official()
    stored: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items() if not name.startswith("_rot")}
    stored |= {"steps": torch.tensor(3), "note": "hello"}
    torch.save({"state_dict": stored, "meta": _meta(state, colour="red"), "epoch": 3}, tmp_path / "mfa.pt")
    _assert_same_density(MFA.from_reference_checkpoint(tmp_path / "mfa.pt"), state, 1e-5)


def test_bare_state_dict_warns_once(tmp_path):
    state = _official()
    state["psi_rho"][0] = -6.0  # a variance that the floor matters to
    state["dir_raw"][0, :, 0] *= 1e-6  # a norm between the two floors
    torch.save(state, tmp_path / "mfa.pt")
    with pytest.warns(UserWarning, match=r"1e-08 is taken.*pass eps_floor=1e-05") as record:
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    assert len(record) == 1
    assert record[0].filename == __file__
    _assert_same_density(mfa, state, 1e-8)
    assert not torch.allclose(mfa.log_prob(_x()), _official_density(_x(), state, 1e-5)[0], rtol=0, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt", eps_floor=1e-5)
    _assert_same_density(mfa, state, 1e-5)


def test_a_floor_that_the_file_says_is_kept(tmp_path):
    mfa = random_mfa(3, 6, 2, noise_floor=0.25)
    mfa.to_reference_checkpoint(tmp_path / "mfa.pt", progress=False)
    assert MFA.from_reference_checkpoint(tmp_path / "mfa.pt", eps_floor=0.25).noise_floor == 0.25
    with pytest.raises(ValueError, match=r"eps_floor must be that of .*mfa.pt, 0.25, or left out, got 0.5"):
        MFA.from_reference_checkpoint(tmp_path / "mfa.pt", eps_floor=0.5)


def test_meta_without_eps_floor_warns(tmp_path):
    state = _official()
    meta = _meta(state)
    del meta["eps_floor"]
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "mfa.pt")
    with pytest.warns(UserWarning, match="does not say its eps_floor"):
        assert MFA.from_reference_checkpoint(tmp_path / "mfa.pt").noise_floor == 1e-8


def test_rotation(tmp_path):
    normal = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rotation = torch.linalg.qr(normal)[0]
    state = _official(rotation=rotation.float())  # orthogonal to the rounding of float32
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "off.pt")
    torch.save({"state_dict": state, "meta": _meta(state, rotation_on=True)}, tmp_path / "on.pt")
    off, on = (MFA.from_reference_checkpoint(tmp_path / name) for name in ("off.pt", "on.pt"))
    plain = _official_loadings(state, 1e-5)
    torch.testing.assert_close(off.loadings.detach(), plain)
    torch.testing.assert_close(on.loadings.detach(), plain @ state["_rot_inv_Tt"], rtol=0, atol=1e-6)
    assert not torch.allclose(on.loadings, off.loadings, atol=0.1)
    _assert_same_density(on, state, 1e-5)
    _assert_same_density(off, state, 1e-5)


def test_oblique_rotation_is_left_out(tmp_path):
    state = _official(rotation=torch.eye(3).repeat(4, 1, 1) + 0.3 * torch.ones(3, 3).triu(1))
    meta = _meta(state, rotation_on=True, rotation_kind="oblimin")
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "mfa.pt")
    with pytest.warns(UserWarning, match=r"oblique rotation \('oblimin'"):
        mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    _assert_same_density(mfa, state, 1e-5)


def test_extreme_parameters(tmp_path):
    state = _official()
    state["psi_rho"][:5] = torch.tensor([1e4, 21.0, 800.0, -30.0, -1e4])
    state["scale_rho"][0] = 1e3
    state["dir_raw"][1, :, 0] = 0
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "mfa.pt")
    mfa = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    expected = torch.tensor([1e4, 21 + math.log1p(math.exp(-21)), 800, math.exp(-30), 0], dtype=torch.float64) + 1e-5
    torch.testing.assert_close(mfa.noise_variance[:5].detach(), expected, rtol=1e-12, atol=0)
    assert mfa.log_noise.isfinite().all()
    torch.testing.assert_close(mfa.loadings[0].norm(dim=0).detach(), torch.full((3,), 1e3).double())
    assert (mfa.loadings[1, :, 0] == 0).all()
    assert mfa.log_prob(_x()).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pi_logits": torch.zeros(5)}, r"pi_logits has shape \(5,\), expected \(4,\): mu has K, D = 4, 10"),
        ({"dir_raw": torch.zeros(5, 10, 3)}, r"dir_raw has shape \(5, 10, 3\), expected \(4, 10, 3\)"),
        ({"scale_rho": torch.zeros(4, 2)}, r"scale_rho has shape \(4, 2\), expected \(4, 3\)"),
        ({"psi_rho": torch.zeros(5, 10)}, r"psi_rho has shape \(5, 10\), expected \(4, 10\)"),
        ({"psi_rho": torch.zeros(4, 1)}, r"psi_rho has shape \(4, 1\), expected \(4, 10\)"),
        ({"psi_rho": torch.zeros(1)}, r"psi_rho has shape \(1,\), expected \(10,\)"),
        ({"_rot_inv_Tt": torch.zeros(4, 2, 2)}, r"_rot_inv_Tt has shape \(4, 2, 2\), expected \(4, 3, 3\)"),
        ({"mu": torch.zeros(4)}, r"mu must have shape \(K, D\).*got \(4,\)"),
        ({"mu": None}, r"lacks mu; it holds dir_raw"),
        ({"mu": [1.0]}, "mu must be a floating-point tensor, got list"),
        ({"mu": torch.zeros(4, 10, dtype=torch.int64)}, r"mu must be a floating-point tensor, got torch.int64"),
        ({"mu": torch.full((4, 10), math.nan)}, "mu has NaN or infinite values"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    state = {name: tensor for name, tensor in {**_official(), **change}.items() if tensor is not None}
    torch.save({"state_dict": state, "meta": {"eps_floor": 1e-5}}, tmp_path / "mfa.pt")
    with pytest.raises(ValueError, match=message):
        MFA.from_reference_checkpoint(tmp_path / "mfa.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": 5}, "meta says K = 5, but its tensors have 4"),
        ({"q": 2}, "meta says q = 2, but its tensors have 3"),
        ({"rank": 4}, "meta says rank = 4, but its tensors have 3"),
        ({"version": 2}, "version 2 of the paper's format, expected 1"),
        ({"cls": "SNMF"}, "holds a 'SNMF', expected 'MFA'"),
        ({"eps_floor": -1.0}, "noise_floor must be >= 0"),
    ],
)
def test_meta_that_does_not_fit(tmp_path, change, message):
    state = _official()
    torch.save({"state_dict": state, "meta": _meta(state) | change}, tmp_path / "mfa.pt")
    with pytest.raises(ValueError, match=message):
        MFA.from_reference_checkpoint(tmp_path / "mfa.pt")


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_malicious_file_does_not_run(tmp_path, legacy):
    marker, path = tmp_path / "marker", tmp_path / "mfa.pt"
    content = {"state_dict": _official(), "meta": {"extra": _Malicious(marker)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"is refused: it asks for \w+\.system.*only tensors and plain values are read"
    ):
        MFA.from_reference_checkpoint(path)
    path.write_bytes(pickle.dumps(_Malicious(marker), protocol=2))
    with pytest.raises(ValueError, match="is refused"):
        MFA.from_reference_checkpoint(path)
    assert not marker.exists()
    os.system(f"touch {marker}")
    assert marker.exists()  # the command would have shown


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "mfa.pt"
    state = _official()
    torch.save({"state_dict": state, "meta": _meta(state)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"plain text, not a checkpoint", b"\x80\x02garbage"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mfa.pt is (refused|not a complete torch checkpoint)"):
            MFA.from_reference_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        MFA.from_reference_checkpoint(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="lacks mu, dir_raw, scale_rho, psi_rho, pi_logits; it holds weight"):
        MFA.from_reference_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        MFA.from_reference_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize("noise", ["shared", "per_component"])
@pytest.mark.parametrize("noise_floor", [0.0, 1e-4, 2.0])
def test_reference_roundtrip(tmp_path, monkeypatch, format, noise, noise_floor):
    monkeypatch.setattr(paper_format, "_CHUNK_ELEMENTS", 3 * 10 * 3)
    mfa = random_mfa(4, 10, 3, noise, torch.float64, noise_floor=noise_floor)
    mfa.to_reference_checkpoint(tmp_path / "mfa.pt", format=format)
    assert os.listdir(tmp_path) == ["mfa.pt"]
    content = torch.load(tmp_path / "mfa.pt", weights_only=True)
    state, meta = content["state_dict"], content["meta"]
    keys = {"K", "D", "psi_per_component", "eps_floor", "version"}
    keys |= {"q", "dtype", "rotation_on", "rotation_kind", "rotation_params"} if format == 1 else {"cls", "rank"}
    assert set(meta) == keys
    assert set(state) == {"mu", "dir_raw", "scale_rho", "psi_rho", "pi_logits", "_rot_T", "_rot_inv_Tt"}
    assert 0 < meta["eps_floor"] < 0.5
    assert noise_floor != 1e-4 or meta["eps_floor"] == 1e-4
    torch.testing.assert_close(state["dir_raw"].norm(dim=1), torch.ones(4, 3, dtype=torch.float64))
    _assert_same_density(mfa, state, meta["eps_floor"])  # as the paper's class sees the file

    loaded = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    for name in ("means", "loadings", "noise_variance", "log_weights", "center"):
        torch.testing.assert_close(getattr(loaded, name), getattr(mfa, name), rtol=1e-12, atol=1e-12)


def test_reference_roundtrip_of_extremes(tmp_path):
    mfa = random_mfa(4, 10, 3, dtype=torch.float32)
    mfa.extra = {"layer": 8}
    with torch.no_grad():
        mfa.loadings[1, :, 2] = 0
        mfa.loadings[2] *= 1e6
        mfa.log_noise[0] = math.log(1e4)
        mfa.log_noise[1] = math.log(1e-9)
        mfa.weight_logits[3] = -torch.inf
    mfa.to_reference_checkpoint(tmp_path / "mfa.pt")
    state = torch.load(tmp_path / "mfa.pt", weights_only=True)["state_dict"]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(state[name].isfinite().all() for name in ("dir_raw", "scale_rho", "psi_rho"))
    assert state["dir_raw"][1, :, 2].tolist() == [1.0] + 9 * [0.0]
    loaded = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
    torch.testing.assert_close(loaded.loadings, mfa.loadings, rtol=1e-5, atol=1e-5)
    assert loaded.loadings[1, :, 2].abs().max() < 1e-37
    torch.testing.assert_close(loaded.noise_variance, mfa.noise_variance, rtol=1e-5, atol=0)
    assert loaded.log_weights[3] == -torch.inf
    assert loaded.extra == {"layer": 8}


def test_reference_of_half_precision_and_rank_0(tmp_path):
    for mfa in (random_mfa(4, 10, 3, dtype=torch.bfloat16), random_mfa(4, 10, 0)):
        mfa.to_reference_checkpoint(tmp_path / "mfa.pt")
        loaded = MFA.from_reference_checkpoint(tmp_path / "mfa.pt")
        assert loaded.means.dtype == torch.float32  # the paper's class has no half precision
        assert torch.equal(loaded.means, mfa.means.float())
        torch.testing.assert_close(loaded.loadings, mfa.loadings.float())
        torch.testing.assert_close(loaded.noise_variance, mfa.noise_variance.float(), rtol=1e-2, atol=0)


def test_reference_save_refuses(tmp_path):
    with pytest.raises(ValueError, match="format must be 1 or 2, got 3"):
        random_mfa().to_reference_checkpoint(tmp_path / "mfa.pt", format=3)
    mfa = random_mfa()
    mfa.extra = {"layer": torch.tensor(8)}
    with pytest.raises(TypeError, match="extra must hold only what JSON can"):
        mfa.to_reference_checkpoint(tmp_path / "mfa.pt")
    assert not list(tmp_path.iterdir())


def test_density_survives_every_format(tmp_path):
    """From the paper's file to our folder and back to the paper's other format."""
    state = _official(dtype=torch.float64)
    torch.save({"state_dict": state, "meta": _meta(state)}, tmp_path / "first.pt")
    mfa = MFA.from_reference_checkpoint(tmp_path / "first.pt")
    mfa.save_pretrained(tmp_path / "folder")
    mfa = MFA.from_pretrained(tmp_path / "folder")
    mfa.to_reference_checkpoint(tmp_path / "second.pt", format=2)
    mfa = MFA.from_reference_checkpoint(tmp_path / "second.pt")
    _assert_same_density(mfa, state, 1e-5)
    assert mfa.noise_floor == 1e-5
