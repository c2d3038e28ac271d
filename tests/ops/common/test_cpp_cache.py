"""The cache of built libraries: what is not as it was built is built anew, and nobody waits for the dead."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mfa_kernels.common import locks
from mfa_kernels.ops.common import cpp

# A build that takes no compiler: it copies a Python module of the standard library, slowly or when told, if asked to.
STUB = """
import os, shutil, sys, time, _queue
from pathlib import Path
from mfa_kernels.ops.common import cpp
def compiled(name, *rest, **options):
    path = cpp._file("_queue")
    Path(os.environ["BUILDS"]).open("a").write("built ")
    print("begun", flush=True)
    slowly = os.environ.get("SLOWLY", "0")
    sys.stdin.readline() if slowly == "when told" else time.sleep(float(slowly))
    shutil.copy(_queue.__file__, path)
    return _queue
cpp._compiled = compiled
cpp.cached("_queue") or cpp.build("_queue", [], "a test")
print("done", flush=True)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if "_queue" in sys.builtin_module_names or cpp.compiler() is None or cpp.ninja() is None:
        pytest.skip("a compiler, ninja and a Python whose modules are files are needed")
    folder = tmp_path / "cache"
    monkeypatch.setenv("MFA_KERNELS_CACHE", str(folder))
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    return folder


def process(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STUB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def begun(**environment: str) -> subprocess.Popen[str]:
    """A process whose build has begun."""
    started = process(**environment)
    assert started.stdout is not None
    assert started.stdout.readline() == "begun\n"
    return started


def builds(cache: Path) -> int:
    path = cache.parent / "builds"
    return path.read_text().count("built") if path.exists() else 0


def run() -> None:
    out, error = process().communicate(timeout=60)
    assert out.endswith("done\n"), error


@pytest.fixture
def built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """What asks for the library, in this process."""
    import _queue

    def compiled(name: str, *rest: Any, **options: Any) -> ModuleType:
        with (cache.parent / "builds").open("a") as file:
            file.write("built ")
        (cache / name / f"{name}.so").unlink(missing_ok=True)
        shutil.copy(_queue.__file__, cache / name / f"{name}.so")
        return _queue

    monkeypatch.setattr(cpp, "_compiled", compiled)
    return lambda: cpp.cached("_queue") or cpp.build("_queue", [], "a test")


def fail(monkeypatch: pytest.MonkeyPatch, said: str, kind: type[BaseException] = RuntimeError) -> list[int]:
    """Every build fails, and says so; an entry for every one that is tried."""
    tries: list[int] = []

    def failing(*arguments: Any, **options: Any) -> ModuleType:
        tries.append(1)
        raise kind(f"Error building extension '_queue': [1/2]\n{said}\nninja: build stopped")

    monkeypatch.setattr(cpp, "_compiled", failing)
    return tries


def damage(kind: str, path: Path) -> None:
    content = path.read_bytes()
    if kind != "no digest":  # a file of its own: this process has loaded the other one
        path.unlink()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "zeroed":
        path.write_bytes(bytes(len(content)))
    elif kind == "foreign":
        import _json

        path.write_bytes(Path(_json.__file__).read_bytes())
    elif kind == "one bit":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif kind == "no digest":
        path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "foreign", "one bit", "no digest", "gone"])
def test_a_library_that_is_not_as_it_was_built_is_built_anew(cache: Path, built: Any, kind: str) -> None:
    built()
    assert built().SimpleQueue is not None
    assert builds(cache) == 1
    path = cache / "_queue" / "_queue.so"
    whole = path.read_bytes()
    damage(kind, path)
    built()
    assert builds(cache) == 2
    assert path.read_bytes() == whole
    built()
    assert builds(cache) == 2


def test_a_build_that_failed_is_not_tried_by_every_process(cache: Path, built: Any, monkeypatch: Any) -> None:
    compiled = cpp._compiled
    tries = fail(monkeypatch, "  kernels.cu(3): error: no such thing")
    with pytest.raises(RuntimeError, match="Error building extension"):
        built()
    path = cache / "_queue" / "_queue.failed"
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"RuntimeError: kernels.cu\(3\): error: no such thing; it failed 0.0 h ago"
        ) as e:
            built()
        assert f"remove {path} to do so now" in str(e.value)
    assert len(tries) == 1
    # Other tools, a day, or somebody who removes what is remembered: each is reason to try again.
    with pytest.raises(RuntimeError, match="Error building extension"):
        cpp.build("_queue", [], "a test", further="another toolkit")
    os.utime(path, (time.time() - 90000,) * 2)
    with pytest.raises(RuntimeError, match="Error building extension"):
        cpp.build("_queue", [], "a test", further="another toolkit")
    assert len(tries) == 3
    path.unlink()
    monkeypatch.setattr(cpp, "_compiled", compiled)
    assert built().SimpleQueue is not None
    assert not path.exists()


KILLED, NO_SPACE = "c++: error: Killed signal terminated program cc1plus", "No space left on device"


@pytest.mark.parametrize(
    ("said", "kind"), [(KILLED, RuntimeError), (NO_SPACE, RuntimeError), ("interrupted", KeyboardInterrupt)]
)
def test_what_is_no_word_on_the_sources_is_not_remembered(cache, built, monkeypatch, said, kind) -> None:
    compiled = cpp._compiled
    fail(monkeypatch, said, kind)
    with pytest.raises(kind, match="Error building extension"):
        built()
    monkeypatch.setattr(cpp, "_compiled", compiled)
    assert built().SimpleQueue is not None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nobody_waits_for_a_build_that_was_killed(cache: Path, how: signal.Signals) -> None:
    cache.mkdir(mode=0o700)
    (cache / "_queue").mkdir(mode=0o700)
    (cache / "_queue" / "lock").touch()  # as torch's own lock, which stays behind
    first = begun(SLOWLY="300")
    first.send_signal(how)
    first.wait(timeout=30)
    run()
    assert builds(cache) == 2


def test_processes_started_together_build_once_and_say_what_they_wait_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(SLOWLY="when told")
    second = process()
    assert second.stderr is not None
    told = iter(second.stderr.readline, "")
    line = next(line for line in told if "another process is building a test" in line)
    assert str(cache / "_queue") in line
    first.communicate("\n", timeout=60)
    assert second.communicate(timeout=60)[0] == "done\n"
    assert builds(cache) == 1


def test_a_build_that_never_ends_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TURN", 0.1)
    monkeypatch.setattr(locks, "SILENT", 0.1)
    first = begun(SLOWLY="300")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="_queue"):
        cpp.build("_queue", [], "a test")
    assert time.monotonic() - began < 30
    first.kill()
    first.communicate()


@pytest.mark.parametrize("which", ["the cache", "the library's folder"])
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_cache_that_others_may_write_to_is_refused(cache: Path, built: Any, which: str, mode: int) -> None:
    built()
    folder = cache if which == "the cache" else cache / "_queue"
    folder.chmod(mode)
    for attempt in (lambda: cpp.cached("_queue"), lambda: cpp.build("_queue", [], "a test")):
        with pytest.raises(PermissionError, match=f"{folder} may be written to by others"):
            attempt()
    folder.chmod(0o755)
    assert cpp.cached("_queue") is not None


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_a_cache_of_ones_own_making_is_private(cache: Path, built: Any, umask: int) -> None:
    """As with the umask of Fedora and Ubuntu, by which a user's group may write."""
    before = os.umask(umask)
    try:
        built()
        assert builds(cache) == 1
        built()
        assert builds(cache) == 1
    finally:
        os.umask(before)


def test_a_cache_of_another_user_is_refused(cache: Path, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if os.getuid() == 0:
        os.chown(cache, 4242, -1)
    with pytest.raises(PermissionError, match="belongs to user"):
        cpp.cached("_queue")


@pytest.mark.parametrize("value", ["", "relative/folder", "."])
def test_a_cache_home_that_is_not_absolute_does_not_count(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.delenv("MFA_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cpp.cache_folder() == Path.home() / ".cache" / "mfa_kernels"


def test_a_refusal_leaves_plain_pytorch_and_says_so(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    code = "import torch, mfa_kernels; print(mfa_kernels.MFA(5, 4, 2).log_prob(torch.zeros(3, 4)).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torch.Size([3])"
    assert f"PermissionError: {cache} may be written to by others" in done.stderr
