"""Shared fixtures: both CPU backends, poisoned memory, a single thread."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import shutil
import sys
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a Triton kernel is defined: without a GPU, the kernels run in Triton's interpreter on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mfa_kernels.ops.common import cpp, trust
from tests.helpers import interpreter
from tests.helpers.threads import threads

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.speed_up()

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt

LOST = re.compile("CUDA error: (an illegal memory access|misaligned address|unspecified launch failure)")
NOT_APPLICABLE = "not applicable: "  # how the reason of a skip begins that nothing installed would prevent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--more", action="store_true", help="the tests marked `more` too; what is missing fails a test")


LONGEST = [
    "tests/distributed",
    "tests/ops/test_aot.py",
    "tests/ops/scan/test_triton_pipeline.py",
    "tests/ops/common/test_cuda.py",
    "tests/steering/test_compile.py",
    "tests/gpu/test_rehearsal.py",
    "tests/common/test_killed.py",
    "tests/ops/kmeans/test_triton_kmeans.py",
    "tests/steering/test_reading.py",
    "tests/steering/test_by_hand.py",
    "tests/ops/screen/test_triton_screen.py",
    "tests/ops/scan/test_scan.py",
    "tests/commands/test_cli.py",
    "tests/commands/test_tune.py",
]
"""What takes longest, in order: under pytest-xdist it begins first, so that no process is left alone with it."""


def _keep_memory() -> None:
    """Tells glibc to keep what is freed: it would give the pages of many small tensors back, to fault them in again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in ((_TRIM_THRESHOLD, 1 << 30), (_MMAP_THRESHOLD, 1 << 28)):
            mallopt(parameter, value)


def pytest_configure(config: pytest.Config) -> None:
    """Under pytest-xdist, each process has its share of the cores, and what it starts too."""
    config.option.loadscopereorder = False  # by the number of tests: ours is by their length
    _keep_memory()
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        share = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))
        torch.set_num_threads(share)


def pytest_collection_finish() -> None:
    """Torch and all tests are there to stay: to look for garbage among them takes long, and is not done so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def group(nodeid: str) -> str:
    """The tests of a file stay in one process, for its fixtures; those of several processes all do."""
    file = nodeid.partition("::")[0]
    return "tests/distributed" if file.startswith("tests/distributed/") else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `more` are left out unless asked for; under pytest-xdist, the longest come first."""
    if not config.getoption("--more"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("more")])
        items[:] = [item for item in items if not item.get_closest_marker("more")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(group(item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole groups. (pytest-xdist 3.8 writes them into names that pytest 9.2 does not read any more.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log) if config.getoption("dist") == "loadgroup" else None


def _fail_what_is_missing(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A skip becomes a failure, but for one that says that the test is not applicable."""
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(NOT_APPLICABLE):
            report.outcome, report.longrepr = "failed", f"with --more nothing may be missing: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None and LOST.search(str(call.excinfo.value)):
        # The device is gone for this process, and every later test would fail; pytest-xdist starts another process.
        print(f"{item.nodeid} lost the device: {call.excinfo.value}", file=sys.__stderr__, flush=True)
        os._exit(3)
    if item.config.getoption("--more") and not item.get_closest_marker("gpu"):
        _fail_what_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if collector.config.getoption("--more"):
        _fail_what_is_missing(report)
    return report


@pytest.fixture
def no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense scan is that of a processor that gains nothing by int8."""
    from mfa_kernels.ops.woodbury import int8

    monkeypatch.setattr(int8, "pays", lambda woodbury: False)


@pytest.fixture(params=["cpp", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the C++ kernels and on plain PyTorch."""
    if request.param == "portable":
        monkeypatch.setattr(cpp, "library", lambda: None)
        trust._lanes.clear()  # as in a process that has seen no library
    elif cpp.library() is None:
        warnings.warn("no C++ library on this machine: the C++ backend is not tested", stacklevel=1)
        pytest.skip("the C++ kernels could not be built here")
    return request.param


@pytest.fixture
def needs_cpp() -> None:
    """For what plain PyTorch does not do, or not in one order."""
    if cpp.library() is None:
        pytest.skip("the C++ kernels could not be built here")


@pytest.fixture
def needs_screens(needs_cpp: None) -> None:
    """For what is screened because it pays: bounds in int8 cost more than the dense scan where they are emulated."""
    if cpp.library().int8_rate < 1:
        pytest.skip("not applicable: the processor has no instruction for products of int8")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many short operations: a second thread would only cost time."""
    with threads(1):
        yield


@pytest.fixture
def places(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with all that a module has made."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every freshly allocated tensor, in C++ too, holds NaN or the largest integer until it is written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
