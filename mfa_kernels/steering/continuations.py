"""Continuations of prompts from several seeds at once, the same draws for every way to steer, and their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_integer, check_number, check_text, shown
from mfa_kernels.data.language_model import check_evaluating, encoded, takes

_ROWS = 8  # whose logits, 200 kB a token, are held at once


class Continuations(NamedTuple):
    """What a model wrote after P prompts from S seeds; row s P + p continues prompt p from seed s.

    Attributes:
        ids: prompts, padded on the left, and what was written, (S P, T + n) int64.
        mask: 0 for padding, (S P, T + n).
        start: T, where the continuations begin.
        texts: S P of them, without the prompts.
    """

    ids: Tensor
    mask: Tensor
    start: int
    texts: list[str]


@torch.no_grad()
def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    new_tokens: int = 32,
    temperature: float = 0.8,
) -> Continuations:
    """Returns what a decoder writes after each prompt from each seed, `new_tokens` tokens each, as it is steered now.

    Every seed draws the same random numbers whatever the model is steered by, so that texts differ by the steering
    alone: the next token is the largest of logits / temperature + Gumbel noise, which is a sample of the softmax.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: P texts.
        seeds: S seeds.
        new_tokens: tokens of each continuation; it does not end before.
        temperature: above 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_evaluating(model)
    new_tokens = check_integer(new_tokens, "new_tokens", 1)
    temperature = check_number(temperature, "temperature", 1e-3)
    seeds = [check_integer(seed, "seeds") for seed in seeds]
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts, got {shown(prompts)}")
    for i, prompt in enumerate(prompts):
        check_text(prompt, f"prompts[{i}]")
    if not len(prompts) or not seeds:
        raise ValueError(f"prompts, seeds must hold one each, got {len(prompts)} and {len(seeds)}")
    inputs = padded(model, tokenizer, prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def sampled(ids: Tensor, logits: Tensor) -> Tensor:
        shape = (len(prompts), logits.shape[1])
        noise = torch.cat([-torch.empty(shape).exponential_(generator=each).log() for each in generators])
        return logits / temperature + noise.to(logits)

    ids = model.generate(
        **{name: value.repeat(len(seeds), 1) for name, value in inputs.items() if name != "position_ids"},
        do_sample=False, logits_processor=[sampled], min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        pad_token_id=0,
    )  # fmt: skip
    start = inputs["input_ids"].shape[1]
    mask = torch.ones_like(ids)
    mask[:, :start] = inputs["attention_mask"].repeat(len(seeds), 1)
    texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
    return Continuations(ids, mask, start, texts)


def padded(model: Any, tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Returns the arguments with which a decoder reads prompts that are padded on the left, positions among them."""
    inputs = encoded(model, tokenizer, list(prompts), padding=True, padding_side="left")
    return {**inputs, **_positions(model, inputs["attention_mask"])}


def _positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Positions that count real tokens alone, where a model is told any: some would count padding too."""
    if not takes(model, "position_ids"):
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


@torch.no_grad()
def negative_log_likelihood(model: Any, written: Continuations) -> Tensor:
    """Returns the negative log-likelihood of each continuation under a model, (S P,) float64, nats per token.

    Under the unsteered model, this is how fluent a steered text is.
    """
    found = []
    for ids, mask in zip(written.ids.split(_ROWS), written.mask.split(_ROWS)):
        inputs = {"input_ids": ids, "attention_mask": mask, **_positions(model, mask)}
        logits = model(**inputs).logits[:, written.start - 1 : -1]
        own = logits.gather(-1, ids[:, written.start :, None]).squeeze(-1)
        found.append((logits.double().logsumexp(-1) - own.double()).mean(-1))
    return torch.cat(found).cpu()
