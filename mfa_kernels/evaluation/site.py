"""A site of a language model: what leaves one layer at one token of each prompt, and the network above it.

`localize` runs the network above thousands of times with other activations at the site. What comes before does not
change, so it runs once: afterwards the layers below hand on what they are given, and the layer itself puts out what it
did, but for the token of the site. Whether that is the model is tried when the site is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import check_integer, check_integers
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

_CLOSE = 1e-3  # of the largest logit: what skipping the layers below may change


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

    Attributes:
        base, source: activations at the site, (N, D), without gradients.
        skips: True where the layers below the site do not run again. They do where `layer` is no layer of a stack, and,
            after a warning, where the model is another one without them.

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
        self._answer = _columns(self._inputs["attention_mask"], -1, "position")
        rows = torch.arange(len(column), device=column.device)
        self.source = self._states(others, batch_size)[rows, column]
        self._hidden = self._states(self._inputs, batch_size)
        self.base = self._hidden[rows, self._column]
        self._below, self._output = self._examples()
        self.skips = self._can_skip()

    def logits(self, patched: Tensor, pairs: Tensor) -> Tensor:
        """Returns the logits after the last token of some base prompts whose site has other activations.

        Args:
            patched: (n, D); gradients reach it, and no parameter of the model.
            pairs: numbers of the base prompts, (n,).

        Returns:
            (n, V).
        """
        hidden = self._hidden[pairs]
        rows = torch.arange(len(pairs), device=hidden.device)
        hidden = hidden.index_put((rows, self._column[pairs]), patched.to(hidden))
        inputs = {name: value[pairs] for name, value in self._inputs.items()}
        with _frozen(self.model), self._replaced(hidden):
            return self._run(inputs)[rows, self._answer[pairs]]

    def _run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        more = {"use_cache": False} if takes(self.model, "use_cache") else {}
        logits: Tensor = self.model(**inputs, **more).logits
        return logits

    @torch.no_grad()
    def _states(self, inputs: Mapping[str, Tensor], batch_size: int) -> Tensor:
        """What leaves the layer, (N, T, D); the passes end there."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            kept.append(hidden_states(output).detach().clone())
            raise PassEnds

        handle = self._module.register_forward_hook(keep)
        try:
            for part in torch.arange(len(inputs["input_ids"]), device=inputs["input_ids"].device).split(batch_size):
                with suppress(PassEnds):
                    self._run({name: value[part] for name, value in inputs.items()})
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
    def _can_skip(self) -> bool:
        """Tries on the first prompts whether the model without the layers below is the model."""
        if not self._below:
            return False
        few = torch.arange(min(4, len(self.base)), device=self.base.device)
        inputs = {name: value[few] for name, value in self._inputs.items()}
        expected = self._run(inputs)[few, self._answer[few]]
        self.skips = True
        try:
            gap = float((self.logits(self.base[few], few) - expected).abs().max() / expected.abs().max())
        except Exception as error:  # any: a layer may want of those below what they do not hand on
            why = f"{type(error).__name__}: {error}"
        else:
            if gap <= _CLOSE:
                return True
            why = f"logits differ by {gap:.1e} of the largest"
        warnings.warn(
            f"the layers below {self.layer!r} of {type(self.model).__name__} cannot be left out ({why}): they run "
            "again each time, with the same results",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

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
