"""Text that streams while it is steered, one run at a time."""

from __future__ import annotations

import queue
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mfa_kernels.common.checks import check_choice, check_component, check_number, check_text
from mfa_kernels.data.language_model import check_sampling, continuation, encoded, positions_of, takes
from mfa_kernels.explorer.texts import whole
from mfa_kernels.steering import Add, Offset, Toward, steer
from mfa_kernels.steering.handle import Handle

if TYPE_CHECKING:
    from mfa_kernels.explorer.explorer import Explorer

MOST_TOKENS = 512
MOST_CHARACTERS = 20_000
_ENDS = object()
_NOTHING = Toward(0, 0.0)


class Settings:
    """What steers a run: a region or the set of regions that stand for a genre, how strongly, and where inside it.

    Args:
        explorer: the mixture.
        given: component or genre, mode, alpha and latents, as the page sends them; what is missing is as in `before`.
            A genre takes the place of a component, is always added, and has no latents.
        before: the settings that they change.

    Raises:
        IndexError, TypeError, ValueError: naming what does not fit.
    """

    def __init__(self, explorer: Explorer, given: Mapping[str, Any], before: Settings | None = None) -> None:
        mfa = explorer.mfa
        self.component: int | None = given.get("component", before.component if before else None)
        if self.component is not None:
            self.component = check_component(self.component, mfa.n_components)
        self.genre: int | None = given.get("genre", None if "component" in given or not before else before.genre)
        if self.genre is not None:
            self.genre, self.component = check_component(self.genre, len(explorer.texts.genres), "genre"), None
        mode = given.get("mode", before.mode if before else "toward")
        self.mode: str = check_choice(mode, ("toward", "add"), "mode")
        self.alpha: float = check_number(given.get("alpha", before.alpha if before else 0.3), "alpha", -100, 100)
        latents = given.get("latents", before.latents if before else {})
        if not isinstance(latents, Mapping):
            raise TypeError(f"latents must be numbers by latent, got {type(latents).__name__}")
        self.latents: dict[str, float] = {
            str(check_component(_axis(axis), mfa.rank, "latents")): check_number(value, "latents", -100, 100)
            for axis, value in latents.items()
        }
        self._explorer = explorer

    def interventions(self) -> list[Any]:
        """The interventions that these settings stand for; none without a region or a genre."""
        if self.genre is not None:
            return [Add(self._explorer.topic_direction(self.genre), self.alpha)]
        if self.component is None:
            return []
        found: list[Any] = [Toward(self.component, self.alpha)]
        if self.mode == "add":
            found = [Add(self._direction(self.component), self.alpha)]
        if any(self.latents.values()):
            z = torch.zeros(self._explorer.mfa.rank)
            for axis, value in self.latents.items():
                z[int(axis)] = value
            found.append(Offset(self.component, z))
        return found

    def _direction(self, k: int) -> Tensor:
        """From the mean of all regions to the centroid of one."""
        mfa = self._explorer.mfa
        means = mfa.means.detach()
        return (means[k] - mfa.log_weights.detach().exp().to(means) @ means).float()


def _axis(name: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", name):
        raise ValueError(f"latents must be numbers by latent, got {name[:40]!r}")
    return int(name)


class Run:
    """A text being written.

    Args:
        explorer: with a model.
        given: prompt, temperature, seed, new_tokens, plain, and what `Settings` takes.
    """

    def __init__(self, explorer: Explorer, given: Mapping[str, Any]) -> None:
        self.id = uuid.uuid4().hex
        self.prompt = check_text(given.get("prompt"), "prompt")
        if whole(self.prompt) != self.prompt:
            raise ValueError("prompt must be text, got halves of characters")
        if len(self.prompt) > MOST_CHARACTERS:
            raise ValueError(f"prompt must be at most {MOST_CHARACTERS:,} characters, got {len(self.prompt):,}")
        sampling = (given.get("new_tokens", 48), given.get("temperature", 0.0), given.get("seed", 0))
        new_tokens, self.temperature, self.seed = check_sampling(*sampling)
        self.new_tokens = min(new_tokens, MOST_TOKENS)
        self.plain = given.get("plain") is True
        self.settings = Settings(explorer, given)
        self._explorer = explorer
        self._pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._changed: Settings | None = None
        self.is_over = False

    def change(self, given: Mapping[str, Any]) -> None:
        """Changes the settings, from the next token on."""
        self.settings = self._changed = Settings(self._explorer, given, self.settings)

    def stop(self) -> None:
        """Ends the text after the token that is being written."""
        self._stopped.set()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields what the page shows, as it comes: pieces of text, and at the end how it went."""
        yield {"run": self.id}
        threading.Thread(target=self._write, daemon=True).start()
        try:
            while (line := self._pieces.get()) is not _ENDS:
                yield line
        finally:
            self.stop()

    def _write(self) -> None:
        try:
            with self._explorer.model_lock:
                ends: dict[str, Any] = {"tokens": 0, "seconds": 0.0, "nll": None}
                ends = ends if self._stopped.is_set() else self._generate()
                self._pieces.put({"done": True, "stopped": self._stopped.is_set(), **ends})
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            self._pieces.put({"error": str(error)})
        finally:
            self.is_over = True
            self._pieces.put(_ENDS)

    def _generate(self) -> dict[str, Any]:
        from transformers import StoppingCriteriaList

        model, layer = self._explorer.steered()
        tokenizer, started = self._explorer.tokenizer, time.perf_counter()
        written: list[int] = []
        streamer = _Streamer(tokenizer, self._pieces, written)
        prompt = encoded(model, tokenizer, self.prompt)["input_ids"]
        left = positions_of(model) - prompt.shape[1]
        if left < 1:
            raise ValueError(f"prompt must have fewer tokens than the model can read, got {prompt.shape[1]:,}")
        options = (self.prompt, min(self.new_tokens, left), self.temperature, self.seed)
        # Without a region too, because one may come while the text is written.
        spec = self.settings.interventions() or [_NOTHING]
        handle = None if self.plain else steer(model, self._explorer.mfa, layer, interventions=spec)
        try:
            criteria = StoppingCriteriaList([_Obedient(self, handle)])
            continuation(model, tokenizer, *options, streamer=streamer, stopping_criteria=criteria)
        finally:
            if handle is not None:
                handle.remove()
        seconds = time.perf_counter() - started
        surprise = None if self._stopped.is_set() else _surprise(model, prompt, written)
        return {"tokens": len(written), "seconds": seconds, "nll": surprise}

    def obey(self, handle: Handle | None) -> bool:
        """Applies a change to the handle; returns True where the text is to end."""
        changed, self._changed = self._changed, None
        if changed is not None and handle is not None:
            handle.update(interventions=changed.interventions() or [_NOTHING])
        return self._stopped.is_set()


@torch.no_grad()
def _surprise(model: Any, prompt: Tensor, written: list[int]) -> float | None:
    """Mean negative log-likelihood of the text under the model as it is, in nats per token."""
    if not written:
        return None
    ids = torch.cat([prompt, torch.tensor([written], device=prompt.device)], 1)
    # Logits of a long prompt would take gigabytes.
    kept = {"logits_to_keep": len(written) + 1} if takes(model, "logits_to_keep") else {}
    logits = model(input_ids=ids, **kept).logits[0, -len(written) - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -len(written) :]))


class _Obedient:
    """A stopping criterion that lets a run look at its changes between two tokens."""

    def __init__(self, run: Run, handle: Handle | None) -> None:
        self._run, self._handle = run, handle

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._run.obey(self._handle), device=input_ids.device)


class _Streamer:
    """What `generate` hands its tokens to: whole characters go on to the page."""

    def __init__(self, tokenizer: Any, pieces: queue.SimpleQueue[Any], written: list[int]) -> None:
        self._tokenizer, self._pieces, self._written = tokenizer, pieces, written
        self._is_prompt, self._shown = True, ""

    def put(self, value: Tensor) -> None:
        if self._is_prompt:  # comes first, in one piece
            self._is_prompt = False
            return
        self._written += value.reshape(-1).tolist()
        self._show(whole=False)

    def end(self) -> None:
        self._show(whole=True)

    def _show(self, whole: bool) -> None:
        text = self._tokenizer.decode(self._written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if whole or not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character is waited for
            if piece := text[len(self._shown) :]:
                self._pieces.put({"text": piece})
            self._shown = text


class Playground:
    """The run of a page; a new one ends the one before."""

    def __init__(self, explorer: Explorer) -> None:
        self._explorer, self._lock = explorer, threading.Lock()
        self._run: Run | None = None

    def begin(self, given: Mapping[str, Any]) -> Run:
        """Returns a new run, which begins as its lines are read."""
        self._explorer.steered()
        run = Run(self._explorer, given)
        with self._lock:
            if self._run is not None:
                self._run.stop()
            self._run = run
        return run

    def run(self, name: str) -> Run:
        """Returns the run of this name.

        Raises:
            LookupError: it is over, or never was.
        """
        run = self._run
        if run is None or run.id != name or run.is_over:
            raise LookupError("this text is written already")
        return run

    def stop(self) -> None:
        """Ends the text that is being written, if any; takes no lock, for signal handlers."""
        run = self._run
        if run is not None:
            run.stop()

    def close(self) -> None:
        """Ends the text that is being written, and waits for it."""
        self.stop()
        with self._explorer.model_lock:
            pass
