"""Texts that are steered while they are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels.data.language_model import continuation
from mfa_kernels.explorer import Explorer
from mfa_kernels.explorer.playground import Run, Settings
from mfa_kernels.interpret.topics import genre_counts, topic_regions
from mfa_kernels.steering import Add, Offset, Toward, steer

PROMPT = "w1 w2 w3"


def _written(explorer: Explorer, **given: Any) -> tuple[str, dict[str, Any]]:
    lines = list(explorer.playground.begin({"prompt": PROMPT, "new_tokens": 8, **given}).lines())
    return "".join(line.get("text", "") for line in lines), lines[-1]


@pytest.mark.parametrize(
    ("given", "interventions"),
    [
        ({"plain": True, "component": 2, "alpha": 0.9}, None),
        ({"component": 2, "alpha": 0.9}, lambda mfa: [Toward(2, 0.9)]),
        (
            {"component": 2, "alpha": 0.5, "latents": {"1": 1.5}},
            lambda mfa: [Toward(2, 0.5), Offset(2, torch.tensor([0.0, 1.5]))],
        ),
        (
            {"component": 2, "alpha": 2.0, "mode": "add"},
            lambda mfa: [Add(mfa.means[2] - mfa.log_weights.exp() @ mfa.means, 2.0)],
        ),
    ],
    ids=["plain", "toward", "latents", "add"],
)
def test_the_text_is_that_of_steer(explorer: Explorer, given: dict[str, Any], interventions: Any) -> None:
    text, end = _written(explorer, **given)
    handle = None
    if interventions is not None:
        with torch.no_grad():
            handle = steer(explorer.model, explorer.mfa, 2, interventions=interventions(explorer.mfa))
    expected = continuation(explorer.model, explorer.tokenizer, PROMPT, 8)
    if handle is not None:
        handle.remove()
    assert text == expected
    assert end["done"] is True


def test_nll_is_that_of_the_model_as_it_is(explorer: Explorer) -> None:
    text, end = _written(explorer, component=2, alpha=1.0)
    model, tokenizer = explorer.model, explorer.tokenizer
    prompt = tokenizer(PROMPT)["input_ids"]
    whole = torch.tensor([[*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    if whole.shape[1] - len(prompt) != end["tokens"]:
        pytest.skip("not applicable: a special token was written, which the text does not show")
    with torch.no_grad():
        logits = model(input_ids=whole).logits[0].double().log_softmax(-1)
    expected = -logits[torch.arange(len(prompt) - 1, whole.shape[1] - 1), whole[0, len(prompt) :]].mean()
    assert end["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_a_change_takes_effect_between_two_tokens(explorer: Explorer) -> None:
    run = explorer.playground.begin({"prompt": PROMPT, "component": 2, "alpha": 0.0, "new_tokens": 40})
    run.change({"alpha": 0.7, "latents": {"0": 1.0}})
    assert (run.settings.component, run.settings.alpha, run.settings.latents) == (2, 0.7, {"0": 1.0})
    with steer(explorer.model, explorer.mfa, 2, interventions=[Toward(2, 0.0)]) as handle:
        assert run.obey(handle) is False
        states = torch.randn(1, 3, explorer.mfa.n_features)
        steered = handle._plan.program(states, True, (0,)).hidden
        expected = 0.3 * states + 0.7 * explorer.mfa.means[2] + explorer.mfa.loadings[2, :, 0]
        torch.testing.assert_close(steered, expected)
        run.change({"component": None})
        run.obey(handle)
        torch.testing.assert_close(handle._plan.program(states, True, (0,)).hidden, states)


def test_stop_ends_the_text(explorer: Explorer) -> None:
    run = explorer.playground.begin({"prompt": PROMPT, "new_tokens": 40})
    lines = run.lines()
    next(lines)
    run.stop()
    (*_, end) = list(lines)
    assert (end["tokens"], end["stopped"], end["nll"]) == (0, True, None)
    assert run.is_over
    assert run.obey(None) is True


def test_a_region_may_come_while_the_text_is_written(explorer: Explorer, monkeypatch: Any) -> None:
    changed = explorer.playground.begin({"prompt": PROMPT, "new_tokens": 8})
    changed.change({"component": 2, "alpha": 1.0})
    with torch.no_grad(), steer(explorer.model, explorer.mfa, 2, interventions=[Toward(0, 0.0)]) as handle:
        changed.obey(handle)
        states = torch.randn(1, 2, explorer.mfa.n_features)
        torch.testing.assert_close(handle._plan.program(states, True, (0,)).hidden[0, 0], explorer.mfa.means[2])
    given = {}
    monkeypatch.setattr(
        "mfa_kernels.explorer.playground.steer", lambda *args, **options: given.update(options) or handle
    )
    _written(explorer)
    assert [type(each) for each in given["interventions"]] == [Toward]


def test_a_text_ends_where_the_model_reads_no_further(explorer: Explorer) -> None:
    _, end = _written(explorer, new_tokens=500)  # of 64 positions, four are the prompt's
    assert end["tokens"] <= 60
    _, end = _written(explorer, prompt="w1 " * 70)
    assert "prompt must have fewer tokens than the model can read, got 71" in end["error"]


def test_a_new_text_ends_the_one_before(explorer: Explorer) -> None:
    first = explorer.playground.begin({"prompt": PROMPT})
    second = explorer.playground.begin({"prompt": PROMPT})
    assert first.obey(None) is True
    assert second.obey(None) is False
    with pytest.raises(LookupError, match="written already"):
        explorer.playground.run(first.id)
    assert explorer.playground.run(second.id) is second


def test_the_model_is_left_as_it_was(explorer: Explorer) -> None:
    before = continuation(explorer.model, explorer.tokenizer, PROMPT, 8)
    _written(explorer, component=1, alpha=1.0)
    assert continuation(explorer.model, explorer.tokenizer, PROMPT, 8) == before
    assert not any(module._forward_hooks for module in explorer.model.modules())


def test_an_error_is_told_in_the_stream(explorer: Explorer, monkeypatch: Any) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of paper")

    monkeypatch.setattr("mfa_kernels.explorer.playground.continuation", broken)
    text, end = _written(explorer, component=1)
    assert (text, end) == ("", {"error": "out of paper"})


def test_a_prompt_that_is_too_long(explorer: Explorer) -> None:
    with pytest.raises(ValueError, match="prompt must be at most 20,000 characters, got 20,001"):
        Run(explorer, {"prompt": "w" * 20_001})


def test_settings_without_a_region_steer_nothing(explorer: Explorer) -> None:
    assert Settings(explorer, {"alpha": 1.0}).interventions() == []


def test_a_genre_is_the_set_of_its_regions(explorer: Explorer) -> None:
    sea = explorer.texts.genres.index("sea")
    components, weights = topic_regions(genre_counts(explorer.mfa, explorer.store), "sea")
    rows = explorer.assigned.counts.double() / explorer.assigned.counts.sum()
    means = explorer.mfa.means.detach().double()
    expected = weights @ means[components] - rows @ means
    (added,) = Settings(explorer, {"genre": sea, "alpha": 1.5, "component": 2}).interventions()
    assert added.alpha == 1.5
    torch.testing.assert_close(added.direction.double(), expected, rtol=1e-4, atol=1e-5)
    found = explorer.topic(sea)
    assert [region["component"] for region in found["regions"]] == components.tolist()
    assert sum(region["weight"] for region in found["regions"]) == pytest.approx(1.0)


def test_a_region_takes_the_place_of_a_genre(explorer: Explorer) -> None:
    first = Settings(explorer, {"genre": 1, "alpha": 1.0})
    stronger = Settings(explorer, {"alpha": 2.0}, first)
    assert (stronger.genre, stronger.component, stronger.alpha) == (1, None, 2.0)
    region = Settings(explorer, {"component": 3, "mode": "toward", "alpha": 0.2}, stronger)
    assert (region.genre, region.component) == (None, 3)
    with pytest.raises(IndexError, match=r"genre must be in \[0, 3\), got 3"):
        Settings(explorer, {"genre": 3})
