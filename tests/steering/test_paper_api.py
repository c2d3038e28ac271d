"""`MFASteerer` does what `steer` does, under the names of the paper's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfa_kernels import steer
from mfa_kernels.data import tiny_lm
from mfa_kernels.steering import MFASteerer
from tests.steering.tiny import LAYER, WIDTH, Z, causal_lm, count_hooks, fitting_mixture, prompts

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("k", [2, None])
def test_logits_and_tokens_are_those_of_steer(model: Any, padded: Any, mfa: Any, k: int | None) -> None:
    steerer, hooks = MFASteerer(model, mfa, LAYER), count_hooks(model)
    for latents in (None, Z):
        with torch.no_grad(), steer(model, mfa, LAYER, k, 0.6, latents):
            logits, tokens = model(**padded).logits, model.generate(**padded, **GREEDY)
        if latents is None:
            assert torch.equal(steerer.intervene(padded, 0.6, k), logits)
            assert torch.equal(steerer.generate(padded, 0.6, k, **GREEDY), tokens)
        else:
            assert torch.equal(steerer.intervene_to_latent_two_stage(padded, 0.6, latents, k), logits)
            assert torch.equal(steerer.generate_to_latent_two_stage(padded, 0.6, latents, k, **GREEDY), tokens)
    assert count_hooks(model) == hooks
    ids = prompts()["input_ids"]
    torch.testing.assert_close(steerer.intervene(ids, 0.0, 2), model(ids).logits)


def test_samples_and_latents_per_row() -> None:
    model, ids, mfa = causal_lm(), prompts()["input_ids"], fitting_mixture()
    steerer, z = MFASteerer(model, mfa, LAYER), torch.stack([Z, -Z])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = steerer.generate_to_latent_two_stage_sampling(
            ids, 0.5, z, 2, m=3, max_new_tokens=6, pad_token_id=0
        )  # fmt: skip
        torch.manual_seed(0)
        with steer(model, mfa, LAYER, 2, 0.5, z):
            expected = model.generate(
                ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, pad_token_id=0
            )  # fmt: skip
    assert samples.shape == (6, 13)
    assert torch.equal(samples, expected)
    assert len({tuple(row.tolist()) for row in samples}) > 2


def test_text_in_text_out() -> None:
    model, tokenizer = tiny_lm.load()
    mfa = fitting_mixture(features=model.config.hidden_size)
    steerer = MFASteerer(model, mfa, 2, tokenizer)
    options = {**GREEDY, "pad_token_id": tokenizer.eos_token_id}
    texts = ["def read(path):", "The value"]
    together = steerer.generate(texts, 0.9, 1, **options)
    assert [steerer.generate(text, 0.9, 1, **options)[0] for text in texts] == together
    assert all(out.startswith(text) for out, text in zip(together, texts))
    assert together != [steerer.generate(text, 0.0, 1, **options)[0] for text in texts]


def test_text_from_a_chat_template_is_not_given_another_bos() -> None:
    model, tokenizer = tiny_lm.load()
    steerer = MFASteerer(model, fitting_mixture(features=model.config.hidden_size), 2, tokenizer)
    texts = ["def read(path):", "The value"]
    for given in (texts, texts[0]):
        plain = steerer._inputs(given)
        chat = steerer._inputs("<|bos|>" + given if isinstance(given, str) else [given[0], "<|bos|>" + given[1]])
        assert list(chat) == list(plain)
        assert all(torch.equal(chat[name], plain[name]) for name in plain)


def test_sites() -> None:
    gpt2 = causal_lm("gpt2")
    wide = fitting_mixture(features=4 * WIDTH)
    for site, mfa, path in (
        ("resid_post", fitting_mixture(), "transformer.h.1"),
        ("mlp_out", fitting_mixture(), "transformer.h.1.mlp"),
        ("mlp_act", wide, "transformer.h.1.mlp.act"),
    ):
        steerer = MFASteerer(gpt2, mfa, LAYER, site=site)
        with torch.no_grad(), steer(gpt2, mfa, path, 2, 0.6):
            expected = gpt2(**prompts()).logits
        assert torch.equal(steerer.intervene(prompts(), 0.6, 2), expected)
    with pytest.raises(ValueError, match="the activations of model.layers.1.mlp .LlamaMLP. are no module's output"):
        MFASteerer(causal_lm(), wide, LAYER, site="mlp_act")
    with pytest.raises(ValueError, match="site must be one of"):
        MFASteerer(gpt2, wide, LAYER, site="resid_pre")
    with pytest.raises(ValueError, match="tokenizer: give one to prompt with text"):
        MFASteerer(gpt2, fitting_mixture(), LAYER).generate("text", 0.5)


def test_a_model_in_training_is_refused(model: Any) -> None:
    steerer = MFASteerer(model.train(), fitting_mixture(), LAYER)
    for run in (steerer.intervene, steerer.generate):
        with pytest.raises(ValueError, match="model is in training mode"):
            run(prompts(), 0.5, 2)
    model.eval()
    steerer.intervene(prompts(), 0.5, 2)
