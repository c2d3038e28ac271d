"""Counts that say how the package is laid out: files, circles, private names, long signatures, lines.

    python scripts/count.py          # all of them
    python scripts/count.py --names  # and what is counted, by name
    python scripts/count.py --check  # exit status 1 where rooms make a circle, or an arrow between floors runs up

They come from the syntax trees; nothing is imported. Imports under TYPE_CHECKING, or inside a function, count like any
other, because a module depends on them too.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mfa_kernels"
MOST_PARAMETERS = 8
FLOORS = (
    ("commands",), ("explorer",), ("evaluation", "fitting", "interpret", "steering"), ("mixture",), ("data",), ("ops",),
    ("common",),
)  # fmt: skip
"""Floors from the roof down: a room imports rooms below it, and none on its own floor."""


def modules() -> dict[str, ast.Module]:
    """Returns the syntax tree of each module, by its name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST, known: set[str], own: str) -> Iterator[tuple[str, str | None]]:
    """Yields the imports of a module from the package: (module, name), the name None for the module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = own.split(".")[: len(own.split(".")) - node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known:
                    yield inner, None
                elif base in known:
                    yield base, alias.name


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Returns the strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def folder(module: str) -> str:
    """Returns the room of a module: its folder below the package, and below `ops`; a loose module is its own room."""
    parts = module.split(".")[1:]
    depth = 2 if parts[:1] == ["ops"] else 1
    return ".".join(parts[:depth]) or "__init__"


def private_uses(trees: dict[str, ast.Module]) -> Iterator[str]:
    """Yields uses of private names of another module: imported, or as an attribute of an imported module."""
    known = set(trees)
    for own, tree in trees.items():
        called: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for (module, name), alias in zip(imports(node, known, own), node.names):
                    if name is None:
                        called[alias.asname or alias.name.split(".")[-1]] = module
                    elif name.startswith("_") and not name.startswith("__"):
                        yield f"{own}: {module}.{name}"
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            if node.value.id in called and node.attr.startswith("_") and not node.attr.startswith("__"):
                yield f"{own}: {called[node.value.id]}.{node.attr}"


def long_signatures(trees: dict[str, ast.Module]) -> Iterator[str]:
    for own, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                count -= bool(node.args.args and node.args.args[0].arg in ("self", "cls"))
                if count > MOST_PARAMETERS and not any(_is_kernel(d) for d in node.decorator_list):
                    yield f"{own}.{node.name}: {count}"


def _is_kernel(decorator: ast.expr) -> bool:
    return "jit" in ast.dump(decorator)


def lines(path: Path) -> dict[str, int]:
    """Counts the lines of a file: code, comments, docstrings, blank."""
    text = path.read_text()
    kinds: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            kinds[token.start[0]] = "comments"
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            kinds.update(dict.fromkeys(range(token.start[0], token.end[0] + 1), "code"))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first: Any = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                kinds.update(dict.fromkeys(range(first.lineno, (first.end_lineno or 0) + 1), "docstrings"))
    counted = {"code": 0, "comments": 0, "docstrings": 0, "blank": text.count("\n") - len(kinds)}
    for kind in kinds.values():
        counted[kind] += 1
    return counted


def all_lines(where: str) -> dict[str, int]:
    total: dict[str, int] = defaultdict(int)
    for path in sorted((ROOT / where).rglob("*.py")):
        for kind, count in lines(path).items():
            total[kind] += count
    return dict(total)


def upward(rooms: dict[str, set[str]]) -> Iterator[str]:
    """Yields arrows between floors that do not run down; the package itself, which users import, has no floor."""
    floor = {room: number for number, own in enumerate(FLOORS) for room in own}
    for own, others in rooms.items():
        for other in others:
            first, second = (floor.get(room.split(".")[0]) for room in (own, other))
            if None not in (first, second) and first >= second and own.split(".")[0] != other.split(".")[0]:
                yield f"{own} -> {other}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="what is counted, by name")
    parser.add_argument("--check", action="store_true", help="say nothing but what is wrong")
    arguments = parser.parse_args()
    shows = arguments.names
    trees = modules()
    files = {own: {module for module, _ in imports(tree, set(trees), own)} - {own} for own, tree in trees.items()}
    rooms: dict[str, set[str]] = defaultdict(set)
    for own, others in files.items():
        rooms[folder(own)] |= {folder(other) for other in others} - {folder(own)}
    if arguments.check:
        wrong = [*(", ".join(circle) for circle in circles(rooms)), *sorted(upward(rooms))]
        print("\n".join(wrong), end="\n" * bool(wrong))
        return bool(wrong)
    top = [path.name for path in sorted((ROOT / PACKAGE).glob("*.py")) if path.name != "__init__.py"]
    report: list[tuple[str, list[str]]] = [
        ("files at the top of the package", top),
        ("rooms", sorted(rooms)),
        ("arrows between rooms", [f"{a} -> {b}" for a in sorted(rooms) for b in sorted(rooms[a])]),
        ("circles of files", [", ".join(circle) for circle in circles(files)]),
        ("circles of rooms", [", ".join(circle) for circle in circles(rooms)]),
        ("arrows between floors that run up or aside", sorted(upward(rooms))),
        ("uses of another module's private names", sorted(private_uses(trees))),
        (f"functions with more than {MOST_PARAMETERS} parameters, kernels aside", sorted(long_signatures(trees))),
    ]
    for what, names in report:
        print(f"{len(names):>6}  {what}")
        for name in names if shows else []:
            print(f"          {name}")
    for where in (PACKAGE, "tests", "bench"):
        print(f"{'':>6}  lines of {where}: " + ", ".join(f"{n:,} {kind}" for kind, n in all_lines(where).items()))

    return 0


if __name__ == "__main__":
    sys.exit(main())
