"""Commands that change the steering while text streams; they take effect between two tokens."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from mfa_kernels.data.language_model import check_encoder, check_sampling, continuation
from mfa_kernels.steering.handle import Handle

HELP = (
    "region K | region none | alpha A | latents Z Z ... | latents none | gate T | gate none | "
    "positions all/prompt/generated/last | norm keep | norm none | stats | stop"
)


def stream(
    model: Any,
    tokenizer: Any,
    handle: Handle,
    component: int | None,
    prompt: str,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes the prompt and what follows to standard output as it comes, obeying commands from standard input.

    Args:
        model, tokenizer: a Hugging Face causal language model, and its tokenizer.
        handle: the handle that steers the model.
        component: the region steered toward at first.
        prompt: text.
        new_tokens: most tokens to write.
        temperature: 0 is greedy.
        seed: of the samples.
    """
    check_encoder(tokenizer)  # now, because a listener takes lines of standard input away
    check_sampling(new_tokens, temperature, seed)
    from transformers import StoppingCriteriaList, TextStreamer

    def note(text: str) -> None:
        print(f"[{text}]", file=sys.stderr, flush=True)

    note(HELP)
    # None where standard input was closed before the process began.
    listener = Listener(handle, Commands(None if sys.stdin is None else sys.stdin.fileno()), component, note)
    print(prompt, end="", flush=True)
    continuation(
        model, tokenizer, prompt, new_tokens, temperature, seed, stopping_criteria=StoppingCriteriaList([listener]),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip


def parse(line: str, component: int | None) -> dict[str, Any]:
    """Returns the changes that a command asks for, as arguments of `Handle.update`.

    Args:
        line: a command of `HELP` other than "stats" and "stop".
        component: the region steered toward; a gate keeps to it, even if the region changes later.

    Raises:
        ValueError: the command is not one of them.
    """
    name, *values = line.split()
    nothing = values == ["none"]
    try:
        if name == "latents" and values:
            return {
                "latents": None if nothing else torch.tensor([float(value) for value in values], dtype=torch.float32)
            }
        (value,) = values
        if name == "region":
            return {"component": None if nothing else int(value)}
        if name == "alpha":
            return {"alpha": float(value)}
        if name == "gate" and (nothing or component is not None):
            return {"gate": None if nothing else (component, float(value))}
        if name == "positions":
            return {"positions": value}
        if name == "norm":
            return {"norm": None if nothing else value}
    except ValueError:
        pass
    hint = "; a gate needs a region" if name == "gate" else ""
    raise ValueError(f"{line!r} is none of: {HELP}{hint}")


class Commands:
    """Lines of a file descriptor, which a thread reads, so that `pending` never waits; no lines of None."""

    def __init__(self, descriptor: int | None) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        if descriptor is not None:
            # Not the buffered stdin: a thread that waits in it at exit holds a lock that the interpreter wants.
            threading.Thread(target=self._read, args=(descriptor,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        rest = b""
        while received := os.read(descriptor, 4096):
            *lines, rest = (rest + received).split(b"\n")
            for line in lines:
                self._lines.put(line.decode(errors="replace").strip())
        self._lines.put(rest.decode(errors="replace").strip())

    def pending(self) -> list[str]:
        """Returns the lines that came since the last call."""
        lines = []
        while True:
            try:
                lines.append(self._lines.get_nowait())
            except queue.Empty:
                return [line for line in lines if line]


class Listener:
    """A stopping criterion for `generate` that obeys the commands after each token.

    Args:
        handle: the handle that commands change.
        commands: the `Commands` to obey.
        component: the region steered toward at first.
        note: is called with a text that says what was done, or what is wrong with a command.
    """

    def __init__(
        self, handle: Handle, commands: Commands, component: int | None, note: Callable[[str], object]
    ) -> None:
        self._handle, self._commands, self._component, self._note = handle, commands, component, note

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        stop = False
        for line in self._commands.pending():
            if line == "stop":
                stop = True
            elif line == "stats":
                seen, steered, mean = self._handle.stats()
                of_gate = "" if mean is None else f", mean responsibility at the gate {mean:.3g}"
                self._note(f"{steered} of {seen} tokens steered{of_gate}")
            else:
                self._obey(line)
        return torch.full((len(input_ids),), stop, device=input_ids.device)

    def _obey(self, line: str) -> None:
        try:
            changes = parse(line, self._component)
            self._handle.update(**changes)
        except (ValueError, TypeError, IndexError) as error:
            self._note(str(error))
            return
        self._component = changes.get("component", self._component)
        self._note(line)
