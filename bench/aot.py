"""python -m bench.aot: every Triton kernel compiled ahead of time, without a GPU, and what its machine code holds.

Each `mfa_kernels/ops/**/triton_*.py` lists its kernels in

    ahead_of_time(config) -> [(name, kernel, {argument: type}, {argument: constexpr value}, {"num_warps": ...}), ...]

for typical arguments (x in bfloat16, R=10, D=4096). `config` is the default configuration of the kind that its
annotation names (or the module's AHEAD_OF_TIME); a parameter named `architecture` gets 80, 90 or 100. Types are
Triton's: "*bf16", "i32", "i64"; pointers are aligned to 16 bytes, as torch allocates them, and "i32:16" is an integer
divisible by 16.

Exits with 1 and says why where a kernel that a module launches is not in its list, does not compile, spills, needs more
shared memory than the chip has, or is called scan... and does not use the chip's newest matrix instructions.
"""

from __future__ import annotations

import argparse
import ast
import collections
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mfa_kernels.ops.common import configs

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one program may ask for, bytes (CUDA C++ programming guide, compute capabilities)."""
SHAPE = (16384, 8192)
"""N and K whose default configurations are compiled."""
_SHARED_PER_MULTIPROCESSOR = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.[A-Za-z0-9_]+)*)", re.M)
_TENSOR = re.compile(r"(?:H|Q|I|D|O)MMA|[HQI]GMMA|UTC\w*MMA")
_SCAN_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # mma, wgmma, tcgen05
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
        """What must not ship: no code, spills, more shared memory than there is, a scan beside the matrix units."""
        if self.error:
            return [self.error]
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} accesses to local memory, {self.stack} bytes of it per thread")
        if self.shared > SHARED_LIMIT[self.architecture]:
            found.append(f"{self.shared} bytes of shared memory; the chip has {SHARED_LIMIT[self.architecture]}")
        if self.kernel.startswith("scan"):
            wanted = _SCAN_INSTRUCTION[self.architecture]
            if wanted not in self.tensor_cores:
                found.append(f"no {wanted}: {self.tensor_cores or 'no matrix instruction at all'}")
        return found


def modules() -> list[str]:
    """Names of the package's modules that hold Triton kernels."""
    root = Path(configs.__file__).parents[1]
    parts = [path.relative_to(root).with_suffix("").parts for path in sorted(root.rglob("triton_*.py"))]
    return [".".join(("mfa_kernels", "ops", *part)) for part in parts]


def _jitted(value: Any) -> Any:
    """The JITFunction under @heuristics and @autotune, or None."""
    from triton.runtime.jit import JITFunction

    while value is not None and not isinstance(value, JITFunction):
        value = getattr(value, "fn", None)
    return value


def launched(module: ModuleType) -> set[str]:
    """Names of the kernels that a module launches itself: `kernel[grid](...)` in its source."""
    calls = (node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call))
    names = {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}
    kernels = (_jitted(getattr(module, name, None)) for name in names)
    return {kernel.__name__ for kernel in kernels if kernel is not None}


_SIZES = {"N", "K", "D", "R", "P", "C", "S", "tiles"}  # arguments that can be 1


def entries(module: ModuleType, architecture: int) -> list[tuple[str, Any, dict, dict, dict]]:
    """(name, kernel, signature, constexprs, options) of a module's kernels for an architecture."""
    if not hasattr(module, "ahead_of_time"):
        return []
    arguments = []
    for parameter in inspect.signature(module.ahead_of_time).parameters.values():
        annotation = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        kind = getattr(configs, annotation.rsplit(".", 1)[-1], None) or getattr(module, "AHEAD_OF_TIME", None)
        if parameter.name in ("architecture", "arch"):
            arguments.append(architecture)
        elif kind is not None:
            arguments.append(configs.default(kind, architecture, *SHAPE))
        else:
            raise TypeError(f"{module.__name__}.ahead_of_time: no configuration is known for {parameter}")
    return [(name, _jitted(kernel), *rest) for name, kernel, *rest in module.ahead_of_time(*arguments)]


def compile_entry(module_name: str, index: int, architecture: int) -> Row:
    """Compiles one kernel and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, types, constexprs, options = entries(importlib.import_module(module_name), architecture)[index]
    row: dict[str, Any] = {"kernel": name, "module": module_name, "architecture": architecture}
    signature, attrs = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in constexprs else types[argument]
        signature[argument], _, divisor = kind.partition(":")
        if divisor or kind.startswith("*"):
            attrs[(i,)] = [["tt.divisibility", int(divisor or 16)]]

    def compiled_for(signature: dict[str, str], constexprs: dict[str, Any], attrs: dict[tuple[int], list]) -> Any:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(options))

    try:
        compiled = compiled_for(signature, constexprs, attrs)
        if architecture == ARCHITECTURES[0]:  # a launch turns a size of 1 into a constant, which has no dtype
            ones = {argument: 1 for argument in _SIZES & set(signature) - set(constexprs)}
            sized = {i: hints for i, hints in attrs.items() if kernel.arg_names[i[0]] not in ones}
            compiled_for(signature | dict.fromkeys(ones, "constexpr"), constexprs | ones, sized)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return Row(**row, error=f"{type(error).__name__}: {error}".strip()[-2000:])
    row |= resources(compiled.asm["cubin"])
    row |= {"warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared}
    threads = 32 * row["warps"]
    row["resident"] = min(
        65536 // (threads * -(-row["registers"] // 8) * 8),
        _SHARED_PER_MULTIPROCESSOR[architecture] // (row["shared"] + 1024),  # the system keeps 1 KB per program
        2048 // threads,
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


def rows(module_names: list[str], architectures: tuple[int, ...] = ARCHITECTURES, processes: int = 2) -> list[Row]:
    """Every kernel of these modules on every architecture; kernels that are launched but not listed are rows too."""
    jobs, missing = [], []
    for name in module_names:
        module = importlib.import_module(name)
        listed: set[str] = set()
        for architecture in architectures:
            found = entries(module, architecture)
            listed |= {kernel.__name__ for _, kernel, *_ in found}
            jobs += [(name, i, architecture) for i in range(len(found))]
        missing += [Row(kernel, name, 0, error="not in ahead_of_time") for kernel in sorted(launched(module) - listed)]
    if not jobs:
        return missing
    if processes == 1:
        return [*map(compile_entry, *zip(*jobs)), *missing]
    # New interpreters: the compiler's threads do not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [*pool.map(compile_entry, *zip(*jobs)), *missing]


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
    parser.add_argument("--json", type=Path, help="also write all counts here")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")
    found = rows(arguments.modules or modules(), tuple(arguments.sm), arguments.processes)
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
