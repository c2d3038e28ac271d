"""Interventions on a language model while it runs: `steer`, and the `Handle` that it returns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_model
from mfa_kernels.common.modes import ordinary
from mfa_kernels.data.language_model import (
    decoder_layers,
    hidden_states,
    resolve_layer,
    text_config,
    with_hidden_states,
)
from mfa_kernels.data.twin import check_output
from mfa_kernels.mixture.mfa import MFA
from mfa_kernels.steering import compiled
from mfa_kernels.steering.apply import Program, check_hidden
from mfa_kernels.steering.gates import Gates
from mfa_kernels.steering.interventions import Alpha, Intervention, Offset, Toward, as_rows
from mfa_kernels.steering.positions import Positions, check_positions, choose
from mfa_kernels.steering.tracking import Pass, Tracker

_KEEP: Any = object()  # stands for an argument of `update` that was not given


class Stats(NamedTuple):
    """Counts of tokens that passed the steered layer, without padding.

    A token that is read twice (without a KV cache) counts twice. The padding that `generate` appends to a row that has
    ended looks like a token, and is counted.

    Attributes:
        tokens_seen: all of them.
        tokens_steered: those that were acted on.
        mean_responsibility: over the tokens that `positions` chose, their mean responsibility for the first region
            that the row's gate names; None where no gate names a region, or no token was chosen.
    """

    tokens_seen: int
    tokens_steered: int
    mean_responsibility: float | None = None


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
    gate: Gates = None,
    norm: Any = None,
) -> Handle:
    """Steers the output of a layer, from now until the handle is removed or its `with` block ends.

        with steer(model, mfa, layer=8, component=17, alpha=0.4):
            model.generate(...)

    x <- (1 - alpha) x + alpha mu_k, then x <- x + W_k z, with z not scaled by alpha (arXiv 2602.02464, eq. 14, 15).

    Args:
        model: a Hugging Face causal language model or encoder-decoder, or one that `torch.compile` returned.
        mfa: a mixture of that layer's output. Its parameters are read now: after changing them, call `update`.
        layer: an index (negative counts from the end; of an encoder-decoder, its decoder's), or the path of a module
            whose output is (B, T, D). Other outputs, such as those of XLNet's layers, which put time first, are
            refused: at once if a copy of the model on the meta device (data/twin.py) shows the shape, else when it
                runs.
        component: k, or an integer tensor (B,) with one per batch row. None means the responsibility-weighted mixture
            sum_k r_k(x) (mu_k + W_k z), with the responsibilities of the unsteered x.
        alpha: a float, a tensor (B,), or a function of the generation step: 0 for the prompt, 1 for the first generated
            token that the model reads, ... None leaves eq. 14 out.
        latents: z, (R,), or (B, R) with one per batch row. None leaves eq. 15 out.
        interventions: instead of component, alpha and latents: a `Toward`, `Offset`, `Add`, `Reconstruct` or `Remove`
            (`mfa_kernels.steering`), or a sequence of them, applied in order.
        rows: instead of those: one entry per batch row, each an intervention, a sequence of them, or None to leave the
            row alone.
        positions: "all"; "prompt"; "generated"; "last", the prompt's last token and every one after it; a slice; or a
            bool mask (T,) or (B, T), False past its end. Slices and masks are in absolute positions, which count each
            row's real tokens from 0 whatever a KV cache holds. Padding is never touched.
        gate: (component, threshold): act only on tokens whose responsibility for the component exceeds the threshold.
            Or a gate of `mfa_kernels.steering`: `Responsibility`, its complement `~Responsibility(...)`, `LogDensity`,
            and what `&` and `|` make of them. A list has one gate, or None, per batch row.
        norm: "keep" gives each steered token back the Euclidean norm it had. A list has "keep" or None per batch row.

    Inside `generate` the prompt is the input of `generate`, in however many passes it is read; steps and positions do
    not depend on the cache. In a decoding loop of your own, a pass of several tokens is prompt, and a pass of one token
    that extends a cache is generated. A learnt prompt, as of PEFT, is prompt, and its virtual tokens count as
    positions. The input of an encoder is prompt, and nothing is generated there.

    The place of a pass in its sequence is read from its arguments, and kept per thread and cache: several threads, and
    several sequences in turn, may use one model. If the arguments do not tell the place, or contradict each other (a
    model or a version of transformers may hand its cache over in an unknown way), the forward pass raises
    `LostTrackError`, unless positions is "all" and alpha no function, so that nothing depends on the place.

    If `generate` repeats rows (beams, num_return_sequences), arguments for B rows are repeated with them: row i of the
    repeated batch B' takes entry i // (B' / B).

    Several layers, and several mixtures, are steered by as many handles; on one layer they act in the order in which
    they were made. Different gates need different handles.

    On a CPU, responsibilities under a large mixture are found through certified bounds (`MFA.screen`), which are
    prepared the first time, in a fraction of a second, and kept with the mixture.

    Compiled code that contains the layer is compiled again when steering begins and ends. With `torch.compile(...,
    fullgraph=True)`, a pass of one token compiles whole if alpha is no function and positions is "all", "generated" or
    "last": such a pass counts as generated, even if it is a prompt of one token. Every other pass breaks the graph, and
    gives the same results.

    Returns:
        A `Handle`.

    Raises:
        IndexError, TypeError, ValueError: naming the argument that does not fit.
    """
    given = {"component": component, "alpha": alpha, "latents": latents, "interventions": interventions, "rows": rows}
    return Handle(model, mfa, layer, given, positions, gate, norm)


@dataclass(frozen=True)
class _Plan:
    """The settings of a handle as one value, so that a thread that steers meanwhile sees the old or the new ones.

    Attributes:
        given: the arguments of `steer` that say what to do.
        where: the arguments of `steer` that say at which tokens.
        program: the interventions, ready to run.
    """

    given: dict[str, Any]
    where: dict[str, Any]
    program: Program

    @property
    def asks_where(self) -> bool:
        """True where steering of a generated token depends on its place in the sequence."""
        positions = self.where["positions"]
        return self.program.composition.is_scheduled or not isinstance(positions, str) or positions == "prompt"

    @property
    def is_the_same_everywhere(self) -> bool:
        """True where steering does not depend on a token's place in its sequence, padding aside."""
        positions = self.where["positions"]
        return not self.program.composition.is_scheduled and isinstance(positions, str) and positions == "all"


class Handle:
    """A model that is being steered, made by `steer`: a context manager for any number of `with` blocks in turn."""

    def __init__(
        self,
        model: nn.Module,
        mfa: MFA,
        layer: int | str,
        given: dict[str, Any],
        positions: Positions = "all",
        gate: Gates = None,
        norm: Any = None,
    ) -> None:
        if not isinstance(mfa, MFA):
            raise TypeError(f"mfa must be an MFA, got {type(mfa).__name__}")
        if mfa.means.is_meta:
            raise ValueError("mfa must hold values, got one on the meta device")
        check_model(model)
        self._given_model = model
        self._model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self._mfa = mfa
        self.layer, self._module = resolve_layer(self._model, layer)
        _check_width(self._model, self.layer, mfa.n_features)
        check_output(self._model, self.layer, mfa.n_features)
        self._plan = self._build(given, {"positions": positions, "gate": gate, "norm": norm})
        self._counts = _Counts(_example(self._module, mfa.means).device)
        self._is_paused = False
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
        gate: Gates = _KEEP,
        norm: Any = _KEEP,
    ) -> Handle:
        """Changes the arguments that are given and keeps the others; also rereads the mixture's parameters.

        Arguments are those of `steer`. Hooks stay where they are.

        Returns:
            This handle.

        Raises:
            IndexError, TypeError, ValueError: naming the argument that does not fit; everything stays as it was.
        """
        given = {"component": component, "alpha": alpha, "latents": latents}
        given |= {"interventions": interventions, "rows": rows}
        changes = {name: value for name, value in given.items() if value is not _KEEP}
        begins_anew = "interventions" in changes or "rows" in changes
        given = {**(dict.fromkeys(given) if begins_anew else self._plan.given), **changes}
        where = {"positions": positions, "gate": gate, "norm": norm}
        where = {name: self._plan.where[name] if value is _KEEP else value for name, value in where.items()}
        self._plan = self._build(given, where)
        return self

    def remove(self) -> None:
        """Takes the hooks off, so that the model is as it was before. May be called again."""
        if self._tracker is None:
            return
        self._hook.remove()
        self._tracker.release(self)
        self._tracker = None
        compiled.unnotice(self._module)
        compiled.forget(self._given_model)

    @contextmanager
    def paused(self) -> Iterator[Handle]:
        """Leaves the model alone for the length of a `with` block; hooks stay, and nothing is counted."""
        before, self._is_paused = self._is_paused, True
        try:
            yield self
        finally:
            self._is_paused = before

    @contextmanager
    def restored(self) -> Iterator[Handle]:
        """Takes updates and counts of a `with` block back at its end."""
        plan, counts = self._plan, self._counts.totals()
        try:
            yield self
        finally:
            self._plan = plan
            self._counts.reset(counts)

    @property
    def asks_where(self) -> bool:
        """True where steering of a generated token depends on its place in the sequence."""
        return self._plan.asks_where

    def stats(self) -> Stats:
        """Returns the counts so far; waits for the device."""
        seen, steered, total, watched = self._counts.totals()
        return Stats(int(seen), int(steered), total / watched if watched else None)

    def __enter__(self) -> Handle:
        self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._plan.given.items() if value is not None)
        where = ", ".join(f"{name}={value!r}" for name, value in self._plan.where.items() if value is not None)
        state = ", removed" if self.is_removed else ""
        return f"Handle({self.layer!r}, {given}, {where}{state})"

    @property
    def is_removed(self) -> bool:
        """True after `remove`, until the next `with` block."""
        return self._tracker is None

    def _install(self) -> None:
        if self._tracker is None:
            self._tracker = Tracker.acquire(self._model, self, self.layer)
            self._hook = self._module.register_forward_hook(self._act, with_kwargs=True)
            _before_recorders(self._module)
            compiled.notice(self._module)
            compiled.forget(self._given_model)

    def _build(self, given: dict[str, Any], where: dict[str, Any]) -> _Plan:
        where = {**where, "positions": check_positions(where["positions"])}
        example = _example(self._module, self._mfa.means)
        with ordinary(), torch.no_grad():  # the program may be used in any mode later
            rows = as_rows(*_as_lists(given), self._mfa)
            program = Program(self._mfa, rows, example.device, where["gate"], where["norm"])
            if not program.composition.is_scheduled:
                program.prepare(example.dtype, example.device, (0,))
        return _Plan(given, where, program)

    def _act(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._is_paused:
            return None
        hidden, plan = hidden_states(output), self._plan
        is_token = isinstance(hidden, Tensor) and hidden.dim() == 3 and hidden.shape[1] == 1
        if torch.compiler.is_compiling() and is_token and not plan.asks_where:
            steered = self._steer(plan.program, hidden, True, None, (0,))
        else:
            steered = self._act_by_position(plan, hidden, (args, kwargs))
        return None if steered is None else with_hidden_states(output, steered)

    @torch.compiler.disable
    def _act_by_position(self, plan: _Plan, hidden: Any, given: Any) -> Tensor | None:
        tracker = self._tracker
        assert tracker is not None
        check_hidden(hidden, self._mfa.n_features, f"the output of {self.layer}")
        if hidden.dim() != 3:
            raise ValueError(f"the output of {self.layer} must be (batch, tokens, D), got {tuple(hidden.shape)}")
        if plan.is_the_same_everywhere:
            now = Pass(0, hidden.shape[1], hidden.shape[1], tracker.padding(hidden, given))
        else:
            now = tracker.at(hidden, given)
        chosen = choose(plan.where["positions"], now, hidden.shape[0], hidden.device)
        if not hidden.shape[0] * hidden.shape[1]:
            return None
        steps = now.steps() if plan.program.composition.is_scheduled else (0,)
        steered = self._steer(plan.program, hidden, chosen, now.real, steps)
        if steered is not None:
            tracker.note(hidden, steered)
        return steered

    def _steer(
        self, program: Program, hidden: Tensor, chosen: bool | Tensor, real: Tensor | None, steps: tuple[int, ...]
    ) -> Tensor | None:
        """Returns the hidden states after the interventions at the chosen tokens, and counts all tokens."""
        shape = hidden.shape[:2]
        every = shape[0] * shape[1]
        counts: list[int | Tensor] = [every if real is None else real.expand(shape).sum(), 0]
        steered = None
        if chosen is not False:
            steered, reached, tally = program(hidden, chosen, steps)
            if tally is not None:
                self._counts.add_tally(tally)
            else:
                counts[1] = reached.expand(shape).sum() if isinstance(reached, Tensor) else every
        self._counts.add(counts)
        return steered


def _example(module: nn.Module, otherwise: Tensor) -> Tensor:
    """Returns a tensor of the dtype and device that hidden states probably have: the first floating-point weight that
    is not offloaded."""
    return next((p for p in module.parameters() if p.is_floating_point() and not p.is_meta), otherwise)


class _Counts(nn.Module):
    """Four totals: tokens seen, tokens steered, the sum of the gates' responsibilities, and their number.

    Numbers that the host knows are added there, others on the device. Compiled code adds all of them on the device,
    because it would be compiled again for every number. This is a module, because a CUDA graph may change its buffers
    in place.
    """

    on_device: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        with ordinary():
            self.register_buffer("on_device", torch.zeros(4, dtype=torch.float64, device=device), persistent=False)
        self._on_host = [0.0] * 4

    def add(self, counts: list[int | Tensor]) -> None:
        with _one_thread():
            for i, count in enumerate(counts):
                if isinstance(count, Tensor):
                    self.on_device[i].add_(count.detach().to(self.on_device.device))
                elif torch.compiler.is_compiling():
                    self.on_device[i].add_(count)
                else:
                    self._on_host[i] += count

    def add_tally(self, tally: Tensor) -> None:
        """Adds an `Outcome.tally`, (B, T, 3)."""
        with _one_thread():
            self.on_device[1:].add_(tally.detach().sum((0, 1), dtype=torch.float64).to(self.on_device.device))

    def totals(self) -> list[float]:
        return [host + device for host, device in zip(self._on_host, self.on_device.tolist())]

    def reset(self, totals: list[float]) -> None:
        self.on_device.zero_()
        self._on_host = list(totals)


_lock = threading.Lock()


def _one_thread() -> AbstractContextManager[Any]:
    """Returns the lock under which counts are added; compiled code, which cannot take one, goes without."""
    return nullcontext() if torch.compiler.is_compiling() else _lock


def _as_lists(given: dict[str, Any]) -> tuple[Any, Any]:
    """Returns (interventions, rows), one of them None, from the arguments of `steer`."""
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
    """Raises ValueError where the configuration says that a decoder layer is not as wide as the mixture."""
    width = getattr(text_config(model), "hidden_size", None)
    try:
        stack, _ = decoder_layers(model)
    except ValueError:
        return
    if width is not None and layer.rpartition(".")[0] == stack and width != features:
        raise ValueError(f"mfa has n_features = {features}, but {layer} of {type(model).__name__} is {width} wide")


def _before_recorders(module: nn.Module) -> None:
    """Moves the hooks by which transformers records hidden states to the end, so that they record the steered ones."""
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if (getattr(hook, "__module__", None) or "").startswith("transformers."):
            hooks[key] = hooks.pop(key)
