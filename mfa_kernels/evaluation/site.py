"""A site of a language model: what leaves one layer at one token of each prompt, and the network above it.

`localize` runs the network above thousands of times with other activations at the site. What comes before does not
change, so it runs once: afterwards the layers below hand on what they are given, the layer itself puts out what it did,
but for the token of the site, and the tokens before the site are there as keys and values (prefix.py). Whether that is
the model is tried when the site is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import check_flag, check_integer, check_integers
from mfa_kernels.data.language_model import (
    PassEnds,
    check_evaluating,
    hidden_states,
    input_device,
    resolve_layer,
    takes,
    with_hidden_states,
    without_notes,
)
from mfa_kernels.evaluation.prefix import Prefix, cache_argument, only_columns

_CLOSE = 1e-3  # of the largest logit: what leaving something out may change


class Site:
    """Activations of base and source prompts at a site, and the logits of patched bases.

    Args:
        model: a Hugging Face causal language model in evaluation mode.
        layer: index or module path; the site is what leaves it.
        base, source: what the tokenizer returns for N prompts, padded, with input_ids (N, T) and attention_mask.
        position: of the site's token in the real tokens of each base, from 0, or negative from the end: an int, or one
            for each prompt (N,).
        source_position: the same in the sources; as `position` when None.
        batch_size: prompts per forward pass, when the site is made.
        keep_prefix: keep keys and values of the tokens before the site, in the layers above it, for each base prompt:
            False takes less memory, and more time.

    Attributes:
        base, source: activations at the site, (N, D), without gradients.
        skips: True where the layers below the site do not run again. They do where `layer` is no layer of a stack, and,
            after a warning, where the model is another one without them.
        starts: column of the inputs from which on tokens run again: the first site of all base prompts, so pad on the
            left where sites are counted from the end. 0, all of them, where the layers below run again, and, after a
            warning, where the model is another one with keys and values of earlier tokens.

    Raises:
        TypeError, ValueError, IndexError: naming the argument.
    """

    def __init__(
        self,
        model: Any,
        layer: int | str,
        base: Mapping[str, Tensor],
        source: Mapping[str, Tensor],
        position: Any = -1,
        source_position: Any = None,
        batch_size: int = 64,
        *,
        keep_prefix: bool = True,
    ) -> None:
        check_evaluating(model)
        self.model, (self.layer, self._module) = model, resolve_layer(model, layer)
        self._inputs = _checked_inputs(model, base, "base")
        others = _checked_inputs(model, source, "source")
        if len(others["input_ids"]) != len(self._inputs["input_ids"]):
            raise ValueError(
                f"source must have a prompt for each of base's {len(self._inputs['input_ids'])}, got "
                f"{len(others['input_ids'])}"
            )
        batch_size = check_integer(batch_size, "batch_size", 1)
        source_position = position if source_position is None else source_position
        self._column = _columns(self._inputs["attention_mask"], position, "position")
        column = _columns(others["attention_mask"], source_position, "source_position")
        others, row = _distinct(others)
        self.source = self._states(others, batch_size)[row, column]
        self._inputs, self._row = _distinct(self._inputs)
        self._answer = _columns(self._inputs["attention_mask"], -1, "position")
        self._below, self._output = self._examples()
        self._prefix: Prefix | None = None
        self.starts, self.skips = 0, False
        start, cache = int(self._column.min()), cache_argument(model)
        if check_flag(keep_prefix, "keep_prefix") and self._below and start and cache is not None:
            self._prefix = Prefix(start)
        why = None
        try:
            self._hidden = self._states(self._inputs, batch_size, self._prefix)
        except Exception as error:  # any: a model may want a cache of its own kind, or there is no room for keys
            if self._prefix is None:
                raise
            why, self._prefix = f"{type(error).__name__}: {error}", None
            self._hidden = self._states(self._inputs, batch_size)
        self.base = self._hidden[self._row, self._column]
        self._choose(why)

    def logits(self, patched: Tensor, pairs: Tensor) -> Tensor:
        """Returns the logits after the last token of some base prompts whose site has other activations.

        Args:
            patched: (n, D); gradients reach it, and no parameter of the model.
            pairs: numbers of the base prompts, (n,).

        Returns:
            (n, V).
        """
        pairs = pairs.to(self._row.device)
        row, start = self._row[pairs], self.starts
        hidden, columns = self._hidden[row, start:], self._column[pairs] - start
        rows = torch.arange(len(pairs), device=hidden.device)
        hidden = hidden.index_put((rows, columns), patched.to(hidden))
        inputs = {name: value[row] for name, value in self._inputs.items()}
        answer = self._answer[row] - start
        with _frozen(self.model), self._replaced(hidden):
            if not self.skips:
                return self._run(inputs)[rows, answer]
            with only_columns(self.model, answer):
                found = self._run(inputs, start, row)
        return found[:, 0] if found.shape[1] == 1 else found[rows, answer]

    def _run(self, inputs: Mapping[str, Tensor], start: int = 0, prompts: Tensor | None = None) -> Tensor:
        """Logits (n, T - start, V) of the tokens from a column on; those before are the prefix of these prompts."""
        given: dict[str, Any] = dict(inputs)
        if start:
            assert self._prefix is not None
            assert prompts is not None
            for name, value in inputs.items():  # a mask is of all tokens, also of those in the cache
                if name != "attention_mask" and value.shape[1:2] == inputs["attention_mask"].shape[1:]:
                    given[name] = value[:, start:]
            given[str(cache_argument(self.model))] = self._prefix.cache(prompts)
        elif takes(self.model, "use_cache"):
            given["use_cache"] = False
        logits: Tensor = self.model(**given).logits
        return logits

    @torch.no_grad()
    def _states(self, inputs: Mapping[str, Tensor], batch_size: int, prefix: Prefix | None = None) -> Tensor:
        """What leaves the layer, (N, T, D). Passes end there, but for those that record a prefix."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            kept.append(hidden_states(output).detach().clone())
            if prefix is None:
                raise PassEnds

        parts = torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device).split(batch_size)
        handle = self._module.register_forward_hook(keep)
        try:
            with nullcontext() if prefix is None else prefix.recording(self._module) as cache:
                for part in parts:
                    given = {name: value[part] for name, value in inputs.items()}
                    if cache is None:
                        with suppress(PassEnds):
                            self._run(given)
                        continue
                    with only_columns(self.model, torch.zeros_like(part)):  # no logits are wanted
                        self.model(**given, **{str(cache_argument(self.model)): cache()})
        finally:
            handle.remove()
        return torch.cat(kept)

    @torch.no_grad()
    def _examples(self) -> tuple[dict[nn.Module, Any], Any]:
        """What the layers below put out for a prompt, and the layer itself: for the form of it."""
        path, _, number = self.layer.rpartition(".")
        stack = self.model.get_submodule(path) if path else None
        below = list(stack)[: int(number)] if isinstance(stack, nn.ModuleList) and number.isdigit() else []
        found: dict[nn.Module, Any] = {}
        handles = [
            module.register_forward_hook(lambda module, given, output: found.__setitem__(module, output))
            for module in [*below, self._module]
        ]
        try:
            self._run({name: value[:1] for name, value in self._inputs.items()})
        finally:
            for handle in handles:
                handle.remove()
        return {module: found[module] for module in below if module in found}, found[self._module]

    @torch.no_grad()
    def _choose(self, why: str | None) -> None:
        """Tries on the first prompts what can be left out: the layers below, and the tokens before the site.

        Args:
            why: what came up when the tokens before the site were kept.
        """
        if not self._below:
            return
        few = torch.arange(min(4, len(self.base)), device=self.base.device)
        row = self._row[few]
        inputs = {name: value[row] for name, value in self._inputs.items()}
        expected = self._run(inputs)[torch.arange(len(few), device=row.device), self._answer[row]]
        self.skips = True
        if self._prefix is not None:
            self.starts = self._prefix.length
            why = self._differs(few, expected)
            if why is None:
                return
            self.starts, self._prefix = 0, None
        left = self._differs(few, expected)
        if left is None and why is None:
            return
        what = "tokens before the site" if left is None else f"layers below {self.layer!r}"
        self.skips = left is None
        warnings.warn(
            f"the {what} of {type(self.model).__name__} cannot be left out ({left or why}): they run again each time, "
            "with the same results",
            RuntimeWarning,
            stacklevel=4,
        )

    def _differs(self, few: Tensor, expected: Tensor) -> str | None:
        """How logits differ from those of the whole model; None where they do not."""
        try:
            gap = float((self.logits(self.base[few], few) - expected).abs().max() / expected.abs().max())
        except Exception as error:  # any: a layer may want of those below what they do not hand on
            return f"{type(error).__name__}: {error}"
        return None if gap <= _CLOSE else f"logits differ by {gap:.1e} of the largest"

    @contextmanager
    def _replaced(self, hidden: Tensor) -> Iterator[None]:
        """Meanwhile the layer puts out these hidden states, and those below it compute nothing where they need not."""
        if not self.skips:
            handle = self._module.register_forward_hook(
                lambda module, given, output: with_hidden_states(output, hidden)
            )
            try:
                yield
            finally:
                handle.remove()
            return

        def handing_on(example: Any) -> Any:
            def forward(*given: Any, **named: Any) -> Any:
                return with_hidden_states(example, given[0] if given else next(iter(named.values())))

            return forward

        stands_in = {module: handing_on(example) for module, example in self._below.items()}
        stands_in[self._module] = lambda *given, **named: with_hidden_states(self._output, hidden)
        before = {module: vars(module).get("forward") for module in stands_in}  # other tools may have put one there
        try:
            for module, forward in stands_in.items():
                module.forward = forward
            yield
        finally:
            for module, forward in before.items():
                if forward is not None:
                    module.forward = forward
                elif "forward" in vars(module):
                    del module.forward


def _checked_inputs(model: Any, given: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a tokenizer's result that a model takes, with a mask."""
    if not isinstance(given, Mapping) or "input_ids" not in given:
        raise TypeError(f"{name} must be what a tokenizer returns, with input_ids, got {type(given).__name__}")
    inputs = without_notes(model, dict(given))
    ids = check_integers(inputs["input_ids"], f"{name}['input_ids']")
    if ids.dim() != 2 or not len(ids):
        raise ValueError(f"{name}['input_ids'] must have shape (N, T), got {tuple(ids.shape)}")
    mask = inputs.get("attention_mask")
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    return {key: value.to(input_device(model)) for key, value in inputs.items() if isinstance(value, Tensor)}


def _distinct(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The prompts that differ, and which of them each is, (N,): pairs are often made of few prompts."""
    flat = torch.cat([value.reshape(len(value), -1).double() for value in inputs.values()], 1).cpu().numpy()
    first: dict[bytes, int] = {}
    row = [first.setdefault(prompt.tobytes(), n) for n, prompt in enumerate(flat)]
    chosen, found = torch.tensor(row).unique(return_inverse=True)
    device = inputs["input_ids"].device
    return {name: value[chosen.to(device)] for name, value in inputs.items()}, found.to(device)


def _columns(mask: Tensor, position: Any, name: str) -> Tensor:
    """The column of a real token of each row of a mask (N, T), by its number among them: (N,)."""
    counts = mask.sum(1)
    wanted = check_integers(position if is_several(position) else [check_integer(position, name, -len(mask[0]))], name)
    if wanted.dim() > 1 or wanted.numel() not in (1, len(mask)):
        raise ValueError(f"{name} must be an integer, or one for each of the {len(mask)} prompts")
    wanted = wanted.to(mask.device).expand(len(mask))
    wanted = torch.where(wanted < 0, wanted + counts, wanted)
    if bool(((wanted < 0) | (wanted >= counts)).any()):
        worst = int(((wanted < 0) | (wanted >= counts)).nonzero()[0])
        raise IndexError(f"{name} must be a token of its prompt: prompt {worst} has {int(counts[worst])} tokens")
    reached = (mask.cumsum(1) == wanted.unsqueeze(1) + 1) & (mask > 0)
    return reached.int().argmax(1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Meanwhile, what is computed has no gradients for the parameters of a model."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
