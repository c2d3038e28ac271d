"""Every Triton kernel compiles for the GPUs we ship for, within its registers and shared memory (no GPU needed).

For Hopper; with --more, for all of them.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bench import aot

pytest.importorskip("triton", reason="no Triton on this machine")


def compiled(*arguments: str, folder: Path) -> tuple[int, list[dict]]:
    """Exit status and rows of `python -m bench.aot`, in a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = folder / "aot.json"
    command = [sys.executable, "-m", "bench.aot", *arguments, "--json", str(path)]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert path.exists(), out.stderr[-4000:]
    return out.returncode, json.loads(path.read_text())


@pytest.fixture(scope="module")
def architectures(request) -> list[int]:
    return list(aot.ARCHITECTURES) if request.config.getoption("--more") else [90]


@pytest.fixture(scope="module")
def package(tmp_path_factory, architectures) -> list[dict]:
    if not aot.modules():
        warnings.warn("no Triton kernels in the package: nothing is compiled", stacklevel=1)
        pytest.skip("no Triton kernels in the package")
    return compiled("--sm", *map(str, architectures), folder=tmp_path_factory.mktemp("aot"))[1]


def test_every_kernel_ships(package):
    """Compiled, no spills, shared memory within the chip, the scan on the chip's own matrix instructions."""
    bad = {f"{r['module']}.{r['kernel']} sm_{r['architecture']}": r["problems"] for r in package if r["problems"]}
    assert not bad


def test_no_module_and_no_architecture_is_skipped(package, architectures):
    def defines_kernels(name: str) -> bool:  # others hold what kernels share, or launch those of others
        source = Path(importlib.util.find_spec(name).origin).read_text()
        return re.search(r"^def \w+_kernel\(", source, re.MULTILINE) is not None

    modules = {name for name in aot.modules() if defines_kernels(name)}
    assert {row["module"] for row in package} == modules
    for name in modules:
        assert {row["architecture"] for row in package if row["module"] == name} == set(architectures)


def test_what_it_sees_in_known_kernels(tmp_path):
    module = "tests.ops.aot_kernels"
    status, rows = compiled(module, "--calls", module, "--sm", "90", "--processes", "1", folder=tmp_path)
    found = {row["kernel"]: row for row in rows}
    assert status == 1
    good = found["scan_kernel"]
    assert good["problems"] == []
    assert good["tensor_cores"]["HGMMA"] > 0
    assert 0 < good["registers"] <= 255
    assert 64 << 10 <= good["shared"] <= 227 << 10  # at least two stages of two tiles of 16 KB
    assert good["instructions"]["LDGSTS.128"] == good["instructions"]["LDGSTS"] > 0
    assert "no HGMMA" in found["scan_in_fp32_kernel, float32"]["problems"][0]
    assert found["scan_kernel, spilling"]["spills"] > 0
    assert "accesses to local memory" in found["scan_kernel, spilling"]["problems"][0]
    assert any("shared memory" in problem for problem in found["scan_kernel, too large"]["problems"])
    assert "arange" in found["scan_kernel, broken"]["error"]
    assert found["forgotten_kernel"]["problems"] == ["never launched"]


def test_combinations_of_every_two_values():
    factors = {"a": (1, 2, 3), "b": (False, True), "c": ("x", "y", "z", "w")}
    found = aot.pairwise(factors)
    assert len(found) <= 14  # 12 at least, and 24 in all
    for first, second in itertools.combinations(factors, 2):
        met = {(one[first], one[second]) for one in found}
        assert met == set(itertools.product(factors[first], factors[second]))


@pytest.mark.more
def test_variants_are_compiled_and_named(tmp_path):
    module = "mfa_kernels.ops.scan.triton_scan"
    status, rows = compiled(module, "--variants", "pairwise", "--first", "2", folder=tmp_path)
    assert status == 0
    assert len(rows) > 2
    assert len({row["kernel"].split(" (N=")[1] for row in rows}) == 2
    assert {row["module"] for row in rows} == {module}


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as refused:
        aot.main([])
    assert refused.value.code == 2
    assert "unset it" in capsys.readouterr().err
