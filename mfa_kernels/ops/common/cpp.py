"""Builds csrc/cpu by ninja on first use, caches the library, and loads it. Nothing happens at import time."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mfa_kernels.common import checksum, locks
from mfa_kernels.common.files import atomic_write_text

# The last two: notes of gcc on how vectors are passed, of clang on loops whose length it finds to be no constant.
FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-Wno-pass-failed"]

_FUSED = "--param=avoid-fma-max-bits=0"
"""GCC's word for a multiply-add in one instruction, everywhere.

Tuned for some processors (Zen 2 and Zen 3, of those tried), it splits sums of products in some loops and not in others:
a value would depend on which loop it was computed in.
"""

_MARCH = "MFA_KERNELS_MARCH"
_REMEMBERED = 86400.0  # seconds for which a build that failed is not tried again
# Of a compiler that had no memory, no room or no time: what is no word on the sources is not remembered.
_PASSING = re.compile(r"(?i)signal|killed|out of memory|cannot allocate|no space left|size limit|disk quota|read-only")
_BUILD = "build-"  # what the names of the folders of builds begin with
_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


def source_folder(backend: str = "cpu") -> Path:
    """The folder csrc/<backend>: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside, beside = package / "csrc" / backend, package.parent / "csrc" / backend
    return inside if inside.is_dir() else beside


def cache_folder() -> Path:
    """The folder of built libraries: $MFA_KERNELS_CACHE, or the user's cache folder."""
    chosen = os.environ.get("MFA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")  # by the XDG specification, one that is not absolute does not count
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "mfa_kernels"


def check_private(folder: Path) -> None:
    """Raises where another user may have put a library into a folder, or may do so.

    Raises:
        PermissionError: naming the folder and what to do.
    """
    if not hasattr(os, "geteuid"):
        return
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{folder} belongs to user {found.st_uid}, who could put any code into it: set MFA_KERNELS_CACHE to a "
            "folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{folder} may be written to by others, who could put any code into it: chmod go-w {folder}, or set "
            "MFA_KERNELS_CACHE to a folder of your own"
        )


def library_name() -> str:
    """Name of the library for these sources, this Torch, this Python and this processor."""
    found = compiler()
    built_by = "none" if found is None else f"{os.path.realpath(found)} {compiler_version(found)}"
    # -march=native: a cache shared between machines must not hand one's instructions to the other.
    processor = _processor_flags() if architecture() == "native" else ""
    return name_for("cpu", source_folder(), [built_by, processor, *flags()])


def architecture() -> str:
    """The processors to compile for: $MFA_KERNELS_MARCH, as the compiler's -march takes it; else "native".

    "x86-64-v3" (AVX2) or "x86-64-v4" (AVX-512) give machines of different make one library, where they share a cache.
    """
    chosen = os.environ.get(_MARCH) or "native"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", chosen):
        raise ValueError(f"MFA_KERNELS_MARCH must be an architecture, as in -march=native, got {chosen!r}")
    return chosen


def flags() -> list[str]:
    """The flags of the compiler for csrc/cpu."""
    program = compiler()
    return [*FLAGS, *(() if program is None else fusing(program)), f"-march={architecture()}"]


@functools.cache
def fusing(program: str) -> tuple[str, ...]:
    """The flags that keep a compiler from splitting multiply-adds; none where it does not know of such a thing."""
    command = [program, _FUSED, "-Werror", "-x", "c++", "-fsyntax-only", os.devnull]
    out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return () if out.returncode else (_FUSED,)


def name_for(backend: str, sources: Path, facts: list[str]) -> str:
    """Name of a library that is built from these sources; `facts` is what else a build depends on, beyond Torch,
    Python and the kind of machine."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources.rglob("*") if p.is_file() and p.suffix != ".md"):
        digest.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update("\0".join([torch.__version__, sys.version, platform.machine(), *facts]).encode())
    return f"mfa_kernels_{backend}_{digest.hexdigest()[:16]}"


def _processor_flags() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def compiler() -> str | None:
    """The C++ compiler that a build would use: $CXX, else c++ or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


@functools.cache
def compiler_version(program: str) -> str:
    """The first line of a compiler's description of itself."""
    out = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    return (out.splitlines() or ["?"])[0]


class UnknownArchitecture(ValueError):
    """$MFA_KERNELS_MARCH names what the compiler does not know."""


def _check_architecture(program: str) -> None:
    """Raises where $MFA_KERNELS_MARCH is set to what the compiler does not take."""
    if architecture() == "native":
        return
    command = [program, f"-march={architecture()}", "-x", "c++", "-fsyntax-only", os.devnull]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        why = next((line for line in out.stderr.splitlines() if "error" in line), f"status {out.returncode}")
        raise UnknownArchitecture(
            f"{_MARCH} must be an architecture that {program} knows, got {architecture()!r} ({why.strip()})"
        )


def _check_openmp(program: str) -> None:
    """Says what is missing where the compiler builds no OpenMP program, before a long build fails of it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openmp.cpp"
        source.write_text(_OPENMP)
        command = [program, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        why = next((line for line in out.stderr.splitlines() if "error" in line), f"status {out.returncode}")
        raise RuntimeError(
            f"{program} builds no OpenMP programs: install its runtime (for clang libomp-dev), or set CXX to another "
            f"compiler; {why.strip()}"
        )


def ninja() -> str | None:
    """The ninja program: on the PATH, or the one in this Python's environment."""
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        from ninja import BIN_DIR

        found = shutil.which("ninja", path=BIN_DIR)
    return found


def is_built() -> bool:
    """True where the library for these sources is in the cache."""
    return _file(library_name()).is_file()


def _file(name: str) -> Path:
    return cache_folder() / name / f"{name}.so"


def is_on() -> bool:
    """True where kernels may be built: ``MFA_KERNELS_NATIVE=0`` forbids it.

    Raises:
        ValueError: it says something else than 0 or 1.
    """
    chosen = os.environ.get("MFA_KERNELS_NATIVE") or "1"
    if chosen not in ("0", "1"):
        raise ValueError(f"MFA_KERNELS_NATIVE must be 0 or 1, got {chosen!r}")
    return chosen == "1"


_problem: list[str] = []


def problem() -> str | None:
    """Why `library` could not be built, in a line; None where it could, or was not tried."""
    return _problem[0] if _problem else None


@functools.cache
def library() -> Any:
    """The loaded C++ library, built first if need be; None (after one warning) where it cannot be built.

    ``MFA_KERNELS_NATIVE=0`` turns it off: the portable PyTorch path then serves every CPU tensor.
    """
    if not is_on():
        return None
    architecture()  # an unknown word is an error of the user, and no want of this machine
    try:
        name = library_name()
        found = cached(name)
        if found is None:
            program = compiler()
            if program is not None:
                _check_architecture(program)
                _check_openmp(program)
            sources = sorted(source_folder().rglob("*.cpp"))
            what = "the C++ kernels, once (about a minute on two cores)"
            found = build(name, sources, what, extra_cflags=flags(), extra_ldflags=["-fopenmp"])
        return found
    except UnknownArchitecture:
        raise
    except Exception as error:  # whatever the toolchain does, the portable path gives the same results
        _problem[:] = [reason(error)]
        warnings.warn(
            f"mfa_kernels: the C++ kernels could not be built ({problem()}); using plain PyTorch on the CPU, "
            "which is slower and gives the same results. `mfa-kernels doctor` says what is missing.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def cached(name: str) -> ModuleType | None:
    """The library from the cache; None where it is not there, or not as it was built (`build` makes it anew).

    Raises:
        PermissionError: others may write to the cache.
    """
    path = _file(name)
    if not path.is_file():
        return None
    for folder in (cache_folder(), path.parent):
        check_private(folder)
    try:
        if _digest_file(path).read_text() != checksum.of_file(path):
            return None
    except OSError:  # a build that was killed, or is going on
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError:
        return None


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def build(name: str, sources: list[Path], what: str, further: str = "", **options: Any) -> ModuleType:
    """Compiles the sources into the cache and loads the library.

    A build that fails is remembered for a day: other processes would spend their minute on the same end.

    Args:
        name: from `name_for`.
        sources: C++ files, and CUDA ones.
        what: is being built, in words, for the line on stderr.
        further: what the end of a build depends on besides its name and the C++ compiler, in a line.
        options: of torch.utils.cpp_extension.load.
    """
    built_by = compiler()
    if built_by is None:
        raise RuntimeError("no C++ compiler found (c++ or g++, or the CXX environment variable)")
    program = ninja()
    if program is None:
        raise RuntimeError("ninja not found: pip install ninja")
    library = _file(name)
    for folder in (cache_folder(), library.parent):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # where a umask leaves groups in, they are not wanted
        check_private(folder)
    with locks.in_turn(library.parent, f"building {what}"):
        found = cached(name)  # another process may have built it meanwhile
        if found is None:
            tools = f"{built_by} {compiler_version(built_by)} {further}".strip()
            _raise_remembered(library, tools)
            try:
                found = _compiled(name, sources, what, program, built_by, **options)
            except (RuntimeError, ImportError) as error:
                if not _PASSING.search(str(error)):
                    atomic_write_text(_failure_file(library), f"{tools}\n{reason(error)}\n")
                raise
            atomic_write_text(_digest_file(library), checksum.of_file(library))
            _failure_file(library).unlink(missing_ok=True)
        return found


def _failure_file(library: Path) -> Path:
    return library.with_suffix(".failed")


def _raise_remembered(library: Path, tools: str) -> None:
    """Raises what a build by the same tools ended with a short while ago."""
    path = _failure_file(library)
    try:
        age = time.time() - path.stat().st_mtime
        before, reason, *_ = path.read_text().splitlines()
    except (OSError, ValueError):
        return
    if before == tools and 0 <= age < _REMEMBERED:
        raise RuntimeError(f"{reason}; it failed {age / 3600:.1f} h ago and is not tried again before a day is over: "
                           f"remove {path} to do so now")  # fmt: skip


def reason(error: Exception) -> str:
    """The kind of an error and the line of it that says most: a compiler's own, where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if re.search(r"\berror\b:", line)), lines[-1] if lines else "")
    return f"{type(error).__name__}: {said[:300]}"


def _compiled(name: str, sources: list[Path], what: str, program: str, built_by: str, **options: Any) -> ModuleType:
    """Compiles and loads, in a folder that is locked.

    Each build has a folder of its own: of one that was killed, compilers may still be running and write to theirs.
    """
    from torch.utils import cpp_extension

    for left in _file(name).parent.glob(f"{_BUILD}*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_BUILD, dir=_file(name).parent))
    print(f"mfa_kernels: building {what}...", file=sys.stderr, flush=True)
    path, chosen = os.environ.get("PATH", ""), os.environ.get("CXX")
    os.environ["PATH"] = f"{Path(program).parent}{os.pathsep}{path}"
    os.environ["CXX"] = built_by  # the one that the name tells of
    try:
        module = cpp_extension.load(name, [str(s) for s in sources], build_directory=str(folder), **options)
        os.replace(folder / f"{name}.so", _file(name))
        module.__file__ = str(_file(name))
        return module
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.environ["PATH"] = path
        del os.environ["CXX"]
        if chosen is not None:
            os.environ["CXX"] = chosen
