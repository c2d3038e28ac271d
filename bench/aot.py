"""Compiles every Triton kernel ahead of time, without a GPU, and counts its machine code: python -m bench.aot.

The calls of bench/launches.py run the package's own code on tensors without memory. Each launch that they make is
compiled as Triton would compile it on a GPU: for the same types and constants, and for sizes that are 1 or divisible
by 16.

`--variants pairwise` compiles for each pair of values of what machine code depends on (`VARIANTS`), `--variants all`
for their product.

Exits with 1 and says why where a kernel (a function named *_kernel) is never launched, does not compile, spills, needs
more shared memory than the chip has, or is one of the scans and does not use the chip's newest matrix instructions.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from mfa_kernels.ops.common import configs, cuda

ARCHITECTURES = (80, 90, 100)
EVERY = (80, 86, 89, 90, 100, 120)
"""Architectures of the variants."""
VARIANTS: dict[str, tuple[Any, ...]] = {
    "tokens": (16, 32, 64, 16384), "rank": (1, 3, 10, 64), "dtype": ("bfloat16", "float32"), "own": (False, True),
    "architecture": EVERY,
}  # fmt: skip
"""What machine code depends on: the bucket of tokens, R, the dtype of x, whether noise is per component, the chip."""
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that one program may ask for, bytes (CUDA C++ programming guide, compute capabilities)."""
SHAPE = (16384, 8192, 4096, 10)
"""N, K, D and R of the launches."""
ONES = (1, 1, 1, 1)
_SHARED_PER_MULTIPROCESSOR = {
    80: 164 << 10,
    86: 100 << 10,
    89: 100 << 10,
    90: 228 << 10,
    100: 228 << 10,
    120: 100 << 10,
}
_THREADS = {86: 1536, 89: 1536, 120: 1536}  # per multiprocessor; of the others 2048
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Za-z0-9_]+)*)", re.M)
_TENSOR = re.compile(r"(?:H|Q|I|D|O)MMA|[HQI]GMMA|UTC\w*MMA")
_SCAN_INSTRUCTION = {90: "HGMMA", 100: "UTCHMMA"}  # wgmma, tcgen05; mma of the others
_NEWEST_TOKENS = 64  # of which wgmma and tcgen05 multiply so many at least: tiles of fewer take mma
_SCANS = ("scan", "nearest")  # how the names of kernels begin that the matrix units must do
_LOADS = ("LDG", "LDGSTS", "UTMALDG")


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory per program.
        stack: bytes of local memory per thread that the code reserves.
        resident: programs that fit a multiprocessor at once, by registers, shared memory and threads.
        instructions: opcode -> count in the machine code; loads of 8 and 16 bytes a thread count once more, as
            "LDG.64" and "LDG.128".
        error: empty, or why there is no code.
    """

    kernel: str
    module: str
    architecture: int
    warps: int = 0
    registers: int = 0
    shared: int = 0
    stack: int = 0
    resident: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    error: str = ""
    tokens: int = SHAPE[0]

    @property
    def spills(self) -> int:
        """Instructions that touch local memory: spilled registers, or an array indexed at run time."""
        return sum(self.instructions.get(name, 0) for name in ("STL", "LDL"))

    @property
    def tensor_cores(self) -> dict[str, int]:
        """Matrix instructions by opcode: HMMA (mma), HGMMA (wgmma), UTCHMMA (tcgen05), ..."""
        return {name: count for name, count in self.instructions.items() if _TENSOR.fullmatch(name)}

    @property
    def problems(self) -> list[str]:
        """Reasons not to ship: no code, spills, more shared memory than there is, a scan off the matrix units."""
        if self.error:
            return [self.error]
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} accesses to local memory, {self.stack} bytes of it per thread")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory; the chip has {SHARED_LIMIT[self.architecture]}")
        if self.kernel.startswith(_SCANS):
            newest = self.tokens >= _NEWEST_TOKENS
            wanted = _SCAN_INSTRUCTION.get(self.architecture, "HMMA") if newest else "HMMA"
            if wanted not in self.tensor_cores:
                found.append(f"no {wanted}: {self.tensor_cores or 'no matrix instruction at all'}")
        return found


def modules() -> list[str]:
    """Names of the package's modules that hold Triton kernels."""
    root = Path(configs.__file__).parents[1]
    parts = [path.relative_to(root).with_suffix("").parts for path in sorted(root.rglob("triton_*.py"))]
    return [".".join(("mfa_kernels", "ops", *part)) for part in parts]


class _Driver:
    """Stands for a GPU of an architecture where Triton asks for the one that it compiles for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


class Launch(NamedTuple):
    """A launch, named by its kernel and by the call that makes it; `compile()` returns its machine code, which `code`
    stands for."""

    name: str
    module: str
    kernel: str
    compile: Callable[[], Any]
    code: tuple[str, ...]


@functools.cache
def launches(calls: str, architecture: int, shape: tuple[int, ...] = SHAPE) -> list[Launch]:
    """Every launch of the calls of a module, without those that repeat the machine code of an earlier one."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(architecture))
    run, found, launched = JITFunction.run, {}, []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append((kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(configs, "architecture", return_value=architecture),
        mock.patch.object(cuda, "library", return_value=None),
    ):
        for call, launch in importlib.import_module(calls).calls(*shape).items():
            launched.clear()
            launch()
            for kernel, args, kwargs in launched:
                name = f"{kernel.__name__}, {call}" if call else kernel.__name__
                _, specialization, options = kernel.device_caches[architecture][-1](*args, **kwargs)
                machine_code = functools.partial(run, kernel, *args, grid=None, warmup=True, **kwargs)
                key = (kernel.module, kernel.__name__, str(specialization), str(options))
                found.setdefault(key, Launch(name, kernel.module, kernel.__name__, machine_code, key))
    return list(found.values())


def compiled(calls: str, index: int, architecture: int, shape: tuple[int, ...]) -> Row:
    """Compiles one launch and reads its machine code."""
    from triton.runtime import driver

    launch = launches(calls, architecture, shape)[index]
    driver.set_active(_Driver(architecture))
    row: dict[str, Any] = {"kernel": launch.name, "module": launch.module, "architecture": architecture}
    try:
        code = launch.compile()
    except Exception as error:  # one kernel that does not compile must not hide the others
        return Row(**row, error=f"{type(error).__name__}: {error}".strip()[-2000:])
    row |= resources(code.asm["cubin"])
    row |= {"warps": code.metadata.num_warps, "shared": code.metadata.shared}
    threads = 32 * row["warps"]
    row["resident"] = min(
        65536 // (threads * -(-row["registers"] // 8) * 8),
        _SHARED_PER_MULTIPROCESSOR[architecture] // (row["shared"] + 1024),  # the system keeps 1 KB per program
        _THREADS.get(architecture, 2048) // threads,
    )
    return Row(**row)


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, local memory and instruction counts of a cubin, from the disassemblers that Triton carries."""
    import triton

    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def read(program: str, *arguments: str) -> str:
        return subprocess.run([binaries / program, *arguments], capture_output=True, text=True, check=True).stdout

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = read("cuobjdump", "-res-usage", str(path)), read("nvdisasm", "-ndf", "-c", str(path))
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    counts: collections.Counter[str] = collections.Counter()
    for opcode, modifiers in _OPCODE.findall(sass):
        counts[opcode] += 1
        for width in {"64", "128"} & set(modifiers.split(".")) if opcode in _LOADS else ():
            counts[f"{opcode}.{width}"] += 1
    if not counts or "REG" not in found:
        raise RuntimeError(f"no machine code found in a cubin of {len(cubin)} bytes: cuobjdump printed {usage!r}")
    counts.pop("NOP", None)
    stack = int(found.get("STACK", 0)) + int(found.get("LOCAL", 0))
    return {"registers": int(found["REG"]), "stack": stack, "instructions": dict(counts)}


def rows(
    module_names: list[str],
    architectures: tuple[int, ...] = ARCHITECTURES,
    processes: int = 2,
    calls: str = "bench.launches",
) -> list[Row]:
    """Every launch of the kernels of these modules on every architecture; kernels never launched are rows too."""
    shapes = [(architecture, SHAPE) for architecture in architectures]
    # A size of 1 becomes a constant, which has no dtype: only whether that compiles is of interest.
    shapes += [(architecture, ONES) for architecture in architectures if architecture == ARCHITECTURES[0]]
    jobs, missing = [], defined(module_names)
    for architecture, shape in shapes:
        for index, launch in enumerate(launches(calls, architecture, shape)):
            if launch.module in module_names:
                jobs.append((calls, index, architecture, shape))
                missing.discard((launch.module, launch.kernel))
    found = _compiled(jobs, processes)
    found = [row for row, job in zip(found, jobs) if row.error or job[-1] == SHAPE]
    return found + [Row(kernel, name, 0, error="never launched") for name, kernel in sorted(missing)]


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few combinations, in which each value of a factor meets each value of every other one; greedy."""
    names = list(factors)
    left = {
        (a, x, b, y)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in factors[a]
        for y in factors[b]
    }  # fmt: skip
    every = [dict(zip(names, values)) for values in itertools.product(*factors.values())]
    found = []
    while left:
        best = max(every, key=lambda one: sum(one[a] == x and one[b] == y for a, x, b, y in left))
        left = {pair for pair in left if not (best[pair[0]] == pair[1] and best[pair[2]] == pair[3])}
        found.append(best)
    return found


def variants(module_names: list[str], combinations: list[dict[str, Any]], processes: int, calls: str) -> list[Row]:
    """The launches of variants of the calls, without those that repeat the machine code of an earlier one."""
    _, components, features, _ = SHAPE
    jobs, seen, texts = [], set(), []
    for one in combinations:
        shape = one["tokens"], components, features, one["rank"], one["dtype"], one["own"]
        for index, launch in enumerate(launches(calls, one["architecture"], shape)):
            if launch.module in module_names and (one["architecture"], launch.code) not in seen:
                seen.add((one["architecture"], launch.code))
                jobs.append((calls, index, one["architecture"], shape))
                noise = ", own noise" if one["own"] else ""
                texts.append(f" (N={one['tokens']} R={one['rank']} {one['dtype']}{noise})")
    found = _compiled(jobs, processes)
    return [replace(row, kernel=row.kernel + text, tokens=job[-1][0]) for row, text, job in zip(found, texts, jobs)]


def _compiled(jobs: list[tuple[Any, ...]], processes: int) -> list[Row]:
    if processes == 1:
        return [compiled(*job) for job in jobs]
    # New interpreters: the compiler's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compiled, *zip(*jobs)))


def defined(module_names: list[str]) -> set[tuple[str, str]]:
    """(module, name) of the kernels that these modules define: their functions named *_kernel."""
    names = ((name, vars(importlib.import_module(name))) for name in module_names)
    return {(name, key) for name, of in names for key in of if key.endswith("_kernel") and of[key].module == name}


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| kernel | sm | warps | registers | shared KB | resident | spills | stack | matrix | loads | all |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda r: (r.module, r.kernel, r.architecture)):
        if row.error:
            lines.append(f"| {row.kernel} | {row.architecture} | {row.error.splitlines()[-1]} |" + " |" * 8)
            continue
        count = row.instructions
        matrix = ", ".join(f"{n} {name}" for name, n in sorted(row.tensor_cores.items())) or "-"
        loads = []
        for name in (n for n in _LOADS if n in count):
            wide = [f"{count[key]} x {size}" for key, size in ((f"{name}.64", 8), (f"{name}.128", 16)) if key in count]
            loads.append(f"{count[name]} {name}" + f" ({', '.join(wide)} bytes)" * bool(wide))
        whole = sum(n for name, n in count.items() if "." not in name)
        lines.append(
            f"| {row.kernel} | {row.architecture} | {row.warps} | {row.registers} | {row.shared / 1024:.0f} "
            f"| {row.resident} | {row.spills} | {row.stack} | {matrix} | {', '.join(loads) or '-'} | {whole} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table and the problems; 1 where there are any."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="module names; every module with Triton kernels if left out")
    parser.add_argument("--calls", default="bench.launches", help="module whose calls launch them")
    parser.add_argument("--json", type=Path, help="also write all counts here")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, choices=EVERY)
    parser.add_argument(
        "--variants", choices=("pairwise", "all"), help="of tokens, ranks, dtypes, noise and chips instead"
    )
    parser.add_argument("--first", type=int, help="so many combinations of --variants alone")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
    chosen = arguments.modules or modules()
    if arguments.variants is None:
        found = rows(chosen, tuple(arguments.sm), arguments.processes, arguments.calls)
    else:
        every = [dict(zip(VARIANTS, values)) for values in itertools.product(*VARIANTS.values())]
        combinations = (pairwise(VARIANTS) if arguments.variants == "pairwise" else every)[: arguments.first]
        found = variants(chosen, combinations, arguments.processes, arguments.calls)
    if arguments.json:
        derived = ("spills", "tensor_cores", "problems")
        full = [{**asdict(row), **{name: getattr(row, name) for name in derived}} for row in found]
        arguments.json.write_text(json.dumps(full, indent=1))
    print(table(found))
    problems = [(row, problem) for row in found for problem in row.problems]
    for row, problem in problems:
        print(f"\n{row.module}.{row.kernel} for sm_{row.architecture}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
