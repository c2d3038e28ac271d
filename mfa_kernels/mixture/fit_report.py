"""The report of a fit, kept with its mixture, in every save, in checkpoints and on model cards."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mfa_kernels.common.checks import shown
from mfa_kernels.common.files import StrPath, atomic_write_text
from mfa_kernels.common.reading import COUNT, FLAG, NUMBER, OBJECT, TEXT, Kind, check_fields, every, mapping, optional

# Of a curve, that are saved with a mixture: a record is some 250 bytes of JSON, and the file of weights has a copy.
MOST_RECORDS = 1000

# Infinity and NaN, which JSON does not have, by the names that Protocol Buffers give them there.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_REPORT = {
    "history": every(OBJECT), "method": TEXT, "best_step": COUNT, "held_out_nll": optional(NUMBER),
    "held_out_rows": COUNT, "held_out_by": optional(TEXT), "skipped_rows": COUNT, "skipped_steps": COUNT,
    "live_components": COUNT, "live_rows": COUNT, "seconds": mapping(NUMBER), "stopped_early": FLAG,
    "interrupted": FLAG, "prior_strength": optional(NUMBER), "revived_components": COUNT, "refused_states": COUNT,
    "run": OBJECT, "settled": FLAG, "candidate_gap": optional(NUMBER),
}  # fmt: skip
_RECORD = {
    "step": COUNT, "epoch": COUNT, "seconds": NUMBER, "train_nll": optional(NUMBER), "held_out_nll": optional(NUMBER),
}  # fmt: skip
_RUN: dict[str, Kind] = {
    "began": optional(TEXT), **dict.fromkeys(("settings", "data", "versions", "machine"), OBJECT)
}  # fmt: skip

_TOLD = {"seed": "seed", "K": "n_components", "R": "rank", "epochs": "epochs"}  # of the settings, in words


@dataclass
class FitReport:
    """The record of a fit, attached to the mixture as `mfa.fit_report`, and saved with it.

    Attributes:
        history: one record per evaluation: step, epoch (the one in training, from 1; 0 at the start), train_nll (mean
            since the record before; None in the first), held_out_nll (None without held-out rows), both in nats per
            token, live (regions that own a held-out row), active (pairs per held-out row; a diffuse one counts as 17),
            gain (nats per token over the start, on a fixed sample of the rows trained on and with EM's prior: a state
            that has less than 0 is not kept), seconds (of training so far), tokens_per_second (trained on since the
            record before; None where there were none, as at the start) and memory (peak bytes so far, of the device, or
            of the process on a CPU). docs/fitting.md has a table of them.
        method: that was run: "sgd", "em", "truncated" or "online".
        best_step: the step (of EM: the M-step) whose parameters were kept.
        held_out_nll: of these, in nats per token; None without held-out rows.
        held_out_rows: finite rows held out.
        skipped_rows: distinct rows left out because they are not finite (`mfa_kernels.ops.common.finite`), as far as
            read.
        skipped_steps: steps left out because the loss or its gradient was not finite.
        live_components: components that are the most responsible for at least one of `live_rows` rows.
        live_rows: the held-out rows and a sample of the others.
        seconds: wall time by stage: "kmeans", "start", the method, and "polish" where there was one.
        stopped_early: whether `patience` ran out.
        settled: whether EM ended before the last of its epochs, as another would have changed next to nothing.
        interrupted: whether Ctrl-C ended the training.
        prior_strength: of EM's prior, tokens per region; None without EM.
        revived_components: times that EM moved a component because it owned nothing of its own.
        refused_states: that would have been kept, were they not worse than the start on rows trained on.
        held_out_by: "text", where whole texts were, none of whose rows were trained on; "row", where it is not known
            which text a row is from, or there are too few of them; None without held-out rows.
        candidate_gap: where rows looked at candidates alone, nats by which the bound falls short of log p at the end,
            the mean over some of the rows trained on (online, over a sample of the data); likelihoods in `history` are
            such bounds, `held_out_nll` is exact. Else None.
        run: what the fit was, as JSON can hold it; empty where that is not known. "began" (UTC); "settings" (the
            arguments of the fit; "method_asked" may be "auto"); "data" (rows, n_features, a fingerprint of some of the
            rows, whether they were "streamed", and, of a store that says them, model, tokenizer and layer);
            "versions"; "machine" (device, its name, processes, threads). No paths: `mfa_kernels.common.sharing` has the
            rule. A fit that was resumed keeps what it began with.
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
    run: dict[str, Any] = field(default_factory=dict)
    settled: bool = False
    candidate_gap: float | None = None

    def __str__(self) -> str:
        """A few lines for people."""
        last: dict[str, Any] = self.history[-1] if self.history else {}
        by = "" if self.held_out_by is None else f" (held out by {_said(self.held_out_by)})"
        chosen = "" if self.held_out_nll is None else f", held-out {self.held_out_nll:.3f} nats per token{by}"
        none = " (the start: none was better)" if self.best_step == 0 and last.get("step", 0) else ""
        lines = [f"{_said(self.method)}: the state of step {self.best_step} of {last.get('step', 0)}{none}{chosen}"]
        lines.append(
            f"live: {self.live_components} regions, the most responsible for at least one of {self.live_rows:,} rows"
        )
        stages = ", ".join(f"{_said(stage)} {seconds:.1f}" for stage, seconds in self.seconds.items())
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
        if self.candidate_gap is not None:
            lines.append(f"candidates missed {self.candidate_gap:.4f} nats of each row trained on")
        if self.settled:
            lines.append("settled: another pass would have changed next to nothing")
        if self.stopped_early or self.interrupted:
            lines.append("interrupted" if self.interrupted else "stopped for want of improvement")
        lines += [f"{what}: {told}" for what, told in self.described().items()]
        return "\n".join(lines)

    def held_out(self) -> str | None:
        """Returns the likelihood that the state was chosen by, in words; None without held-out rows."""
        if self.held_out_nll is None:
            return None
        by = "" if self.held_out_by is None else f", held out by {_said(self.held_out_by)}"
        return f"{self.held_out_nll:.3f} nats per token ({self.held_out_rows:,} rows{by})"

    def described(self) -> dict[str, str]:
        """Returns the run in words, under "fitted", "data" and "with"; nothing where it is not known."""
        if not self.run:
            return {}
        settings, data, versions, machine = (
            self.run.get(part, {}) for part in ("settings", "data", "versions", "machine")
        )
        asked = settings.get("method_asked", self.method)
        method = _said(self.method) + ("" if asked == self.method else f" (asked for: {_said(asked)})")
        fitted = [_said(self.run.get("began")), method]
        fitted += ["from a mixture"] if settings.get("start") is not None else []
        fitted += [f"{name} {_said(settings[key])}" for name, key in _TOLD.items() if key in settings]
        rows = data.get("rows")
        many = f"{rows:,} rows" if COUNT.holds(rows) else "rows"
        told = [f"{many} of width {_said(data.get('n_features'))}{', read once' * (data.get('streamed') is True)}"]
        told += [_said(data[key]) for key in ("model", "layer") if key in data]
        told += [f"fingerprint {_said(data.get('fingerprint'))}"]
        by = [f"{_said(name)} {_said(version)}" for name, version in versions.items()]
        by += [_said(machine[key]) for key in ("device", "name") if key in machine]
        by += [f"{_said(machine['processes'])} processes"] if machine.get("processes", 1) != 1 else []
        return {"fitted": ", ".join(fitted), "data": ", ".join(told), "with": ", ".join(by)}

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold of the report, for `from_dict`.

        Of a history of more than `MOST_RECORDS` records, that many are kept: the first, the last, that of the best
        step, and others at even distances. The whole of it is in the `log` of a fit, if it was given one.

        Raises:
            TypeError: something in it, put there by a callback perhaps, is nothing that JSON can hold.
        """
        content = {one.name: _written(getattr(self, one.name)) for one in fields(self)}
        content["history"] = [
            {key: _written(value) for key, value in record.items()} for record in _thinned(self.history, self.best_step)
        ]
        content["seconds"] = {stage: _written(seconds) for stage, seconds in self.seconds.items()}
        try:
            return dict(json.loads(json.dumps(content, allow_nan=False)))  # lists for tuples, as they will be read
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"fit_report must hold only what JSON can: {error}") from error

    @classmethod
    def from_dict(cls, content: Any, where: str = "fit_report") -> FitReport:
        """Returns the report that `as_dict` was called on, or one equal to it.

        Args:
            content: any value of JSON. What is missing is as in a report of nothing; what else there is, as later
                versions may write it, is left out.
            where: the beginning of errors: the file that it was found in.

        Raises:
            ValueError: beginning with `where`, and naming what is of another kind than it should be.
        """
        check_fields(content, {}, where)
        found = {one.name: _read(content[one.name]) for one in fields(cls) if one.name in content}
        if isinstance(found.get("seconds"), dict):
            found["seconds"] = {stage: _read(seconds) for stage, seconds in found["seconds"].items()}
        if isinstance(found.get("history"), list):
            found["history"] = [
                {key: _read(value) for key, value in record.items()} if isinstance(record, dict) else record
                for record in found["history"]
            ]
        check_report(found, where)
        return cls(**found)

    def write_history(self, path: StrPath) -> None:
        """Writes the history as JSON lines, replacing the file; a number that is not finite becomes null."""
        lines = [
            json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})
            for record in self.history
        ]
        atomic_write_text(path, "".join(line + "\n" for line in lines))


def check_report(content: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, beginning with `where`, unless the fields of a report that are there are of their kinds."""
    check_fields(content, _REPORT, where, needed=False)
    for record in content.get("history", []):
        check_fields(record, _RECORD, f"{where}: history", needed=False)
    check_fields(content.get("run", {}), _RUN, f"{where}: run", needed=False)


def _thinned(history: list[dict[str, Any]], best_step: int) -> list[dict[str, Any]]:
    last = len(history) - 1
    if last < MOST_RECORDS:
        return history
    places = {round(i * last / (MOST_RECORDS - 2)) for i in range(MOST_RECORDS - 1)}
    places |= {i for i, record in enumerate(history) if record.get("step") == best_step}
    return [history[i] for i in sorted(places)]


def _written(value: Any) -> Any:
    """A value for JSON, which has no numbers that are not finite."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _read(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _said(value: Any) -> str:
    """A value that a file may have brought, for a terminal or a page: short, and nothing but text."""
    if NUMBER.holds(value) or (isinstance(value, str) and len(value) < 100 and value.isprintable()):
        return str(value)
    return "unknown" if value is None else shown(value)
