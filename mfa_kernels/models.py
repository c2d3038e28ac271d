"""Hugging Face causal language models: loading them, finding layers, reading their outputs, writing text."""

from __future__ import annotations

import hashlib
import json
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.sharing import BUNDLED, local_name, shareable

# What `fingerprint` takes of a configuration: what versions of transformers agree on, as they do not on the rest.
_IDENTIFYING = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip

# Paths of the stack of decoder layers, by architecture family: Llama/Gemma/Qwen/Mistral, GPT-2, GPT-NeoX, OPT, MPT.
_STACKS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "transformer.blocks",
    "layers",
    "h",
)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of a model's decoder layers.

    Where none of the known places holds them, as in a wrapped model (PEFT, DDP) or a new architecture, the one list
    of modules with as many entries as the configuration says there are hidden layers. Of an encoder-decoder, the list
    of its decoder.

    Raises:
        ValueError: none is found, or several.
    """
    for path in _STACKS:
        try:
            stack = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(stack, nn.ModuleList):
            return path, stack
    decoder = _decoder_of_two(model)
    depth = getattr(text_config(model), "num_hidden_layers", None)
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if decoder is not None:
        children = model.get_submodule(decoder).named_children()
        found = [(f"{decoder}.{name}", m) for name, m in children if isinstance(m, nn.ModuleList)]
    if len(found) != 1:
        raise ValueError(
            f"layer: {'no' if not found else 'more than one'} stack of decoder layers found in {type(model).__name__}"
            f"{''.join(f' {path!r}' for path, _ in found)}; give the module path of a layer, as in "
            "model.named_modules()"
        )
    return found[0]


def _decoder_of_two(model: nn.Module) -> str | None:
    """Path of the decoder of an encoder-decoder; None for other models."""
    find: Any = getattr(model, "get_decoder", None)
    if find is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    decoder = find()
    return next((path for path, module in model.named_modules() if module is decoder and path), None)


def stack_of(model: nn.Module, layer: str) -> str:
    """Path of the module that holds the stack of layers that a module belongs to, and is called with its tokens.

    Args:
        model: a language model.
        layer: path of a layer, or of a part of one. For a module outside every stack, that of the decoder layers is
            taken, and the model itself ("") where none is found.
    """
    names = layer.split(".")
    for depth in range(1, len(names)):
        path = ".".join(names[:depth])
        if isinstance(model.get_submodule(path), nn.ModuleList):
            return path.rpartition(".")[0]
    try:
        return decoder_layers(model)[0].rpartition(".")[0]
    except ValueError:
        return ""


def resolve_layer(model: nn.Module, layer: int | str) -> tuple[str, nn.Module]:
    """Path and module of a decoder layer.

    Args:
        model: a causal language model.
        layer: an index (negative counts from the end), or a module path such as "model.layers.8".

    Raises:
        IndexError, TypeError, ValueError: naming what exists.
    """
    if isinstance(layer, str):
        try:
            return layer, model.get_submodule(layer)
        except AttributeError:
            raise ValueError(f"layer: {type(model).__name__} has no module {layer!r}") from None
    try:
        index = operator.index(layer)
    except TypeError:
        raise TypeError(f"layer must be an index or a module path, got {layer!r}") from None
    path, stack = decoder_layers(model)
    if not -len(stack) <= index < len(stack):
        raise IndexError(f"layer must be in [{-len(stack)}, {len(stack)}), got {index}")
    index %= len(stack)
    return f"{path}.{index}", stack[index]


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def fingerprint(model: nn.Module) -> str | None:
    """Of a model's configuration, wherever its files are; None for a module without one.

    It tells architectures and sizes apart, and is the same for a model and its fine-tunes, in any dtype.
    """
    config = text_config(model)
    if config is None:
        return None
    facts = [(name, getattr(config, name, None)) for name in _IDENTIFYING]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Of the first values of every parameter, in its own dtype: which of the models of one name and size it is."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if parameter.numel() and not parameter.is_meta:  # as of one that is offloaded
            first = parameter.detach()[(0,) * max(parameter.dim() - 1, 0)].reshape(-1)[:16]
            digest.update(first.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def origin(model: Any, tokenizer: Any) -> dict[str, str]:
    """What is written of a model and its tokenizer beside activations of theirs: names, and a fingerprint.

    Returns:
        "model" and "tokenizer", named by the rule of `mfa_kernels.sharing`, or by their classes where they come from no
        files; "model_fingerprint", of a model that has a configuration.
    """
    names = {"model": _name(model), "tokenizer": _name(tokenizer)}
    found = fingerprint(model)
    return names if found is None else {**names, "model_fingerprint": found}


def _name(source: Any) -> str:
    said = getattr(source, "name_or_path", "")
    return shareable(str(said)) if said else type(source).__name__


def check_evaluating(model: nn.Module) -> None:
    """Raises unless every module of a model is in evaluation mode.

    The rule of the package: what runs a model and hands back what it says (`logit_lens`, `logit_shift`,
    `alpha_for_kl`, `MFASteerer`, text that is written) refuses one in training mode, where dropout would pass for an
    effect; under `steer` itself it is the user who runs the model, to train it as well.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model is in training mode, where dropout would count as an effect: call model.eval()")


def hidden_states(output: Any) -> Tensor:
    """The hidden states (batch, positions, D) in a layer's output: a tensor, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden states replaced."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden


def weights_in(dtype: torch.dtype | str) -> dict[str, Any]:
    """The option of `from_pretrained` that asks for weights of a dtype, by the name that configurations have for it."""
    from transformers import PretrainedConfig

    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}


def remembered_model(said: Any) -> str:
    """What `load_language_model` takes for the model that a mixture or a store says it is of.

    Raises:
        ValueError: it says none, or one that is neither a folder here nor the name of a hub repository.
    """
    if not isinstance(said, str) or not said:
        raise ValueError("it does not say which model it is of")
    name = local_name(said)
    if name is not None:
        raise ValueError(f"it is of the local model {name!r}, whose folder it does not say")
    told = shareable(said)
    if told != BUNDLED and Path(said).is_dir():
        return said
    if local_name(told) is not None:
        raise ValueError(f"its model is {said}, which is no folder here")
    import transformers

    if isinstance(getattr(transformers, told, None), type):
        raise ValueError(f"it says no more of its model than the class, {told}")
    return told


def load_language_model(
    name: str | None = None, dtype: torch.dtype | None = None, tokenizer: str | None = None
) -> tuple[Any, Any]:
    """A Hugging Face causal language model and its tokenizer, in eval mode.

    Args:
        name: a hub id or a folder; None or "tiny_lm" is the small model that ships with the package. No code of a hub
            repository is ever run.
        dtype: of the weights; None: as stored (float32 for the small model).
        tokenizer: hub id or folder of another tokenizer than the model's own.
    """
    import transformers

    from mfa_kernels.data import tiny_lm

    name, tokenizer = name or BUNDLED, tokenizer or name or BUNDLED
    if name == BUNDLED:
        model, own = tiny_lm.load(dtype or torch.float32)
    else:
        options = {"trust_remote_code": False, **weights_in(dtype or "auto")}
        model, own = transformers.AutoModelForCausalLM.from_pretrained(name, **options).eval(), None
    if tokenizer == name and own is not None:
        return model, own
    place = tiny_lm.path() if tokenizer == BUNDLED else tokenizer
    return model, transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def bos_prefix(tokenizer: Any) -> list[int]:
    """The BOS token that a tokenizer puts in front of every text, as a list; an empty one where it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    # A tokenizer may have a BOS token that it does not put in front of texts, as GPT-2's.
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def text_tokens(tokenizer: Any, text: str, prefix: list[int]) -> list[int]:
    """The token ids of a text that `prefix` (from `bos_prefix`) goes in front of.

    Text from a chat template (`tokenizer.apply_chat_template(..., tokenize=False)`) begins with the BOS token's own
    text, which would give it two: that one is left out here.
    """
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens


def tokenize(tokenizer: Any, texts: str | list[str], **padding: Any) -> Any:
    """`tokenizer(texts, return_tensors="pt", **padding)`, with one BOS where that would give a text two.

    Args:
        tokenizer: of a Hugging Face model.
        texts: with or without the BOS token's text in front, as chat templates write it.
        padding: options of the tokenizer's `pad`; of one text, none is needed.

    Returns:
        What the tokenizer does: input_ids, attention_mask, ..., (texts, positions) int64.
    """
    prefix, batch = bos_prefix(tokenizer), [texts] if isinstance(texts, str) else texts
    # How many tokens of its own a text has too many: without a prefix, none are left out.
    extra = [
        len(text_tokens(tokenizer, text, [])) - len(text_tokens(tokenizer, text, prefix)) if prefix else 0
        for text in batch
    ]
    if not any(extra):
        return tokenizer(texts, return_tensors="pt", **padding)
    fields = {name: [row[n:] for row, n in zip(rows, extra)] for name, rows in tokenizer(batch).items()}
    return tokenizer.pad(fields, return_tensors="pt", **{"padding": False, **padding})


def continuation(
    model: Any, tokenizer: Any, prompt: str, new_tokens: int, temperature: float = 0.0, seed: int = 0, **options: Any
) -> str:
    """What the model writes after the prompt: greedily at temperature 0, else sampled from the seed.

    Further options are those of `model.generate`.

    Raises:
        ValueError: the model is in training mode.
    """
    check_evaluating(model)
    inputs = tokenize(tokenizer, prompt).to(model.device)
    sampling = {"temperature": temperature, "top_p": 0.9} if temperature > 0 else {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # generate() draws from the global generator
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs, **sampling, do_sample=temperature > 0, max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id, **options,
        )  # fmt: skip
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
