"""`steer`: interventions on a language model while it runs."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfa_kernels.mfa import MFA
from mfa_kernels.models import decoder_layers, hidden_states, resolve_layer, text_config, with_hidden_states
from mfa_kernels.steering.apply import Gate, Program, check_gate, check_hidden
from mfa_kernels.steering.interventions import Alpha, Intervention, Offset, Toward, as_rows
from mfa_kernels.steering.positions import Positions, check_positions, choose
from mfa_kernels.steering.tracking import Tracker

_KEEP: Any = object()  # an argument of `update` that was not given


class Stats(NamedTuple):
    """Tokens that passed the steered layer, padding excluded; a token read twice (without a KV cache) counts twice.

    What `generate` appends to a row that has ended looks like a token, and is counted.
    """

    tokens_seen: int
    tokens_steered: int


def steer(
    model: nn.Module,
    mfa: MFA,
    layer: int | str,
    component: int | Tensor | None = None,
    alpha: Alpha | None = None,
    latents: Any = None,
    *,
    interventions: Any = None,
    rows: Any = None,
    positions: Positions = "all",
    gate: Gate | None = None,
) -> Handle:
    """Steers the output of a layer, from now until the handle is removed or its `with` block ends.

        with steer(model, mfa, layer=8, component=17, alpha=0.4):
            model.generate(...)

    x <- (1 - alpha) x + alpha mu_k, then x <- x + W_k z, with z not scaled by alpha (arXiv 2602.02464, eq. 14, 15).

    Args:
        model: a Hugging Face causal language model. One that is compiled, as `torch.compile` returned it: it is
            compiled again when the steering begins and ends.
        mfa: a mixture of that layer's output. Its parameters are read now: after changing them, call `update`.
        layer: an index (negative counts from the end), or the path of a module whose output is (B, T, D).
        component: k, or an integer tensor (B,) with one per batch row. None means the responsibility-weighted mixture
            sum_k r_k(x) (mu_k + W_k z), with the responsibilities of the unsteered x.
        alpha: a float, a tensor (B,), or a function of the generation step: 0 for the prompt, 1 for the first generated
            token that the model reads, ... None leaves eq. 14 out.
        latents: z, (R,), or (B, R) with one per batch row. None leaves eq. 15 out.
        interventions: instead of component, alpha and latents: `Toward`, `Offset` or a sequence of them.
        rows: instead of those: one entry per batch row, each an intervention, a sequence of them, or None to leave the
            row alone.
        positions: "all"; "prompt"; "generated"; "last", the prompt's last token and every one after it; a slice; or a
            bool mask (T,) or (B, T), False past its end. Slices and masks are in absolute positions, which count each
            row's real tokens from 0 whatever a KV cache holds. Padding is never touched.
        gate: (component, threshold): act only on tokens whose responsibility for the component exceeds the threshold.

    Inside `generate` the prompt is what it was given, in however many passes it is read; steps and positions do not
    depend on the cache. In a decoding loop of one's own, a pass of several tokens is prompt, and a pass of one token
    that extends a cache is generated.

    Where `generate` repeats rows (beams, num_return_sequences), what was given for B rows follows: row i of the
    repeated batch B' takes entry i // (B' / B).

    Returns:
        A `Handle`.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
    """
    given = {"component": component, "alpha": alpha, "latents": latents, "interventions": interventions, "rows": rows}
    return Handle(model, mfa, layer, given, positions, gate)


class Handle:
    """A model being steered: made by `steer`, a context manager, and good for several `with` blocks in turn."""

    def __init__(
        self,
        model: nn.Module,
        mfa: MFA,
        layer: int | str,
        given: dict[str, Any],
        positions: Positions,
        gate: Gate | None,
    ) -> None:
        if not isinstance(mfa, MFA):
            raise TypeError(f"mfa must be an MFA, got {type(mfa).__name__}")
        self._given_model = model
        self._model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self._mfa = mfa
        self.layer, self._module = resolve_layer(self._model, layer)
        _check_width(self._model, self.layer, mfa.n_features)
        self._given, self._positions, self._gate = given, positions, gate
        self._program = self._build(given, positions, gate)
        self._seen: int | Tensor = 0
        self._steered: int | Tensor = 0
        self._tracker: Tracker | None = None
        self._hook: Any = None
        self._install()

    def update(
        self,
        *,
        component: int | Tensor | None = _KEEP,
        alpha: Alpha | None = _KEEP,
        latents: Any = _KEEP,
        interventions: Any = _KEEP,
        rows: Any = _KEEP,
        positions: Positions = _KEEP,
        gate: Gate | None = _KEEP,
    ) -> Handle:
        """Changes what is given and keeps the rest, without hooking again; also rereads the mixture's parameters.

        Arguments as for `steer`; one that does not fit leaves everything as it was.
        """
        changes = {"component": component, "alpha": alpha, "latents": latents}
        changes = {name: value for name, value in changes.items() if value is not _KEEP}
        lists = {
            name: value for name, value in (("interventions", interventions), ("rows", rows)) if value is not _KEEP
        }
        if lists:
            given = {"component": None, "alpha": None, "latents": None, "interventions": None, "rows": None}
            given.update(lists, **changes)
        else:
            given = {**self._given, **changes}
        positions = self._positions if positions is _KEEP else positions
        gate = self._gate if gate is _KEEP else gate
        self._program = self._build(given, positions, gate)
        self._given, self._positions, self._gate = given, positions, gate
        return self

    def remove(self) -> None:
        """Takes the hooks off; the model is what it was. May be called again."""
        if self._tracker is None:
            return
        self._hook.remove()
        self._tracker.release()
        self._tracker = None
        _forget_compiled(self._given_model)

    def stats(self) -> Stats:
        """Tokens seen and tokens steered so far."""
        return Stats(int(self._seen), int(self._steered))

    def __enter__(self) -> Handle:
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._given.items() if value is not None)
        state = "" if self._tracker is not None else ", removed"
        return f"Handle({self.layer!r}, {given}, positions={self._positions!r}, gate={self._gate!r}{state})"

    def _install(self) -> None:
        if self._tracker is None:
            self._tracker = Tracker.acquire(self._model)
            self._hook = self._module.register_forward_hook(self._act)
            _forget_compiled(self._given_model)

    def _build(self, given: dict[str, Any], positions: Positions, gate: Gate | None) -> Program:
        check_positions(positions)
        gate = check_gate(gate, self._mfa)
        example = next(
            (p for p in self._module.parameters() if p.is_floating_point() and not p.is_meta), self._mfa.means
        )  # of the dtype and device that hidden states probably have; quantised and offloaded weights are not
        rows = as_rows(*_as_lists(given), self._mfa)
        mfa = self._mfa
        by_responsibility = gate is not None or any(entry.component is None for row in rows for entry in row)
        if by_responsibility and mfa.means.dtype in (torch.bfloat16, torch.float16):
            mfa = copy.deepcopy(mfa).float()  # once, instead of at every token
        with torch.no_grad():
            program = Program(mfa, rows, gate, example.device)
            if not by_responsibility and not program.composition.is_scheduled:
                program.prepare(len(rows), example.dtype, example.device, (0,))
        return program

    @torch.compiler.disable
    def _act(self, module: nn.Module, args: Any, output: Any) -> Any:
        assert self._tracker is not None
        hidden = hidden_states(output)
        check_hidden(hidden, self._mfa.n_features, f"the output of {self.layer}")
        if hidden.dim() != 3:
            raise ValueError(f"the output of {self.layer} must be (batch, tokens, D), got {tuple(hidden.shape)}")
        now = self._tracker.at(hidden)
        every = hidden.shape[0] * hidden.shape[1]
        self._seen = self._seen + (every if now.real is None else now.real.expand(hidden.shape[:2]).sum())
        chosen = choose(self._positions, now, hidden.shape[0], hidden.device)
        if chosen is False or not every:
            return None
        steps = now.steps() if self._program.composition.is_scheduled else (0,)
        steered, chosen = self._program(hidden, chosen, steps)
        self._steered = self._steered + (chosen.expand(hidden.shape[:2]).sum() if isinstance(chosen, Tensor) else every)
        return with_hidden_states(output, steered)


def _as_lists(given: dict[str, Any]) -> tuple[Any, Any]:
    """(interventions, rows), one of them None, from the arguments of `steer`."""
    interventions, rows = given["interventions"], given["rows"]
    short = [name for name in ("component", "alpha", "latents") if given[name] is not None]
    if interventions is not None or rows is not None:
        if short:
            raise ValueError(f"{', '.join(short)}: not together with interventions or rows, which carry their own")
        return interventions, rows
    component, alpha, latents = given["component"], given["alpha"], given["latents"]
    steps: list[Intervention] = []
    if alpha is not None:
        steps.append(Toward(component, alpha))
    if latents is not None:
        steps.append(Offset(component, latents))
    if not steps:
        raise ValueError("alpha, latents: give at least one of them, or interventions or rows")
    return steps, None


def _check_width(model: nn.Module, layer: str, features: int) -> None:
    """Where the layer is a decoder layer and the configuration says how wide those are, the mixture must fit."""
    width = getattr(text_config(model), "hidden_size", None)
    try:
        stack, _ = decoder_layers(model)
    except ValueError:
        return
    if width is not None and layer.rpartition(".")[0] == stack and width != features:
        raise ValueError(f"mfa has n_features = {features}, but {layer} of {type(model).__name__} is {width} wide")


def _forget_compiled(model: nn.Module) -> None:
    """Compiled code does not notice hooks that come and go: a compiled model is compiled again."""
    if hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None or "_compiled_call" in vars(module)
        for module in model.modules()
    ):
        torch.compiler.reset()
