"""`steer` beside a hook written by hand on as many architectures as transformers has small configurations for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.steering.test_by_hand import POSITIONS, compare
from tests.steering.tiny import PAD, WIDTH, generated, prompts

SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 80, "initializer_range": 0.2,
}  # fmt: skip
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
OWN_SIZES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "phi", "phi3", "gemma", "qwen2", "qwen3", "olmo2", "cohere", "stablelm")},
    **{name: {} for name in ("starcoder2", "gpt_neox", "smollm3", "glm4", "nemotron", "persimmon", "falcon_mamba")},
    **{name: {"n_embd": WIDTH, "n_layer": 3, "n_head": 4} for name in ("gpt2", "gpt_bigcode")},
    **{name: {"is_decoder": True} for name in ("bert", "roberta")},
    **{name: {"sliding_window": 4} for name in ("gemma2", "mistral")},
    "gptj": {"rotary_dim": 4},
    "codegen": {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "ctrl": {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "dff": 48},
    "bloom": {"n_layer": 3, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "xglm": {"d_model": WIDTH, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48},
    "gpt_neo": {"num_layers": 3, "num_heads": 4, "attention_types": [[["global"], 3]]},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mixtral": {"num_local_experts": 2, "sliding_window": 4},
    "gpt_oss": {
        "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
    "bamba": {**STATES, "attn_layer_indices": [1], "mamba_chunk_size": 8},
    "falcon_h1": {**STATES, "mamba_d_ssm": WIDTH, "mamba_n_heads": 4, "mamba_chunk_size": 8},
    "granitemoehybrid": {
        **STATES, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2, "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
    "recurrent_gemma": {
        "lru_width": WIDTH, "attention_window_size": 8, "block_types": ["recurrent", "attention", "recurrent"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_experts": 2,
        "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
}  # fmt: skip


def built(architecture: str) -> nn.Module:
    """A model with random weights that writes; or the test is skipped, where this transformers has none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, **OWN_SIZES[architecture]}
    try:
        config = AutoConfig.for_model(
            architecture, vocab_size=64, pad_token_id=PAD, bos_token_id=1, eos_token_id=None, **sizes
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
        generated(model, prompts())
    except Exception as error:
        pytest.skip(f"not applicable: this transformers does not run {architecture} so small: {error!s:.100}")
    return model


@pytest.mark.more
@pytest.mark.parametrize("architecture", OWN_SIZES)
def test_writes_what_the_hook_writes(architecture: str) -> None:
    model = built(architecture)
    for positions in POSITIONS:
        compare(model, lambda: generated(model, prompts()), 7, positions)
