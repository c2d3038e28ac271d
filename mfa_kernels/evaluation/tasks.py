"""Pairs of prompts with the answers that a causal model expects, for `localize`.

Two tasks like those of the causal-variable track of MIB (arXiv 2504.13151), in prompts that a small base model answers:

    mcqa_pairs   which letter stands beside the color of the question; variables: the place of that line, and the letter
    ravel_pairs  country, continent and language of cities; variables: each of them

Pairs of one's own come from a file (`read_pairs`). `prepare` tokenizes, asks the model, and leaves out pairs whose
prompts it answers wrong, as MIB does: a variable cannot be found in a network that does not compute it.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_flag, check_integer, check_number, check_path, is_flag, shown
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.common.reading import check_file, parse_json
from mfa_kernels.data.language_model import encoded, tokenize
from mfa_kernels.evaluation.cities import cities
from mfa_kernels.evaluation.prefix import only_columns
from mfa_kernels.evaluation.site import Site

MCQA = ("pointer", "answer")
RAVEL = ("country", "continent", "language")

_COLORS = ("red", "blue", "green", "black", "white", "brown", "yellow", "purple", "orange", "pink", "gray")
_OBJECTS = (
    "ball", "box", "car", "cup", "hat", "door", "book", "chair", "shirt", "bag", "pen", "lamp", "plate", "coat", "shoe",
    "truck",
)  # fmt: skip
_SHARE = 0.3  # of pairs, that are judged
_FEWEST = 20  # pairs that are judged, and that are trained on


class Pair(NamedTuple):
    """A base and a source prompt.

    Attributes:
        base, source: the prompts.
        answer: what the network should say after the base if the variable had the source's value, as text with its
            leading space; its first token counts.
        changes: True where this is another answer than the base's own; None where nobody says.
        base_answer, source_answer: the right answers to both as they are; None: they are not looked at.
        base_end, source_end: the site is the last token of so many characters of the prompt; None: of all.
        held_out: the pair is judged, and not trained on.
    """

    base: str
    source: str
    answer: str
    changes: bool | None = None
    base_answer: str | None = None
    source_answer: str | None = None
    base_end: int | None = None
    source_end: int | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Task:
    """Pairs as `Site` and `localize` take them; all are about the N pairs that are left.

    Attributes:
        pairs: those that the model answers right.
        base, source: what the tokenizer returns, padded on the left.
        position, source_position: of the site among the tokens of each prompt, (N,).
        labels: first tokens of the expected answers, (N,).
        changes: (N,) bool; None where nobody says.
        held_out: (N,) bool.
        accuracy: share of the different prompts that the model answers right, before any is left out; None where no
            right answer is known.
        given: pairs before any was left out.
    """

    pairs: list[Pair]
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    position: Tensor
    source_position: Tensor
    labels: Tensor
    changes: Tensor | None
    held_out: Tensor
    accuracy: float | None
    given: int

    def site(self, model: Any, layer: int | str, **options: Any) -> Site:
        """The site of these pairs at what leaves a layer; options as for `Site`."""
        return Site(model, layer, self.base, self.source, self.position, self.source_position, **options)


def mcqa_pairs(variable: str = "pointer", count: int = 4000, at: str = "last", seed: int = 0) -> list[Pair]:
    """Returns multiple choices of colors.

    The letter follows its color, where MIB has it before: so a model of 135 million parameters answers 7 in 10. One
    example is before each. Sources have the color in another line, other letters, or both, a third each.

    Args:
        variable: "pointer", the line of the right color: expected is the base's letter in the source's line; or
            "answer", the letter: expected is the source's.
        count: of pairs. Those of three in ten questions are held out.
        at: the site: "last", the prompt's last token; or "symbol", the right letter in its line.
        seed: of all that is drawn.
    """
    check_choice(variable, MCQA, "variable")
    check_choice(at, ("last", "symbol"), "at")
    count, random = check_integer(count, "count", 1), Random(check_integer(seed, "seed"))
    example = _question("cup", ["green", "pink", "blue", "white"], 3, "YOPU")[0] + " U\n\n"
    found: list[Pair] = []
    kinds = (
        [((p, s), (q, s)) for p, q in permutations(range(4), 2) for s in (0, 1)],
        [((p, s), (p, 1 - s)) for p in range(4) for s in (0, 1)],
        [((p, s), (q, 1 - s)) for p, q in permutations(range(4), 2) for s in (0, 1)],
    )
    while len(found) < count:
        colors, letters = random.sample(_COLORS, 4), random.sample(string.ascii_uppercase, 8)
        thing, held_out = random.choice(_OBJECTS), random.random() < _SHARE
        symbols = ("".join(letters[:4]), "".join(letters[4:]))
        for kind in kinds:
            for (line, own), (other_line, other) in random.sample(kind, 8):
                base, base_end = _question(thing, _moved(colors, line), line, symbols[own])
                source, source_end = _question(thing, _moved(colors, other_line), other_line, symbols[other])
                answer = symbols[own][other_line] if variable == "pointer" else symbols[other][other_line]
                start, last = len(example), at == "last"
                found.append(
                    Pair(
                        example + base,
                        example + source,
                        f" {answer}",
                        answer != symbols[own][line],
                        f" {symbols[own][line]}",
                        f" {symbols[other][other_line]}",
                        None if last else start + base_end,
                        None if last else start + source_end,
                        held_out,
                    )
                )
    random.shuffle(found)
    return found[:count]


def _moved(colors: list[str], line: int) -> list[str]:
    """The colors with the first, the right one, in a line."""
    found = list(colors)
    found[0], found[line] = found[line], found[0]
    return found


def _question(thing: str, colors: list[str], line: int, symbols: str) -> tuple[str, int]:
    """A question up to its answer, and the end of the right letter in its line."""
    head = f"Question: The {thing} is {colors[line]}. What color is the {thing}?"
    lines = [f"\n{color}: {symbol}" for color, symbol in zip(colors, symbols)]
    end = len(head) + sum(len(part) for part in lines[: line + 1])
    return f"{head}{''.join(lines)}\nAnswer: {colors[line]}:", end


def ravel_pairs(
    variable: str = "country", count: int = 4000, at: str = "entity", seed: int = 0, *, unseen: bool = False
) -> list[Pair]:
    """Returns questions for the country, the continent or the language of a city, after two examples.

    Sources ask for the variable. Half of the bases do, and the source's value is expected; a quarter each ask for the
    two others, and the base's own value is expected. The two cities differ in what the base asks for.

    Args:
        variable: "country", "continent" or "language".
        count: of pairs, three in ten of them held out.
        at: the site: "entity", the city's last token; or "last", the prompt's.
        seed: of all that is drawn.
        unseen: pairs that are held out are of cities that are in no other pair. False is how the field does it: a
            pair is in one part only, but its cities are in both, so that what was learnt may hold for these alone.
    """
    check_flag(unseen, "unseen")
    check_choice(variable, RAVEL, "variable")
    check_choice(at, ("entity", "last"), "at")
    count, random = check_integer(count, "count", 1), Random(check_integer(seed, "seed"))
    values = cities()
    names = sorted(values)
    random.shuffle(names)
    apart = round(_SHARE * len(names)) if unseen else 0
    others = [name for name in RAVEL if name != variable]
    found: list[Pair] = []
    most = len(names) * (len(names) - 1)
    if count > most // 2:
        raise ValueError(f"count must be {most // 2} at most, got {count}: there are {len(names)} cities")
    asked_of: set[tuple[str, str, str]] = set()  # no pair twice: it could be in both parts
    while len(found) < count:
        held_out = random.random() < _SHARE
        base, source = random.sample(names[:apart] if unseen and held_out else names[apart:], 2)
        asked = variable if random.random() < 0.5 else random.choice(others)
        if values[base][asked] == values[source][asked] or (base, source, asked) in asked_of:
            continue
        asked_of.add((base, source, asked))
        changes = asked == variable
        (base_prompt, base_end), (source_prompt, source_end) = _asked(base, asked), _asked(source, variable)
        found.append(
            Pair(
                base_prompt,
                source_prompt,
                f" {values[source if changes else base][asked]}",
                changes,
                f" {values[base][asked]}",
                f" {values[source][variable]}",
                None if at == "last" else base_end,
                None if at == "last" else source_end,
                held_out,
            )
        )
    return found


def _asked(city: str, attribute: str) -> tuple[str, int]:
    """A prompt, and the end of the city in it."""
    examples = {"country": ("France", "Japan"), "continent": ("Europe", "Asia"), "language": ("French", "Japanese")}
    one, other = examples[attribute]
    head = f"Toulouse, {attribute}: {one}\nNagoya, {attribute}: {other}\n{city}"
    return f"{head}, {attribute}:", len(head)


_FIELDS = ("base", "source", "answer", "changes", "base_answer", "source_answer", "at", "source_at", "held_out")


def read_pairs(path: StrPath) -> list[Pair]:
    """Reads pairs from a file of JSON lines.

    Each has `base`, `source` and `answer`; and may have `changes`, `base_answer`, `source_answer` and `held_out` as a
    `Pair` has them, and `at` and `source_at`: text in the prompt whose last token is the site (where it occurs several
    times, the last). Without `held_out` in any line, three in ten are judged, the last ones.

    Raises:
        OSError: the file cannot be read.
        ValueError: naming the line and the field.
    """
    path = check_path(path, "path")
    check_file(path)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    found = [_pair(parse_json(line, path), f"{path}: line {n}") for n, line in enumerate(lines, 1)]
    if not found:
        raise ValueError(f"{path} has no pairs")
    if not any(pair.held_out for pair in found):
        first = len(found) - max(1, round(_SHARE * len(found)))
        found = [pair._replace(held_out=n >= first) for n, pair in enumerate(found)]
    return found


def _pair(content: Any, where: str) -> Pair:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with base, source and answer, got {shown(content)}")
    for name in content.keys() - set(_FIELDS):
        raise ValueError(f"{where}: {name!r} is no field of a pair: {', '.join(_FIELDS)}")
    for name in ("base", "source", "answer"):
        if not isinstance(content.get(name), str) or not content[name]:
            raise ValueError(f"{where}: {name} must be a text, got {shown(content.get(name))}")
    for name in ("base_answer", "source_answer", "at", "source_at"):
        if not isinstance(content.get(name), str | None):
            raise ValueError(f"{where}: {name} must be a text, got {shown(content[name])}")
    for name in ("changes", "held_out"):
        if not isinstance(content.get(name), bool | None):
            raise ValueError(f"{where}: {name} must be true or false, got {shown(content[name])}")
    ends: list[int | None] = []
    for name, prompt in (("at", "base"), ("source_at", "source")):
        text = content.get(name, content.get("at") if name == "source_at" else None)
        if text is None:
            ends.append(None)
            continue
        place = content[prompt].rfind(text)
        if not text or place < 0:
            raise ValueError(f"{where}: {name} must be text in the {prompt} prompt, got {shown(text)}")
        ends.append(place + len(text))
    rest = {name: content.get(name) for name in ("changes", "base_answer", "source_answer")}
    return Pair(
        content["base"], content["source"], content["answer"], **rest, base_end=ends[0], source_end=ends[1],
        held_out=bool(content.get("held_out")),
    )  # fmt: skip


def prepare(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    count: int | None = None,
    at_least: float = 0.6,
    batch_size: int = 64,
    progress: bool = True,
) -> Task:
    """Tokenizes pairs, and leaves out those whose prompts the model answers wrong.

    Pairs are left out too where two answers of the task begin with the same token, so that the model's would not tell.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        tokenizer: its own.
        pairs: what `mcqa_pairs`, `ravel_pairs` or `read_pairs` returns.
        count: most pairs to keep, those held out among them in the share that they have; None: all.
        at_least: share of the prompts that the model has to answer right.
        batch_size: prompts per forward pass.
        progress: show a bar when it takes more than two seconds.

    Raises:
        TypeError, ValueError: naming the argument; a model that does not solve the task, or leaves too few pairs.
    """
    for n, pair in enumerate(pairs):
        if not isinstance(pair, Pair) or not is_flag(pair.held_out):
            raise TypeError(f"pairs must be a list of Pair, pairs[{n}] is {shown(pair)}")
    if not pairs:
        raise ValueError("pairs must not be empty")
    at_least = check_number(at_least, "at_least", 0, 1)
    count = len(pairs) if count is None else check_integer(count, "count", 1)
    tokens = _Tokens(tokenizer)
    first = [tokens.first(pair.base, pair.answer, f"pairs[{n}]") for n, pair in enumerate(pairs)]
    same = _with_others(first, [pair.answer for pair in pairs])
    asked: dict[str, str] = {}
    for pair in pairs:
        for prompt, answer in ((pair.base, pair.base_answer), (pair.source, pair.source_answer)):
            if answer is not None and asked.setdefault(prompt, answer) != answer:
                raise ValueError(f"pairs: {answer!r} and {asked[prompt]!r} are right answers to one prompt, {prompt!r}")
    right = _answered(model, tokenizer, asked, tokens, check_integer(batch_size, "batch_size", 1), progress)
    accuracy = sum(right.values()) / len(right) if right else None
    if accuracy is not None and accuracy < at_least:
        raise ValueError(
            f"pairs: {type(model).__name__} answers {accuracy:.0%} of the {len(right)} prompts right, and at least "
            f"{at_least:.0%} are asked for: what a model does not solve has no place in it"
        )
    kept = [
        n
        for n, pair in enumerate(pairs)
        if right.get(pair.base, True) and right.get(pair.source, True) and first[n] not in same
    ]
    if len(kept) > count:
        judged = [n for n in kept if pairs[n].held_out]
        most = round(count * len(judged) / len(kept))
        kept = sorted([n for n in kept if not pairs[n].held_out][: count - most] + judged[:most])
    chosen = [pairs[n] for n in kept]
    for what, left in (("judge by", True), ("train on", False)):
        if (number := sum(pair.held_out is left for pair in chosen)) < _FEWEST:
            raise ValueError(f"pairs: {number} of {len(pairs)} are left to {what}, at least {_FEWEST} are needed")
    padding = {"padding": True, "padding_side": "left"}
    changes = [pair.changes for pair in chosen]
    return Task(
        pairs=chosen,
        base=encoded(model, tokenizer, [pair.base for pair in chosen], **padding),
        source=encoded(model, tokenizer, [pair.source for pair in chosen], **padding),
        position=torch.tensor([tokens.at(pair.base, pair.base_end) for pair in chosen]),
        source_position=torch.tensor([tokens.at(pair.source, pair.source_end) for pair in chosen]),
        labels=torch.tensor([first[n] for n in kept]),
        changes=None if None in changes else torch.tensor(changes),
        held_out=torch.tensor([pair.held_out for pair in chosen]),
        accuracy=accuracy,
        given=len(pairs),
    )


class _Tokens:
    """Tokens of prompts, each read once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def of(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = tokenize(self.tokenizer, text)["input_ids"][0].tolist()
        return self._known[text]

    def first(self, prompt: str, answer: str, where: str) -> int:
        """The first token of an answer to a prompt."""
        own, both = self.of(prompt), self.of(prompt + answer)
        if len(both) <= len(own) or both[: len(own)] != own:
            raise ValueError(
                f"{where}.answer: {answer!r} does not begin with a token of its own after the prompt; is a space in "
                "front of it missing, or one at the end of the prompt?"
            )
        return both[len(own)]

    def at(self, prompt: str, end: int | None) -> int:
        """The number of the last token of the first `end` characters."""
        whole = self.of(prompt)
        if end is None:
            return len(whole) - 1
        part = self.of(prompt[:end])
        if whole[: len(part)] != part:
            raise ValueError(f"pairs: no token ends where the site does, at character {end} of {prompt!r}")
        return len(part) - 1


def _with_others(tokens: list[int], answers: list[str]) -> set[int]:
    """The tokens that several answers begin with."""
    of: dict[int, set[str]] = {}
    for token, answer in zip(tokens, answers):
        of.setdefault(token, set()).add(answer)
    return {token for token, several in of.items() if len(several) > 1}


@torch.no_grad()
def _answered(
    model: Any, tokenizer: Any, asked: dict[str, str], tokens: _Tokens, batch_size: int, progress: bool
) -> dict[str, bool]:
    """Whether the most likely next token of each prompt is the first of its right answer."""
    found: dict[str, bool] = {}
    prompts = sorted(asked, key=len)
    with progress_bar(total=len(prompts), desc="ask", unit=" prompts", delay=2, progress=progress) as bar:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            inputs = encoded(model, tokenizer, part, padding=True, padding_side="left")
            last = torch.full((len(part),), inputs["input_ids"].shape[1] - 1, device=inputs["input_ids"].device)
            with only_columns(model, last):
                said = model(**inputs).logits[:, -1].argmax(-1).tolist()
            for prompt, token in zip(part, said):
                found[prompt] = token == tokens.first(prompt, asked[prompt], repr(prompt))
            bar.update(len(part))
    return found
