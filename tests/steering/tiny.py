"""Tiny randomly initialised models of several architectures, a mixture that fits them, and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaModel

from mfa_kernels import MFA
from mfa_kernels.data.language_model import hidden_states, resolve_layer
from tests.helpers.mixtures import mixture

WIDTH, RANK, COMPONENTS, LAYER, PAD = 32, 3, 6, 1, 0
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# With transformers 4.51, Gemma-2 with its cache is not Gemma-2 without one, steered or not: nothing to compare with.
SLIDING = "gemma2" if VERSION > (4, 51) else "llama"
ARCHITECTURES = tuple(dict.fromkeys(("gpt2", "llama", SLIDING, "qwen2", "qwen3", "gpt_neox")))
STATIC = "static" if VERSION > (4, 51) else "hybrid"  # until then the name of Gemma's static cache
# What transformers calls the cache among a model's arguments: another name from 5.24 on.
CACHE = next(name for name in ("cache", "past_key_values") if name in signature(LlamaModel.forward).parameters)
Z = torch.tensor([2.0, -3.0, 1.0])
BOTH: dict[str, Any] = {"component": 2, "alpha": 0.6, "latents": Z}
MIXTURE: dict[str, Any] = {"component": None, "alpha": 0.6, "latents": Z}
UNWRITTEN = 64  # outside the vocabulary: where transformers insists on a token that ends the sequence


def causal_lm(architecture: str = "llama", **changes: Any) -> nn.Module:
    """Three layers, hidden size 32, vocabulary 64; its weights are the same at each call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    if architecture == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    elif architecture == "gpt_neox":
        del sizes["num_key_value_heads"], sizes["head_dim"]
    elif architecture == "gemma2":
        sizes["sliding_window"] = 6
    config = AutoConfig.for_model(
        architecture, vocab_size=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=None, **{**sizes, **changes}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def fitting_mixture(dtype: torch.dtype = torch.float32, features: int = WIDTH, rank: int = RANK) -> MFA:
    m = mixture(COMPONENTS, features, rank, spread=0.3, dtype=dtype)
    return MFA.from_parameters(m.means, m.loadings, m.noise_variance, m.log_weights.exp()).requires_grad_(False)


def prompts(batch: int = 2, length: int = 7, padded: bool = False) -> dict[str, Tensor]:
    """Token ids and attention mask; with padding, row b has b + 1 columns of it on the left."""
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            ids[row, : row + 1] = PAD
            mask[row, : row + 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: nn.Module, inputs: dict[str, Tensor], new: int = 5, **options: Any) -> Any:
    """Greedy tokens (`.sequences`), and the logits of each step (`.logits`)."""
    with repaired_chunks(model) if "prefill_chunk_size" in options else nullcontext():
        return model.generate(
            **inputs, max_new_tokens=new, pad_token_id=PAD,
            **{"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options},
        )  # fmt: skip


@contextmanager
def repaired_chunks(model: nn.Module) -> Iterator[None]:
    """With `prefill_chunk_size`, transformers 4 gives every column its number as position, padding counted.

    Left-padded rows then read their prompt at other positions than in one pass, steered or not. The positions are taken
    away here, so that the model makes them from the mask, as it does for a whole prompt. And 4.51 compiles the chunks
    with fullgraph=True, which steering by position is not made for: here they are not compiled.
    """
    if VERSION >= (5, 0):
        yield
        return
    prepare = model.prepare_inputs_for_generation

    def without_positions(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return prepare(*args, **kwargs)

    model.prepare_inputs_for_generation, model.get_compiled_call = without_positions, lambda config: model.__call__
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation, model.get_compiled_call


def static_cache(model: nn.Module, batch: int = 2, length: int = 32) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_batch_size=batch, max_cache_len=length)


def generated(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens (B, new), and their logits (B, new, vocabulary)."""
    out = generate(model, inputs, **options)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@torch.no_grad()
def layer_output(model: nn.Module, inputs: dict[str, Tensor], layer: int = LAYER, **options: Any) -> Tensor:
    """Returns the output of the layer, (B, T, D), after the hooks that are on it now."""
    kept: list[Tensor] = []
    _, module = resolve_layer(model, layer)
    hook = module.register_forward_hook(lambda module, args, output: kept.append(hidden_states(output)))
    try:
        model(**inputs, **options)
    finally:
        hook.remove()
    return kept[0]


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def traces_on(model: nn.Module) -> tuple[set[str], int]:
    """The attributes and the number of hooks of a model, which steering leaves as they were."""
    return set(vars(model)), count_hooks(model)


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations (..., WIDTH), the same at each call."""
    return (0.5 * torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(3))).to(dtype)


def ramp(step: int) -> float:
    return 0.9 - 0.1 * step


def dense(x: Tensor, component: int | None, alpha: float, latents: Tensor) -> Tensor:
    """Equations 14 and 15 in fp64."""
    mfa, x = fitting_mixture(torch.float64), x.double()
    r = mfa.responsibilities(x)
    if component is not None:
        r = torch.zeros_like(r).index_fill_(-1, torch.tensor(component), 1.0)
    return (1 - alpha) * x + alpha * r @ mfa.means + torch.einsum("btk,kdr,r->btd", r, mfa.loadings, latents.double())


def outputs_of(module: nn.Module) -> list[Any]:
    """The hidden states that a module puts out from now on, after the hooks that it has already."""
    kept: list[Any] = []
    module.register_forward_hook(lambda module, args, output: kept.append(hidden_states(output)))
    return kept


def row_of(batch: Any, row: int) -> Any:
    """A batch row of inputs, or of what `generated` returned, as a batch of one."""
    if isinstance(batch, dict):
        return {name: value[row : row + 1] for name, value in batch.items()}
    return tuple(value[row : row + 1] for value in batch)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Tokens and logits are the same to the bit."""
    assert all(map(torch.equal, found, expected))


def assert_written_alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Tokens are the same, and logits within 1e-4."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
