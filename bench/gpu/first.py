"""The first stage: whether anything is wrong, within 90 seconds, so that it can be mended before the second."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu import problems
from bench.gpu.harness import SETS, Bench, Results
from bench.gpu.watch import profiled
from mfa_kernels.commands import check_kernels, doctor

_BUILD = "from mfa_kernels.ops.common import cuda; print(cuda.library())"


def environment(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """The machine; and the build of the CUDA library begins, beside what follows."""
    found: dict[str, Any] = {
        name: doctor.version(name) for name in ("mfa_kernels", "torch", "triton", "transformers", "pytest")
    }
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda, "cpus": os.cpu_count()}
    if bench.rehearsal:
        return found
    chip = torch.cuda.get_device_properties(0)
    found |= {
        "device": chip.name, "capability": f"{chip.major}.{chip.minor}",
        "multiprocessors": chip.multi_processor_count, "memory_gb": chip.total_memory / 1e9,
        "l2_mb": getattr(chip, "L2_cache_size", 0) / 1e6,
    }  # fmt: skip
    query = [
        "nvidia-smi",
        "-i",
        "0",
        "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
        "--format=csv,noheader",
    ]
    with contextlib.suppress(OSError):
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    log = (folder / "cuda-build.log").open("w")
    bench.building = subprocess.Popen([sys.executable, "-c", _BUILD], stdout=log, stderr=subprocess.STDOUT)
    return found


def smoke(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """One call of each public function, against float64, before anything is measured."""
    problem = problems.make(bench, problems.Shape(64, 40, 64, 3))
    mfa, x = problem.mfa, problem.batches[0]
    with torch.no_grad():
        found, truth = mfa.log_prob(x).double(), problems.log_prob_fp64(problem, x)
        error = float(((found - truth).abs() / truth.abs()).max())
    if not error < problems.RELATIVE_ERROR:
        raise AssertionError(f"log p(x) is off by {error:.1e} of itself")
    mfa(x).backward()
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mfa.parameters()):
        raise AssertionError("a gradient is missing or not finite")
    code = mfa.encode(x)
    return {"relative_error": error, "reconstruction": tuple(mfa.decode(code).shape)}


def kernel_check(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """Every family of kernels at its first use, against float64: processes of their own, which compile at once."""
    if bench.rehearsal:
        with mock.patch.dict(os.environ, {"MFA_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "1"}):
            findings = [check_kernels.alone("cluster sums", "cpu", 300, (1, 17))]
    else:
        findings = list(check_kernels.run_all("cuda", 120, at_once=12))
    found = {finding.family: finding.note or f"passed in {finding.seconds:.0f} s" for finding in findings}
    if bench.building is not None:  # those processes have waited for it, or gone on without it
        status = bench.building.wait(60)
        found["CUDA library"] = (folder / "cuda-build.log").read_text()[-500:] if status else "built"
    return {"refused": sum(not finding.passed for finding in findings), **found}


def sums(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """How far the tensor cores' sums are off, over what the bounds of the scan allow: at most 1."""
    from mfa_kernels.ops.common import triton_probe

    if bench.rehearsal:
        return {"skipped": "no tensor cores"}
    found = {f"D={features}": triton_probe.of_device(bench.device, features) for features in (576, 2304, 4096)}
    if max(found.values()) > 1:
        raise AssertionError(f"sums are off by more than the bounds allow: {found}")
    return found


def ceilings(bench: Bench, results: Results, folder: Path, all_of_them: bool = False) -> dict[str, Any]:
    """Matrix products through torch, and a device-to-device copy counting bytes read and written."""
    side, like = 64 if bench.rehearsal else 8192, {"device": bench.device}
    shape = problems.shape(bench, 8192, problems.LLAMA)
    products = {"bf16": (torch.bfloat16, side, side, side)}
    if all_of_them:
        wide = shape.components * (shape.rank + 1)
        products |= {
            "fp16": (torch.float16, side, side, side),
            "bf16_scan_shape": (torch.bfloat16, shape.tokens, shape.features, wide),
            "fp32": (torch.float32, side // 2, side // 2, side // 2),
        }
    found: dict[str, Any] = {}
    for name, (dtype, m, k, n) in products.items():
        left = [torch.randn(m, k, dtype=dtype, **like) for _ in range(SETS)]
        right = torch.randn(k, n, dtype=dtype, **like) if n > 2 * side else None
        rights = [torch.randn(k, n, dtype=dtype, **like) if right is None else right for _ in range(SETS)]
        out = torch.empty(m, n, dtype=dtype, **like)
        timing = bench.median(lambda i, a=left, b=rights, out=out: torch.mm(a[i], b[i], out=out))
        found[f"{name}_tflops"] = 2 * m * n * k / timing.median / 1e12
        del left, right, rights, out
        bench.clean()
    count = 1 << 12 if bench.rehearsal else 1 << 30
    sources = [torch.randn(count, **like) for _ in range(SETS)]
    target = torch.empty(count, **like)
    timing = bench.median(lambda i: target.copy_(sources[i]))
    return {**found, "copy_gb_per_s": 2 * target.nbytes / timing.median / 1e9}


def profiled_scan(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """Where the time of the scan of 16,384 tokens goes, and of the one of a single token."""
    problem = problems.make(bench, problems.shape(bench, 8192, problems.LLAMA))
    mfa, batches = problem.mfa, problem.batches
    with torch.no_grad():
        many = profiled(bench, lambda i: mfa.log_prob(batches[i]))
        one = profiled(bench, lambda i: mfa.log_prob(batches[i][:1]))
    return {**many, "one_token": one}


def sanitizer(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """compute-sanitizer's memcheck over the small problems of the scan: accesses that no test sees."""
    program = shutil.which("compute-sanitizer")
    if bench.rehearsal or program is None:
        return {"skipped": "no compute-sanitizer"}
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MFA_KERNELS_TRUST": "off"}
    found: dict[str, Any] = {}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
        command += ["mfa_kernels.commands.check_kernels", "scan", "cuda", "17"]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
            found[tool] = "clean" if done.returncode == 0 else done.stdout[-1500:]
        except subprocess.TimeoutExpired:
            found[tool] = "not done after 60 s"
    return found
