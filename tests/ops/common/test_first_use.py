"""What comes of a kernel's first use, with real kernels in the interpreter, made to fail on purpose."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from mfa_kernels import ops
from mfa_kernels.ops.common import configs, cuda, first_use, triton_probe
from mfa_kernels.ops.intervene import op as steering
from mfa_kernels.ops.intervene import triton_intervene
from mfa_kernels.ops.intervene.types import Edit
from mfa_kernels.ops.kmeans import op as kmeans
from mfa_kernels.ops.kmeans import triton_clusters, triton_nearest
from mfa_kernels.ops.kmeans.types import ClusterSums
from mfa_kernels.ops.pairs import op as pairs
from mfa_kernels.ops.pairs import triton_backward, triton_decode, triton_pairs
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan import op as scan
from mfa_kernels.ops.scan import triton_all_logits, triton_pipeline
from mfa_kernels.ops.screen import op as screening
from mfa_kernels.ops.screen import triton_screen
from mfa_kernels.ops.screen.types import ScreenedPairs
from mfa_kernels.ops.statistics import op as statistics
from mfa_kernels.ops.statistics import triton_statistics
from mfa_kernels.ops.statistics.types import SufficientStatistics
from mfa_kernels.ops.woodbury import portable as woodbury_portable
from mfa_kernels.ops.woodbury import triton_rows
from mfa_kernels.ops.woodbury.types import Parameters
from tests.helpers.mixtures import mixture, tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are made to fail in the interpreter")

M = mixture(6, 20, 2, spread=2.0)
X = tokens(M, 9)


def terms() -> ops.Woodbury:
    return ops.factorize(*M[:3], torch.zeros(20))


def slots() -> tuple[Tensor, Tensor, Tensor]:
    found = M.active(X, 4)
    r = found.logits.softmax(1)
    return found.components, r, torch.randn(9, 4, 2, generator=torch.Generator().manual_seed(3))


def gradients() -> list[Tensor]:
    x, *parameters = (t.clone().requires_grad_() for t in (X, *M))
    ops.log_prob(x, *parameters, terms(), 4).log_prob.sum().backward()
    return [t.grad for t in (x, *parameters)]


def sums() -> tuple[Tensor, ...]:
    out = SufficientStatistics.zeros(M.means, 2, False)
    found = M.active(X, 4)
    statistics.accumulate(X, found.components, found.logits.softmax(1), terms(), out)
    return out.tensors()


def clusters() -> tuple[Tensor, ...]:
    out = ClusterSums.zeros(M.means)
    owner = torch.arange(9) % 6
    kmeans.cluster_sums(X, torch.zeros(20), owner, torch.ones(9), None, out)
    return tuple(out)


def steered() -> tuple[Tensor, ...]:
    edit = Edit(
        torch.tensor([[[0.5, 0.0, 0.0]]]), torch.ones(1, 1, 20), torch.tensor([[0, -1, 0]]).int(), torch.zeros(1)
    )
    return steering.intervene(X[None], edit)


def screened() -> list[Tensor]:
    found = screening.screen(Parameters(*M), terms(), 16)
    return list(screening.scan(X, terms(), terms().constants(M.log_weights), found, 14.0, 4).active)


FAMILIES: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "scan": (lambda: ops.log_prob(X, *M, terms(), 4), triton_pipeline, "scan"),
    "every logit": (lambda: scan.dense_logits(X, terms(), M.log_weights), triton_all_logits, "all_logits"),
    "latents": (
        lambda: pairs.explain(Pairs(X, torch.arange(9), (torch.arange(9) % 6).int()), terms()), triton_pairs, "latents",
    ),
    "gradients": (gradients, triton_backward, "backward"),
    "decode": (lambda: pairs.decode(*slots(), *M[:2]), triton_decode, "decode"),
    "gradients of decode": (
        lambda: torch.ops.mfa_kernels.decode_backward(torch.ones(9, 20), *slots(), *M[:2], [True, True]), triton_decode,
        "decode_backward",
    ),
    "statistics": (sums, triton_statistics, "accumulate"),
    "nearest": (lambda: kmeans.nearest(X, M.means), triton_nearest, "nearest"),
    "cluster sums": (clusters, triton_clusters, "cluster_sums"),
    "steering": (steered, triton_intervene, "intervene"),
    "screened scan": (screened, triton_screen, "scan"),
    "rows of the scan": (lambda: ops.log_prob(X, *M, terms(), 4), triton_rows, "scan_rows"),
    "factors": (lambda: terms().tensors(), cuda, "library"),
}  # fmt: skip

ERRORS = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    OutOfResources(262144, 101376, "shared memory"),
    PTXASError("Internal Triton PTX codegen error\nptxas fatal : Value 'sm_999' is not defined"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    ImportError("cannot import name 'TensorDescriptor'"),
]


class Library:
    """The CUDA library, in plain PyTorch."""

    @staticmethod
    def woodbury(*parameters: Tensor) -> tuple[Tensor, ...]:
        return woodbury_portable.portable(*parameters)


@pytest.fixture(autouse=True)
def first(monkeypatch, tmp_path):
    """Triton in the interpreter, which nobody insists on, and no memory of any first use."""
    monkeypatch.setenv("MFA_KERNELS_BACKEND", "triton")
    monkeypatch.setenv("MFA_KERNELS_TRUST", "check")
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "_insists", lambda: False)
    monkeypatch.setattr(first_use, "_settled", {})
    monkeypatch.setattr(cuda, "library", Library)
    monkeypatch.setattr(triton_pipeline, "FEW", 0)  # the library has stage 0 alone


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def plain(call: Callable[[], Any], monkeypatch) -> list[Tensor]:
    """What plain PyTorch makes of it, at the place of the kernel; screening has kernels alone before."""
    with monkeypatch.context() as patch:
        patch.setenv("MFA_KERNELS_BACKEND", "triton" if call is screened else "portable")
        if call is screened:
            patch.setattr(triton_screen, "scan", lambda *a: ScreenedPairs(M.active(X, 4), X, X))
            patch.setenv("MFA_KERNELS_TRUST", "off")
        return flat(call())


def states(family: str) -> list[str]:
    return [entry["state"] for entry in first_use.entries() if entry["family"] == family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_kernel_is_trusted_from_its_first_call_on(family, monkeypatch):
    call, module, name = FAMILIES[family]
    expected = plain(call, monkeypatch)
    calls, kernel = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(1) or kernel(*a, **k))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mfa_kernels")
        found = flat(call())
    assert calls, "the kernel ran"
    assert states(family) == ["default"]
    for own, exact in zip(found, expected):
        torch.testing.assert_close(own, exact, rtol=1e-3, atol=1e-3, equal_nan=True)
    monkeypatch.setattr(first_use, "_settled", {})  # another process
    monkeypatch.setattr(first_use, "_first", lambda *a: pytest.fail("it was checked again"))
    for own, again in zip(found, flat(call())):
        assert torch.equal(own.nan_to_num(), again.nan_to_num())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:24])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_that_cannot_run_gives_way_to_plain_pytorch(family, error, monkeypatch):
    call, module, name = FAMILIES[family]
    expected = plain(call, monkeypatch)

    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    broken = type("Broken", (), {"woodbury": staticmethod(fails)})
    monkeypatch.setattr(module, name, broken if family == "factors" else fails)
    with pytest.warns(RuntimeWarning, match="did not pass its first use") as caught:
        found = flat(call())
    said = [str(w.message) for w in caught if f"mfa_kernels: {family} did" in str(w.message)]
    assert len(said) == 1
    assert str(error).strip().splitlines()[0] in said[0]
    assert states(family) == ["plain"]
    for own, exact in zip(found, expected):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4, equal_nan=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mfa_kernels")
        call()


def off(value: Any) -> Any:
    """A result that is off by a hundredth."""
    if isinstance(value, Tensor):
        return value * 1.01 if value.is_floating_point() else value
    if hasattr(value, "_fields"):
        return type(value)(*map(off, value))
    return tuple(map(off, value))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rows of the scan"])
def test_a_kernel_that_is_wrong_gives_way_to_plain_pytorch(family, monkeypatch):
    call, module, name = FAMILIES[family]
    expected, kernel = plain(call, monkeypatch), getattr(module, name)

    def wrong(*arguments: Any, **options: Any) -> Any:
        written = [t for t in flat([a for b in arguments for a in (b if isinstance(b, list | tuple) else [b])])]
        result = kernel(*arguments, **options)
        if result is None:  # it writes into its arguments
            for t in written:
                if t.dtype == torch.float64 or (
                    family == "gradients" and any(t is a for a in arguments[3] if a is not None)
                ):
                    t.mul_(1.01)
        return None if result is None else off(result)

    broken = type("Broken", (), {"woodbury": staticmethod(lambda *a: off(Library.woodbury(*a)))})
    monkeypatch.setattr(module, name, broken if family == "factors" else wrong)
    with pytest.warns(RuntimeWarning, match=f"{family} did not pass.*off by") as caught:
        found = flat(call())
    assert len([w for w in caught if f"mfa_kernels: {family} did" in str(w.message)]) == 1
    assert states(family) == ["plain"]
    for own, exact in zip(found, expected):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", ["scan", "screened scan", "nearest"])
def test_matrix_units_that_sum_in_few_bits_serve_nothing_that_rests_on_bounds(family, monkeypatch):
    call, *_ = FAMILIES[family]
    expected = plain(call, monkeypatch)
    monkeypatch.setattr(triton_probe, "of_device", lambda device, features: 107.0)
    with pytest.warns(RuntimeWarning, match=f"{family} did not pass.*off by 107 times.*plain PyTorch serves it"):
        found = flat(call())
    assert states(family) == ["plain"]
    for own, exact in zip(found, expected):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("family", ["scan", "nearest"])
def test_a_careful_configuration_comes_before_plain_pytorch(family, monkeypatch):
    call, module, name = FAMILIES[family]
    kernel, kind, seen = getattr(module, name), {"scan": configs.Scan, "nearest": configs.Nearest}[family], []

    def fails(*arguments: Any, **options: Any) -> Any:
        config = configs.configured(kind, X, 9, 6)
        seen.append((config, cuda.library_in_use() is None))
        if config not in configs.CAREFUL:
            raise OutOfResources(262144, 101376, "shared memory")
        return kernel(*arguments, **options)

    monkeypatch.setattr(module, name, fails)
    with pytest.warns(RuntimeWarning, match=f"{family} did not pass.*a careful configuration serves it"):
        call()
    assert states(family) == ["careful"]
    assert [hidden for _, hidden in seen] == [False, True]
    call()
    assert seen[2][0] in configs.CAREFUL
    monkeypatch.setattr(first_use, "_settled", {})
    with pytest.warns(RuntimeWarning, match=f"{family} did not pass"):  # once in each process
        call()
    assert seen[3][0] in configs.CAREFUL


@pytest.mark.parametrize("message", ["CUDA error: an illegal memory access was encountered", "misaligned address"])
def test_after_an_error_that_a_gpu_does_not_survive_the_next_process_takes_plain_pytorch(message, monkeypatch):
    call, module, name = FAMILIES["scan"]
    expected, kernel = plain(call, monkeypatch), getattr(module, name)

    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(RuntimeError, match="scan: the GPU does not go on after this error of a kernel's first use"):
        call()
    assert states("scan") == ["trying"]
    (path,) = (p for p in first_use.folder().iterdir() if json.loads(p.read_text())["family"] == "scan")
    entry = json.loads(path.read_text())
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    path.write_text(json.dumps(entry | {"pid": int(dead.stdout)}))
    monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("the kernel ran again"))
    with pytest.warns(RuntimeWarning, match="scan did not pass.*a process came to its end while it ran"):
        found = flat(call())
    torch.testing.assert_close(found[0], expected[0])
    first_use.forget()
    monkeypatch.setattr(module, name, kernel)
    call()
    assert states("scan") == ["default"]


@pytest.mark.parametrize("other", [{"pid": os.getppid()}, {"host": "elsewhere"}])
def test_a_process_that_is_trying_stops_no_other(other, monkeypatch):
    call, *_ = FAMILIES["scan"]
    call()
    for path in first_use.folder().iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "trying"} | other))
    monkeypatch.setattr(first_use, "_settled", {})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mfa_kernels")
        call()
    assert states("scan") == ["default"]
    assert first_use.entries()[0]["host"] == socket.gethostname()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_what_says_nothing_of_a_kernel_leaves_no_trace(error, monkeypatch):
    call, module, name = FAMILIES["nearest"]

    def fails(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(type(error)):
        call()
    assert states("nearest") == []


@pytest.mark.parametrize("x", [X[:0], torch.full_like(X, torch.nan)], ids=["no rows", "none that is finite"])
def test_a_call_with_nothing_to_check_settles_nothing(x, monkeypatch):
    monkeypatch.setattr(first_use, "_unchecked", {})
    for _ in range(first_use._PATIENCE + 1):  # after which this process asks no more
        ops.log_prob(x, *M, terms(), 4)
        kmeans.nearest(x, M.means)
    assert states("scan") == states("nearest") == []
    assert {key[0] for key in first_use._settled} >= {"scan", "nearest"}
    monkeypatch.setattr(first_use, "_settled", {})
    kmeans.nearest(X, M.means)
    assert states("nearest") == ["default"]


def test_as_many_components_as_features_are_no_reason_to_refuse():
    """Sums over all components are told from those of one by their name, not by their size."""
    square = mixture(20, 20, 2, spread=2.0)
    x, woodbury = tokens(square, 9), square.woodbury()
    out, found = SufficientStatistics.zeros(square.means, 2, False), square.active(x, 4)
    statistics.accumulate(x, found.components, found.logits.softmax(1), woodbury, out)
    y, *parameters = (t.clone().requires_grad_() for t in (x, *square))
    ops.log_prob(y, *parameters, woodbury, 4).log_prob.sum().backward()
    assert states("statistics") == states("gradients") == ["default"]


@pytest.mark.parametrize("which", [0, 1], ids=["tokens", "means"])
def test_gradients_that_are_no_number_are_found(which, monkeypatch):
    kernel = triton_backward.backward

    def wrong(pairs, weights, woodbury, gradients, add):
        kernel(pairs, weights, woodbury, gradients, add)
        gradients[which].fill_(torch.nan)

    expected = plain(gradients, monkeypatch)
    monkeypatch.setattr(triton_backward, "backward", wrong)
    with pytest.warns(RuntimeWarning, match="gradients did not pass"):
        found = gradients()
    for own, exact in zip(found, expected):
        torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)


def test_weights_that_are_no_number_say_nothing_of_a_kernel(monkeypatch):
    monkeypatch.setattr(first_use, "_unchecked", {})
    x, *parameters = (t.clone().requires_grad_() for t in (X, *M))
    (ops.log_prob(x, *parameters, terms(), 4).log_prob * torch.nan).sum().backward()
    assert states("gradients") == []
    gradients()
    assert states("gradients") == ["default"]


def test_while_a_graph_is_captured_nothing_is_checked(monkeypatch):
    call, *_ = FAMILIES["scan"]
    monkeypatch.setattr(first_use, "_captures", lambda like: True)
    monkeypatch.setattr(first_use, "_first", lambda *a: pytest.fail("it was checked"))
    call()
    assert first_use.entries() == []


def test_who_insists_on_triton_gets_an_error(monkeypatch):
    call, module, name = FAMILIES["nearest"]
    monkeypatch.setattr(first_use, "_insists", lambda: True)

    def fails(*arguments: Any, **options: Any) -> Any:
        raise ERRORS[0]

    monkeypatch.setattr(module, name, fails)
    with pytest.raises(RuntimeError, match="MFA_KERNELS_BACKEND=triton, but nearest failed.*Failed to find C compiler"):
        call()


def test_always_and_off(monkeypatch):
    call, module, name = FAMILIES["nearest"]
    call()
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: off(kernel(*a)))
    call()
    monkeypatch.setenv("MFA_KERNELS_TRUST", "always")
    with pytest.raises(RuntimeError, match="nearest: the result is off by"):
        call()
    monkeypatch.setattr(first_use, "_settled", {})
    first_use.forget()
    monkeypatch.setenv("MFA_KERNELS_TRUST", "off")
    call()
    assert first_use.entries() == []
    monkeypatch.setenv("MFA_KERNELS_TRUST", "never")
    with pytest.raises(ValueError, match="MFA_KERNELS_TRUST must be one of check, always, off, got 'never'"):
        call()


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(tmp_path / "file"))
    call, *_ = FAMILIES["nearest"]
    call()
    assert first_use.entries() == []


def test_a_file_that_is_no_entry_is_written_anew():
    call, *_ = FAMILIES["nearest"]
    call()
    (path,) = first_use.folder().iterdir()
    for text in ("", "{}", '{"state": "happy", "note": ""}', "[]"):
        path.write_text(text)
        first_use._settled.clear()
        call()
        assert states("nearest") == ["default"]
