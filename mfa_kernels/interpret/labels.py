"""Labels of regions, by people or by a language model: a file of them, and contexts for whoever writes them.

A file of labels is JSON:

    {"format": "mfa_kernels.labels", "version": 1,
     "labels": {"12": {"label": "ingredients of a recipe", "explanation": "...", "by": "ann"}}}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfa_kernels.common.checks import (
    check_callable,
    check_component,
    check_components,
    check_integer,
    check_path,
    check_text,
    shown,
)
from mfa_kernels.common.files import StrPath, atomic_write_json, atomic_write_text
from mfa_kernels.common.reading import OBJECT, TEXT, check_fields, integer, read_json
from mfa_kernels.interpret.contexts import Assignments, ensure_assignments
from mfa_kernels.interpret.regions import RegionSummary, region_summaries
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore

FORMAT, VERSION = "mfa_kernels.labels", 1
LABELS = "labels.json"  # its name in the folder of a mixture
_AT_ONCE = 64  # regions whose contexts are read together
_MARKUP = " \t*#\"'"
_MOST_CHARACTERS = 200  # of a label: what is longer is an explanation


@dataclass(frozen=True)
class Label:
    """What somebody calls a region.

    Attributes:
        label: a few words.
        explanation: sentences, or "".
        by: who or what wrote it, or "".
    """

    label: str
    explanation: str = ""
    by: str = ""


def read_labels(path: StrPath, n_components: int) -> dict[int, Label]:
    """Returns the labels in a file, by region.

    Raises:
        FileNotFoundError: naming the file.
        ValueError: naming the file and the entry that is no label, or no region of a mixture of `n_components`.
    """
    path, n_components = check_path(path, "path"), check_integer(n_components, "n_components", 1)
    content = read_json(path)
    check_fields(content, {"format": TEXT, "version": integer(1), "labels": OBJECT}, str(path))
    if content["format"] != FORMAT or content["version"] > VERSION:
        raise ValueError(f"{path}: expected {FORMAT!r} of version {VERSION}, got {shown(content['format'])}")
    found = {}
    for key, entry in content["labels"].items():
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= n_components:
            raise ValueError(f"{path}: labels has {shown(key)}, expected a region in [0, {n_components})")
        where = f"{path}: labels[{key!r}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be an object, got {shown(entry)}")
        entry = {"explanation": "", "by": "", **entry}
        check_fields(entry, {"label": TEXT, "explanation": TEXT, "by": TEXT}, where)
        found[int(key)] = Label(entry["label"], entry["explanation"], entry["by"])
    return found


def write_labels(path: StrPath, labels: Mapping[int, Label]) -> Path:
    """Writes labels of regions to a file, replacing one that is there; returns its path.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    path = check_path(path, "path")
    entries = {k: asdict(label) for k, label in check_labels(labels).items()}
    content = {"format": FORMAT, "version": VERSION, "labels": {str(k): entries[k] for k in sorted(entries)}}
    atomic_write_json(path, content)
    return path


def check_labels(labels: Any) -> dict[int, Label]:
    """Returns a mapping from regions to labels; raises TypeError or ValueError, naming it, for anything else."""
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels must be a mapping from regions to labels, got {shown(labels)}")
    for k, label in labels.items():
        check_integer(k, "labels")
        if not isinstance(label, Label):
            raise TypeError(f"labels[{k!r}] must be a Label, got {shown(label)}")
    return dict(labels)


def label_prompt(summary: RegionSummary) -> str:
    """Returns the question about a region for whoever labels it: its telling tokens, and contexts with the token
    in «»."""
    if not isinstance(summary, RegionSummary):
        raise TypeError(f"summary must be a RegionSummary, got {shown(summary)}")
    tokens = "  ".join(f"{t.token} (x{t.lift:.3g})" for t in summary.tokens)
    contexts = "\n".join(f"- {c.before}«{c.token}»{c.after}" for c in summary.contexts)
    return (
        "Below are places in texts at which a language model is in one and the same state. The token at each place "
        "is in «», ⏎ is the end of a line, ⇥ a tab and · a space. What do these places have in common? Answer with a "
        "label of at most ten words on the first line, and with one sentence that explains it on the second.\n\n"
        f"Tokens far more frequent here than elsewhere: {tokens}\n\nPlaces:\n{contexts}\n"
    )


def parse_label(answer: str, by: str = "") -> Label:
    """Returns the label in an answer to `label_prompt`: the first line that says something, and the rest.

    Raises:
        ValueError: the answer is empty.
    """
    check_text(by, "by")
    lines = [_said(line) for line in check_text(answer, "answer").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError("answer must hold a label on its first line, got no text")
    return Label(lines[0][:_MOST_CHARACTERS], " ".join(lines[1:]), by)


def _said(line: str) -> str:
    """A line of an answer without its markup, and without the name of what it is."""
    line = line.strip(_MARKUP)
    for name in ("Label:", "Explanation:"):
        line = line.removeprefix(name).strip(_MARKUP)
    return line


def label_regions(
    labeller: Callable[[str], str],
    mfa: Decomposition,
    store: ActivationStore,
    tokenizer: Any,
    components: Sequence[int] | None = None,
    *,
    n_contexts: int = 20,
    by: str = "",
    path: StrPath | None = None,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> dict[int, Label]:
    """Asks a labeller about regions, one by one.

    Args:
        labeller: a function from a question (`label_prompt`) to an answer: a person, a local model, a service. What it
            raises ends the work; labels that it gave before are in the file.
        mfa: the mixture, or another decomposition.
        store: activations with their tokens.
        tokenizer: the Hugging Face tokenizer of these tokens.
        components: which regions; all that own rows when None.
        n_contexts: contexts in each question, spread from the center of the region outwards.
        by: who labels, kept with each label.
        path: a file of labels, written after each answer; regions that it has already are not asked about again.
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.

    Returns:
        The labels by region, those of the file too.
    """
    check_callable(labeller, "labeller")
    count = check_decomposition(mfa).n_components
    n_contexts = check_integer(n_contexts, "n_contexts", 1)
    check_text(by, "by")
    assigned = ensure_assignments(mfa, store, assigned, progress)
    labels: dict[int, Label] = {}
    if path is not None:
        path = check_path(path, "path")
        labels = read_labels(path, count) if path.exists() else {}
    asked = [k for k in dict.fromkeys(_chosen(components, assigned)) if k not in labels]
    for start in range(0, len(asked), _AT_ONCE):
        part = asked[start : start + _AT_ONCE]
        options: dict[str, Any] = {"assigned": assigned, "progress": progress}
        for summary in region_summaries(mfa, store, tokenizer, part, 12, n_contexts, **options):
            labels[summary.component] = parse_label(labeller(label_prompt(summary)), by)
            if path is not None:
                write_labels(path, labels)
    return labels


def write_prompts(
    folder: StrPath,
    mfa: Decomposition,
    store: ActivationStore,
    tokenizer: Any,
    components: Sequence[int] | None = None,
    *,
    n_contexts: int = 20,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> list[Path]:
    """Writes the question about each region to a file, FOLDER/region-12.txt, for a labeller elsewhere.

    Arguments are those of `label_regions`. `read_answers` takes what comes back.
    """
    folder, n_contexts = check_path(folder, "folder"), check_integer(n_contexts, "n_contexts", 1)
    assigned = ensure_assignments(mfa, store, assigned, progress)
    chosen = _chosen(components, assigned)
    summaries = region_summaries(mfa, store, tokenizer, chosen, 12, n_contexts, assigned=assigned, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for summary in summaries:
        written.append(folder / f"region-{summary.component}.txt")
        atomic_write_text(written[-1], label_prompt(summary))
    return written


def _chosen(components: Sequence[int] | None, assigned: Assignments) -> list[int]:
    """The regions asked for: those that own rows, where none are named."""
    if components is None:
        return (assigned.counts > 0).nonzero().squeeze(1).tolist()
    return check_components(components, assigned.n_components)


def read_answers(folder: StrPath, n_components: int, by: str = "") -> dict[int, Label]:
    """Returns the labels in a folder of answers, one file region-12.answer.txt for each region.

    Raises:
        ValueError: naming the file that holds no label, or names no region.
    """
    folder, n_components = check_path(folder, "folder"), check_integer(n_components, "n_components", 1)
    check_text(by, "by")
    labels = {}
    for path in sorted(folder.glob("region-*.answer.txt")):
        name = path.name.removeprefix("region-").removesuffix(".answer.txt")
        try:
            k = check_component(int(name), n_components, "the region in its name")
            labels[k] = parse_label(path.read_text(), by)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: {error}") from error
    return labels
