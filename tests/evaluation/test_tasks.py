"""Pairs say what their causal model says, and those that a model answers wrong are left out."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mfa_kernels.evaluation.cities import cities
from mfa_kernels.evaluation.tasks import Pair, mcqa_pairs, prepare, ravel_pairs, read_pairs
from tests.helpers.language import make_model, make_tokenizer, words

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"progress": False}


def solved(prompt: str) -> tuple[dict[str, str], str, int]:
    """Letters by color, the color asked for, and its line, of the last question of a prompt."""
    question = prompt[prompt.rindex("Question:") :]
    asked = re.search(r"The (\w+) is (\w+)\. What color is the \1\?", question)[2]
    letters = dict(re.findall(r"^(\w+): ([A-Z])$", question, re.MULTILINE))
    assert question.endswith(f"\nAnswer: {asked}:")
    assert len(letters) == len(set(letters.values())) == 4
    return letters, asked, list(letters).index(asked)


@pytest.mark.parametrize("variable", ["pointer", "answer"])
def test_choices_of_colors(variable):
    pairs = mcqa_pairs(variable, 300, "symbol")
    assert len(pairs) == 300
    changed = set()
    for pair in pairs:
        (letters, color, line), (others, other, where) = solved(pair.base), solved(pair.source)
        assert color == other
        assert pair.base_answer == f" {letters[color]}"
        assert pair.source_answer == f" {others[other]}"
        expected = list(letters.values())[where] if variable == "pointer" else others[other]
        assert pair.answer == f" {expected}"
        assert pair.changes == (pair.answer != pair.base_answer)
        assert pair.base[: pair.base_end].endswith(f"\n{color}: {letters[color]}")
        assert pair.source[: pair.source_end].endswith(f"\n{other}: {others[other]}")
        changed.add((line != where, set(letters.values()) != set(others.values())))
    assert changed == {(True, False), (False, True), (True, True)}
    parts = [{p for pair in pairs if pair.held_out is part for p in pair[:2]} for part in (True, False)]
    assert parts[0]
    assert not parts[0] & parts[1]
    assert mcqa_pairs(variable, 300, "symbol") == pairs
    assert all(pair.base_end is None for pair in mcqa_pairs(variable, 30))


@pytest.mark.parametrize("variable", ["country", "continent", "language"])
def test_facts_of_cities(variable):
    pairs, values = ravel_pairs(variable, 400), cities()
    assert len({pair[:2] for pair in pairs}) == 400
    asked = []
    for pair in pairs:
        (city, attribute), (other, theirs) = (
            re.search(r"\n([\w-]+), (\w+):$", prompt).groups() for prompt in (pair.base, pair.source)
        )
        assert theirs == variable
        assert pair.changes == (attribute == variable)
        assert pair.base_answer == f" {values[city][attribute]}"
        assert pair.source_answer == f" {values[other][variable]}"
        assert pair.answer == (pair.source_answer if pair.changes else pair.base_answer)
        assert values[city][attribute] != values[other][attribute]
        assert pair.base[: pair.base_end].endswith(f"\n{city}")
        assert pair.source[: pair.source_end].endswith(f"\n{other}")
        asked.append(attribute)
    assert 0.35 < asked.count(variable) / 400 < 0.65
    assert set(asked) == {"country", "continent", "language"}


def test_cities_that_are_held_out_can_be_in_no_other_pair():
    def parts(unseen):
        pairs = ravel_pairs("country", 400, unseen=unseen)
        towns = [
            {re.search(r"\n([\w-]+), \w+:$", p)[1] for pair in pairs if pair.held_out is part for p in pair[:2]}
            for part in (True, False)
        ]
        return towns[0] & towns[1]

    assert parts(False)
    assert not parts(True)


def test_cities_are_told_apart():
    found = cities()
    assert len(found) == 204, "as docs/localization.md says"
    assert all(re.fullmatch(r"[A-Z]\w+", name) for name in found)
    of_country = {}
    for values in found.values():
        assert of_country.setdefault(values["country"], values["continent"]) == values["continent"]
    assert {"Toulouse", "Nagoya"}.isdisjoint(found), "they are the examples"


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"base": "a b a c", "source": "d a e", "answer": " x", "at": "a", "changes": True, "base_answer": " y"},
        {"base": "a b", "source": "d a", "answer": " x", "source_at": "d"},
        {"base": "a", "source": "b", "answer": " z"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second, third = read_pairs(path)
    assert first == Pair("a b a c", "d a e", " x", True, " y", None, 5, 3, False)
    assert second == Pair("a b", "d a", " x", None, None, None, None, 1, False)
    assert third.held_out, "three in ten, the last"
    path.write_text(json.dumps({**lines[2], "held_out": True}) + "\n" + json.dumps(lines[1]))
    assert [pair.held_out for pair in read_pairs(path)] == [True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 1: expected an object"),
        ('{"base": "a", "source": "b"}', "line 1: answer must be a text"),
        ('{"base": "a", "source": "b", "answer": 3}', "line 1: answer must be a text"),
        ('{"base": "a", "source": "b", "answer": " x", "layer": 3}', "line 1: 'layer' is no field of a pair"),
        ('{"base": "a", "source": "b", "answer": " x", "changes": 1}', "line 1: changes must be true or false"),
        ('{"base": "a", "source": "b", "answer": " x", "at": "z"}', "line 1: at must be text in the base prompt"),
        ("{", "is not JSON"),
        ("", "has no pairs"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(path)
    assert "pairs.jsonl" in str(error.value)
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_pairs(tmp_path / "nothing")


@pytest.fixture(scope="module")
def spoken():
    """A model, its tokenizer, and pairs of prompts with what the model says to them."""
    model, tokenizer = make_model("llama").eval(), make_tokenizer(bos=True)
    prompts = [words(a, a + b, 3 * a) for a in range(20) for b in (1, 2)]
    said = {}
    with torch.no_grad():
        for prompt in prompts:
            token = int(model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())
            said[prompt] = " " + tokenizer.decode([token])
    pairs = [
        Pair(p, q, said[q], said[p] != said[q], said[p], said[q], p.index(" "), None, n % 3 == 0)
        for n, (p, q) in enumerate((p, q) for p in prompts for q in prompts[:5])
        if said[p] != " <unk>" and said[q] != " <unk>"
    ]
    return model, tokenizer, pairs


def test_pairs_that_the_model_answers_wrong_are_left_out(spoken):
    model, tokenizer, pairs = spoken
    whole = prepare(model, tokenizer, pairs, **QUIET)
    assert (whole.accuracy, whole.given, len(whole.pairs)) == (1.0, len(pairs), len(pairs))
    wrong = pairs[0].base
    other = next(pair.base_answer for pair in pairs if pair.base_answer != pairs[0].base_answer)
    changed = [
        pair._replace(
            base_answer=other if pair.base == wrong else pair.base_answer,
            source_answer=other if pair.source == wrong else pair.source_answer,
        )
        for pair in pairs
    ]
    task = prepare(model, tokenizer, changed, **QUIET)
    assert task.pairs == [pair for pair in changed if wrong not in pair[:2]]
    assert 0.9 < task.accuracy < 1
    with pytest.raises(
        ValueError, match=r"pairs: LlamaForCausalLM answers 9\d% of the 40 prompts right, and at least 99%"
    ):
        prepare(model, tokenizer, changed, at_least=0.99, **QUIET)
    ordered = sorted(pairs, key=lambda pair: pair.held_out)
    few = prepare(model, tokenizer, ordered, count=90, **QUIET)
    assert len(few.pairs) == 90
    assert int(few.held_out.sum()) == round(90 * sum(pair.held_out for pair in pairs) / len(pairs))
    assert few.pairs == [pair for pair in ordered if pair in few.pairs]


def test_a_task_is_what_a_site_takes(spoken):
    model, tokenizer, pairs = spoken
    task = prepare(model, tokenizer, pairs, **QUIET)
    assert task.position.unique().tolist() == [1], "<s>, and the first word"
    assert task.source_position.unique().tolist() == [3]
    assert task.held_out.tolist() == [pair.held_out for pair in pairs]
    assert task.changes.tolist() == [pair.changes for pair in pairs]
    site = task.site(model, 1)
    with torch.no_grad():
        for n in (0, 9):
            hidden = model(**tokenizer(pairs[n].base, return_tensors="pt"), output_hidden_states=True)
            torch.testing.assert_close(site.base[n], hidden.hidden_states[2][0, 1], rtol=1e-4, atol=1e-5)
            hidden = model(**tokenizer(pairs[n].source, return_tensors="pt"), output_hidden_states=True)
            torch.testing.assert_close(site.source[n], hidden.hidden_states[2][0, 3], rtol=1e-4, atol=1e-5)
            assert int(task.labels[n]) == int(hidden.logits[0, -1].argmax())
    unsaid = prepare(model, tokenizer, [pair._replace(changes=None) for pair in pairs], **QUIET)
    assert unsaid.changes is None
    unasked = [pair._replace(base_answer=None, source_answer=None) for pair in pairs]
    assert prepare(model, tokenizer, unasked, **QUIET).accuracy is None


def test_answers_that_begin_alike_are_left_out(spoken):
    model, tokenizer, pairs = spoken
    first = pairs[0].answer
    longer = [pair._replace(answer=f"{first} w1") if n == 0 else pair for n, pair in enumerate(pairs)]
    task = prepare(model, tokenizer, longer, **QUIET)
    assert all(pair.answer not in (first, f"{first} w1") for pair in task.pairs)
    assert len(task.pairs) < len(pairs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda pairs: [], ValueError, "pairs must not be empty"),
        (lambda pairs: ["a", *pairs], TypeError, r"pairs must be a list of Pair, pairs\[0\] is"),
        (lambda pairs: pairs[:9], ValueError, "pairs: 3 of 9 are left to judge by, at least 20"),
        (lambda pairs: [pair._replace(held_out=True) for pair in pairs], ValueError, "0 of .* are left to train on"),
        (lambda pairs: [pairs[0]._replace(answer=""), *pairs], ValueError, r"pairs\[0\].answer: '' does not begin"),
        (
            lambda pairs: [pairs[0]._replace(base_answer=" w39"), *pairs],
            ValueError,
            "are right answers to one prompt",
        ),
    ],
)
def test_what_does_not_fit_is_named(spoken, change, error, message):
    model, tokenizer, pairs = spoken
    with pytest.raises(error, match=message):
        prepare(model, tokenizer, change(pairs), at_least=0, **QUIET)


@pytest.mark.parametrize("make", [mcqa_pairs, ravel_pairs])
def test_what_does_not_exist_is_named(make):
    for given, message in (
        ({"variable": "weather"}, "variable must be"),
        ({"at": "first"}, "at must be"),
        ({"count": 0}, "count must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**given)
    with pytest.raises(ValueError, match="count must be .* at most"):
        ravel_pairs(count=10**6)
