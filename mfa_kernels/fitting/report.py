"""What a fit did."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from mfa_kernels.files import StrPath, atomic_write_text


@dataclass
class FitReport:
    """What `fit` did, attached to the mixture as `mfa.fit_report`.

    Attributes:
        history: one record per evaluation: step, epoch (the one in training, from 1; 0 at the start), train_nll (mean
            since the record before; None in the first), held_out_nll (None without held-out rows), both in nats per
            token, live (regions that own a held-out row), active (pairs per held-out row; a diffuse one counts as 17),
            gain (nats per token over the start, on a fixed sample of the rows trained on and with EM's prior: a state
            that has less than 0 is not kept), seconds (of training so far), tokens_per_second (trained on since the
            record before; None where there were none, as at the start) and memory (peak bytes so far, of the device, or
            of the process on a CPU). docs/fitting.md has a table of them.
        method: that was run: "sgd", "em" or "online".
        best_step: the step (of EM: the M-step) whose parameters were kept.
        held_out_nll: of these, in nats per token; None without held-out rows.
        held_out_rows: finite rows held out.
        skipped_rows: distinct rows left out because they are not finite (`mfa_kernels.ops.finite`), as far as read.
        skipped_steps: steps left out because the loss or its gradient was not finite.
        live_components: components that are the most responsible for at least one of `live_rows` rows.
        live_rows: the held-out rows and a sample of the others.
        seconds: wall time by stage: "kmeans", "start", the method, and "polish" where there was one.
        stopped_early: whether `patience` ran out.
        interrupted: whether Ctrl-C ended the training.
        prior_strength: of EM's prior, tokens per region; None without EM.
        revived_components: times that EM moved a component because it owned nothing of its own.
        refused_states: that would have been kept, were they not worse than the start on rows trained on.
        held_out_by: "text", where whole texts were, none of whose rows were trained on; "row", where it is not known
            which text a row is from, or there are too few of them; None without held-out rows.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    method: str = "sgd"
    best_step: int = 0
    held_out_nll: float | None = None
    held_out_rows: int = 0
    skipped_rows: int = 0
    skipped_steps: int = 0
    live_components: int = 0
    live_rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stopped_early: bool = False
    interrupted: bool = False
    prior_strength: float | None = None
    revived_components: int = 0
    refused_states: int = 0
    held_out_by: str | None = None

    def __str__(self) -> str:
        """A few lines for people."""
        last: dict[str, Any] = self.history[-1] if self.history else {}
        by = "" if self.held_out_by is None else f" (held out by {self.held_out_by})"
        chosen = "" if self.held_out_nll is None else f", held-out {self.held_out_nll:.3f} nats per token{by}"
        lines = [f"{self.method}: the state of step {self.best_step} of {last.get('step', 0)}{chosen}"]
        lines.append(
            f"live: {self.live_components} regions, the most responsible for at least one of {self.live_rows:,} rows"
        )
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        lines.append(f"seconds: {sum(self.seconds.values()):.1f}{f' ({stages})' if stages else ''}")
        if self.prior_strength is not None:
            lines.append(f"prior: each region weighed as if it had seen {self.prior_strength:g} tokens more")
        if self.revived_components:
            lines.append(f"moved: {self.revived_components} times a region that owned nothing of its own")
        if self.skipped_rows or self.skipped_steps:
            lines.append(f"left out: {self.skipped_rows:,} rows, {self.skipped_steps} steps that were not finite")
        if self.refused_states:
            lines.append(
                f"not kept: {self.refused_states} states under which rows trained on were worse than at the start"
            )
        if self.stopped_early or self.interrupted:
            lines.append("interrupted" if self.interrupted else "stopped for want of improvement")
        return "\n".join(lines)

    def write_history(self, path: StrPath) -> None:
        """Writes the history as JSON lines, replacing the file; a number that is not finite becomes null."""
        lines = [
            json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})
            for record in self.history
        ]
        atomic_write_text(path, "".join(line + "\n" for line in lines))
