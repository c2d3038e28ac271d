"""The pages name what exists: the glossary's names, files in tables, links; and their mathematics renders."""

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "mfa_kernels", "csrc", "bench")
PAGES = [
    str(path.relative_to(ROOT))
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
    if path.name not in ("CHANGELOG.md", "map.md")
]
MATH = re.compile(r"\$`([^`\n]*)`\$|^```math\n(.*?)^```", re.S | re.M)
FILE = re.compile(r"(?<!\$)`([\w/]+\.(?:py|h|cuh|cu|cpp|md))`")
pages = pytest.mark.parametrize("page", PAGES)


@functools.cache
def sources(folder: str) -> list[str]:
    return [path.read_text() for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cuh")]


def exists(name: str, folder: str) -> bool:
    """True where a source file has the name; of `Owner.name` or `Owner::name`, a file that defines the owner."""
    owner, _, own = name.replace("::", ".").rpartition(".")
    files = [text for text in sources(folder) if not owner or re.search(rf"\b(class|struct) {owner}\b", text)]
    return any(re.search(rf"\b{own}\b", text) for text in files)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose_of(page: str) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M)


def test_every_name_of_the_glossary_exists():
    rows = [line.strip("|").split("|") for line in text_of("docs/glossary.md").splitlines() if line[:2] == "| "]
    assert len(rows) > 30
    for _, python, cpp, meaning in rows[1:]:
        for column, folder in ((python, "mfa_kernels"), (cpp, "csrc"), (meaning, "mfa_kernels")):
            for name in re.findall(r"(?<!\$)`([\w.:]+)`", column):
                assert exists(name, folder), name


def test_where_to_begin_a_change():
    """CONTRIBUTING names files, and in brackets what of them is to be changed."""
    found = re.findall(r"`([\w/]+\.(?:py|h))` \(([^)]*`[^)]*)\)", text_of("CONTRIBUTING.md"))
    assert len(found) > 3
    for file, names in found:
        path = ROOT / ("" if file.startswith("csrc") else "mfa_kernels") / file
        for name in re.findall(r"`([\w:]+)`", names):
            assert all(re.search(rf"\b{part}\b", path.read_text()) for part in name.split("::")), name


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s#]+)", prose_of(page)):
        assert "://" in target or ((ROOT / page).parent / target).exists(), target


@pages
def test_files_that_a_table_names_exist(page):
    """Relative to the page, the package, its operators or the repository; screening's headers have a folder."""
    folders = [(ROOT / page).parent, *(ROOT / f for f in ("", "mfa_kernels", "mfa_kernels/ops", "csrc/cpu/screen"))]
    for line in prose_of(page).splitlines():
        for name in FILE.findall(line) if line.startswith("|") else ():
            assert any((folder / name).exists() for folder in folders), name


@pages
def test_mathematics_renders(page):
    """As GitHub reads it: between $` and `$ or in a block of its own, with braces and environments in pairs."""
    text = text_of(page)
    for formula in ("".join(found) for found in MATH.findall(text)):
        bare = re.sub(r"\\[{}|]", "", formula)
        assert bare.count("{") == bare.count("}"), formula
        assert len(re.findall(r"\\left\b", bare)) == len(re.findall(r"\\right\b", bare)), formula
        assert bare.count(r"\begin") == bare.count(r"\end"), formula
        assert r"\operatorname" not in formula, "GitHub refuses it"
    # A delimiter that leans on a letter is not read as one, and a bar ends the cell of a table.
    assert not re.search(r"\w\$`|`\$\w", text)
    assert not re.search(r"^\|.*\$`[^`]*\|[^`]*`\$", text, re.M)
    outside = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", MATH.sub("", text), flags=re.S | re.M))
    assert "$" not in outside, "mathematics without backticks"
