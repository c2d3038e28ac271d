"""The C++ library under AddressSanitizer and UndefinedBehaviorSanitizer, in a Python that was not built for them.

`python -m pytest -p tests.helpers.sanitized ...` runs tests on it, `python -m tests.helpers.sanitized COUNT SEED` wrong
calls. Either needs the environment of `environment`: the sanitizers must be in a process before anything else is. A
report ends it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mfa_kernels.ops.common import cpp

FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
_RUNTIMES = (
    "libasan.so",
    "libubsan.so",
    "libstdc++.so.6",
)  # the last, so that exceptions are found when they are thrown


def pytest_configure() -> None:
    """What makes this module a plugin: the library of this process is the sanitized one."""
    cpp.FLAGS[:] = [flag for flag in cpp.FLAGS if flag != "-O3"] + FLAGS


def environment(compiler: str, cache: Path) -> dict[str, str]:
    """Variables of a process that loads the library as g++ builds it."""

    def found(name: str) -> str:
        command = [compiler, f"-print-file-name={name}"]
        return os.path.realpath(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())

    return {
        **os.environ,
        "CXX": compiler,
        "MFA_KERNELS_CACHE": str(cache),
        "LD_PRELOAD": ":".join(map(found, _RUNTIMES)),
        # What Python never frees is no leak of ours; the compiler, which inherits all of this, has leaks of its own.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_segv=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def is_sanitized() -> bool:
    """Whether the library that this process loaded reports what it should."""
    library = cpp.library()
    return library is not None and b"__asan_report_load" in Path(library.__file__).read_bytes()


def pytest_sessionstart() -> None:
    assert is_sanitized()


def fault() -> None:
    """Reads beyond the end of a tensor: what every other run must not do."""
    import ctypes

    import torch

    library, x = cpp.library(), torch.zeros(64)
    beyond = torch.frombuffer((ctypes.c_float * 4096).from_address(x.data_ptr()), dtype=torch.float32)
    library.nearest(beyond.view(64, 64), torch.zeros(8, 64), torch.zeros(64), None, None, 0.0)


if __name__ == "__main__":
    from tests.ops import fuzz

    pytest_configure()
    assert is_sanitized()
    if sys.argv[1] == "fault":
        fault()
    fuzz.main(int(sys.argv[1]), int(sys.argv[2]), "cpp")
