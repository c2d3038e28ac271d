"""The network above a site is the model: the same logits, whatever is padded, and gradients to the site alone."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from mfa_kernels import MFA
from mfa_kernels.evaluation import MFAFeaturizer, Site, localize
from tests.helpers.language import VOCABULARY, make_model, make_tokenizer, words

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "gpt2", "gemma2")
TEXTS = [words(1, 2, 3, 4), words(5, 6), words(7, 8, 9), words(2, 3, 4, 5, 6)]
OTHERS = [words(9, 9, 1), words(4, 4, 4, 4), words(3), words(8, 1, 8, 1, 8)]


def prompts(texts, side="left"):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    return {name: found[name] for name in ("input_ids", "attention_mask")}  # older ones give types of tokens too


def quick(model, *given, **named):
    """A site that leaves out what can be, without a warning.

    Before version 5 of transformers, GPT-2 and Gemma 2 had caches of their own kinds: all tokens run, and that is said.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        site = Site(model, *given, **named)
    told = ["tokens before the site" in str(one.message) for one in said]
    old = transformers.__version__.startswith("4.") and not isinstance(model, LlamaForCausalLM)
    assert told in (([], [True]) if old else ([],))
    assert site.starts == (0 if told else int(site._column.min()))
    return site


@pytest.fixture(params=KINDS)
def model(request):
    if request.param != "gemma2":
        return make_model(request.param).eval()
    config = Gemma2Config(  # whose embeddings are scaled, and whose layers take turns at two kinds of attention
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


def by_hand(model, layer, inputs, column, patched):
    """The whole model, with a hook that replaces one token."""
    module = model.get_submodule(layer)

    def replace(module, given, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[torch.arange(len(hidden)), column] = patched
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(replace)
    try:
        return model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_patched_logits_are_those_of_the_whole_model(model, side):
    base, source = prompts(TEXTS, side), prompts(OTHERS, side)
    site = quick(model, 1, base, source)
    assert site.skips
    counts = base["attention_mask"].sum(1)
    last = base["input_ids"].shape[1] - 1 if side == "left" else counts - 1
    last = torch.as_tensor(last).expand(len(TEXTS))
    with torch.no_grad():
        patched = 0.5 * (site.base + site.source)
        expected = by_hand(model, site.layer, base, last, patched)[torch.arange(4), last]
        found = site.logits(patched, torch.arange(4))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        some = torch.tensor([2, 0])
        torch.testing.assert_close(site.logits(patched[some], some), expected[some], rtol=1e-4, atol=1e-5)
        same = site.logits(site.base, torch.arange(4))
        whole = model(**{name: base[name] for name in ("input_ids", "attention_mask")}).logits[torch.arange(4), last]
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [2, -2, [1, 2, 1, 3]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_before_the_site_do_not_run_again(model, side, position):
    """They are there as keys and values, of each prompt once; gradients of the patch are those of the whole model."""
    order = torch.tensor([0, 1, 2, 3, 1, 0])  # prompts that come again
    base, source = (
        {name: prompts(texts, side)[name][order] for name in ("input_ids", "attention_mask")}
        for texts in (TEXTS, OTHERS)
    )
    position = torch.tensor(position)[order] if isinstance(position, list) else position
    site = quick(model, 1, base, source, position, source_position=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = Site(model, 1, base, source, position, source_position=1, keep_prefix=False)
    assert (whole.starts, whole.skips, site.skips) == (0, True, True)
    torch.testing.assert_close(site.base, whole.base)
    torch.testing.assert_close(site.source, whole.source)
    stack = model.get_submodule(site.layer.rpartition(".")[0])
    seen = []
    handle = stack[-1].register_forward_hook(lambda module, given, output: seen.append(given[0].shape[1]))
    pairs = torch.tensor([4, 3, 5, 0])
    grads = []
    for one in (site, whole):
        patched = (0.5 * (one.base + one.source))[pairs].requires_grad_()
        logits = one.logits(patched, pairs)
        logits.square().sum().backward()
        grads.append((logits.detach(), patched.grad))
    handle.remove()
    length = base["input_ids"].shape[1]
    assert seen == [length - site.starts, length]
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    column = site._column[pairs]
    some = {name: value[pairs] for name, value in base.items()}
    with torch.no_grad():
        answer = (some["attention_mask"].cumsum(1).argmax(1)) if side == "right" else torch.full((4,), length - 1)
        by_hook = by_hand(model, site.layer, some, column, 0.5 * (site.base + site.source)[pairs])
    torch.testing.assert_close(grads[0][0], by_hook[torch.arange(4), answer], rtol=1e-4, atol=1e-5)


def test_where_keys_are_not_all_that_tokens_leave_behind_they_run(model):
    """As in a model whose layers keep a state of their own beside the cache."""
    stack = model.get_submodule(Site(model, 1, prompts(TEXTS), prompts(OTHERS)).layer.rpartition(".")[0])
    original = stack[-1].forward

    def reads_all_tokens(*given, **named):
        output = original(*given, **named)
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + 5 * given[0].cumsum(1).roll(1, -1)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    stack[-1].forward = reads_all_tokens
    with pytest.warns(RuntimeWarning, match="the tokens before the site of .* cannot be left out"):
        site = Site(model, 1, prompts(TEXTS), prompts(OTHERS))
    assert (site.skips, site.starts) == (True, 0)
    with torch.no_grad():
        found = site.logits(site.base, torch.arange(4))
        inputs = prompts(TEXTS)
        whole = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, -1]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_a_model_with_a_cache_of_its_own_kind_runs_all_tokens(model, monkeypatch):
    original = type(model).forward

    @functools.wraps(original)
    def forward(self, *given, **named):
        if any(isinstance(value, DynamicCache) for value in named.values()):
            raise TypeError("a cache of another kind is wanted")
        return original(self, *given, **named)

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.warns(RuntimeWarning, match="tokens before the site of .*TypeError: a cache of another kind"):
        site = Site(model, 1, prompts(TEXTS), prompts(OTHERS))
    assert (site.skips, site.starts) == (True, 0)
    monkeypatch.undo()
    with torch.no_grad():
        found = site.logits(site.base, torch.arange(4))
        expected = Site(model, 1, prompts(TEXTS), prompts(OTHERS)).logits(site.base, torch.arange(4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_below_do_not_run_again_and_come_back(model):
    base, source = prompts(TEXTS), prompts(OTHERS)
    site = Site(model, 1, base, source)
    ran = []
    stack = model.get_submodule(site.layer.rpartition(".")[0])
    inner = next(
        module for module in stack[0].modules() if isinstance(module, torch.nn.Linear) or hasattr(module, "nf")
    )
    inner.register_forward_hook(lambda *given: ran.append(1))
    with torch.no_grad():
        site.logits(site.base, torch.arange(4))
        assert ran == []
        model(input_ids=base["input_ids"])
    assert ran == [1]
    assert all("forward" not in vars(layer) for layer in stack)


def test_what_other_tools_have_put_there_stays(model):
    """accelerate, for one, replaces the forward of a layer that it moves between devices."""
    stack = model.get_submodule(Site(model, 1, prompts(TEXTS), prompts(OTHERS)).layer.rpartition(".")[0])
    calls = []

    def wrapped(layer):
        original = layer.forward
        return lambda *given, **named: calls.append(1) or original(*given, **named)

    for layer in stack:
        layer.forward = wrapped(layer)
    own = [layer.forward for layer in stack]
    site = Site(model, 1, prompts(TEXTS), prompts(OTHERS))
    assert site.skips
    assert [layer.forward for layer in stack] == own
    with torch.no_grad(), pytest.raises(IndexError):
        site.logits(site.base, torch.tensor([0, 1, 2, 99]))
    assert [layer.forward for layer in stack] == own
    calls.clear()
    with torch.no_grad():
        site.logits(site.base, torch.arange(4))
    assert len(calls) == len(stack) - 2, "the layers above"


def test_a_part_of_a_layer_is_a_site_too(model):
    """There, the layers below run again: nothing is said, since that is what was asked for."""
    part = next(name for name, _ in model.named_modules() if name.endswith(".1.mlp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        site = Site(model, part, prompts(TEXTS), prompts(OTHERS))
    assert not site.skips
    with torch.no_grad():
        found = site.logits(site.base, torch.arange(4))
        inputs = prompts(TEXTS)
        whole = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits[:, -1]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_site_alone(model):
    site = Site(model, 1, prompts(TEXTS), prompts(OTHERS))
    patched = site.base.clone().requires_grad_()
    site.logits(patched, torch.arange(4)).square().sum().backward()
    assert patched.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_where_layers_cannot_be_left_out_they_run(model):
    """As where the next layer wants what one below has left: a warning, and the same logits."""
    stack = model.get_submodule(Site(model, 1, prompts(TEXTS), prompts(OTHERS)).layer.rpartition(".")[0])
    with torch.no_grad():
        for parameter in stack[0].parameters():
            parameter.mul_(8)  # as it is drawn, a layer hardly changes what it is given
    seen = []
    stack[0].register_forward_hook(lambda module, given, output: seen.append(output))
    original = stack[-1].forward

    def reads_the_first(*given, **named):
        output = original(*given, **named)
        below = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
        scale = 1 + 1e3 * below.square().mean() * torch.linspace(0, 1, 16)
        return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale

    stack[-1].forward = reads_the_first
    base, source = prompts(TEXTS), prompts(OTHERS)
    with pytest.warns(RuntimeWarning, match="cannot be left out"):
        site = Site(model, 1, base, source)
    assert not site.skips
    with torch.no_grad():
        found = site.logits(site.base, torch.arange(4))
        whole = model(**{name: base[name] for name in ("input_ids", "attention_mask")}).logits[:, -1]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_a_mask_is_learnt_through_a_language_model():
    """To take everything from the source is to answer as the source does, where the site is the last token of the last
    layer."""
    model = make_model("llama").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 10, (120, 5), generator=generator)
    base, source = {"input_ids": ids[:60]}, {"input_ids": ids[60:]}
    site = Site(model, -1, base, source)
    with torch.no_grad():
        labels = model(input_ids=ids[60:]).logits[:, -1].argmax(-1)
    x = torch.cat([site.base, site.source])
    mfa = MFA.from_centroids(x[::12], 2, noise_variance=0.05 * x.var(0)).requires_grad_(False)
    features = MFAFeaturizer(mfa)
    nothing = localize(site.logits, labels, site.base, site.source, features, mask=torch.zeros(20), progress=False)
    everything = localize(site.logits, labels, site.base, site.source, features, mask=torch.ones(20), progress=False)
    learnt = localize(site.logits, labels, site.base, site.source, features, epochs=4, progress=False)
    assert nothing.iia < everything.iia
    assert learnt.iia > nothing.iia
    assert learnt.losses[-1] < learnt.losses[0]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"base": "a text"}, TypeError, "base must be what a tokenizer returns"),
        (
            {"source": {"input_ids": torch.zeros(3, 4).long()}},
            ValueError,
            "source must have a prompt for each of base's 4",
        ),
        ({"position": 9}, IndexError, "position must be a token of its prompt: prompt 0 has 5 tokens"),
        ({"position": torch.zeros(3).long()}, ValueError, "position must be an integer, or one for each of the 4"),
        ({"source_position": [0, 0, 0, 99]}, IndexError, "source_position must be a token of its prompt: prompt 3"),
        ({"layer": 17}, IndexError, "layer must be in"),
        ({"base": {"input_ids": torch.zeros(4).long()}}, ValueError, r"base\['input_ids'\] must have shape \(N, T\)"),
    ],
)
def test_what_does_not_fit_is_named(given, error, message):
    call = {"model": make_model("llama").eval(), "layer": 1, "base": prompts(TEXTS), "source": prompts(OTHERS), **given}
    with pytest.raises(error, match=message):
        Site(**call)
