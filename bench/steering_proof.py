"""python -m bench.steering_proof --out FOLDER: does steering steer, at matched change of the next-token distribution?

On a real model (bench/real.py), or with --toy the one that ships with the package: several regions of a mixture of one
layer's activations are taken, and the same prompts are continued under four ways to steer, at every position,

    interpolation         x <- (1 - alpha) x + alpha mu_k             arXiv 2602.02464, eq. 14
    addition              x <- x + alpha mu_k                         the same centroid as a direction (its appendix E)
    difference in means   x <- x + alpha (mean in the region - mean outside it)
    random                x <- x + alpha v                            v random, of the norm of the difference in means

with alpha such that KL(steered || unsteered) of the token after the prompt is a given number of nats on average
(`alpha_for_kl`). Reported, on average over regions:

    concept   share of generated tokens from the region's own vocabulary: tokens at least LIFT times as frequent among
              the region's activations as overall
    next      the same for the vocabulary that follows the region's tokens in the corpus
    nll       of the generated tokens under the unsteered model, nats per token: fluency, the lower the better
    kl        KL(steered || unsteered) along the generated text, nats per token: what was matched after the prompt alone

Before an RMSNorm, (1 - alpha) x + alpha mu_k and x + alpha / (1 - alpha) mu_k are one: after the last layer, where
nothing else reads the stream, the two agree to the tolerance of the bisection. In between they do not.

Written: steering_proof.json, .md (the table that is printed) and .svg. `--redraw` makes the last two from the first.
What one run of it says is in docs/steering_results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import activations
from bench.texts import is_held_out
from mfa_kernels import MFA, steer
from mfa_kernels.data import ActivationStore
from mfa_kernels.interpret.contexts import Assignments, assignments
from mfa_kernels.interpret.regions import interesting_regions, region_summaries
from mfa_kernels.models import load_language_model
from mfa_kernels.steering import Add, Handle, Toward, alpha_for_kl

LIFT, LEAST = 4.0, 5  # a region's vocabulary: this much more frequent than overall, and seen so often
METHODS = ("interpolation", "addition", "difference in means", "random")
MOST = {"interpolation": 1.0}  # largest alpha; a vector may be added more often than once
FARTHEST = 16.0
PROMPT_TOKENS = 12


class Score(NamedTuple):
    """Averages over prompts and generated tokens; see the head of this file."""

    alpha: float
    concept: float
    next: float
    nll: float
    kl: float


class Region(NamedTuple):
    """A region: name, vocabularies (V,) bool, and the direction of its difference in means, (D,)."""

    component: int
    name: str
    own: Tensor
    following: Tensor
    difference: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    activations.add_arguments(parser)
    parser.add_argument("--components", type=int, default=512)
    parser.add_argument("--kls", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0], help="nats to compare at")
    parser.add_argument("--regions", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--redraw", action="store_true", help="measure nothing, read steering_proof.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / "steering_proof.json"
    if not options.redraw:
        said = {k: str(v) for k, v in vars(options).items() if k != "out"}
        report = {"options": said, "kls": options.kls, "regions": measured(options)}
        written.write_text(json.dumps(report, indent=1))
    report = json.loads(written.read_text())
    results, kls = report["regions"], report["kls"]
    table = markdown(results, kls)
    (options.out / "steering_proof.md").write_text(table + "\n")
    figure(results, kls, options.out / "steering_proof.svg")
    print(table)


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to steer, for each region."""
    source = activations.chosen(options)
    model, tokenizer = load_language_model("tiny_lm" if options.toy else "smollm2")
    options.layer = activations.TOY_LAYERS[0] if options.toy else options.layer
    store, mfa = source.store, source.mixture(options.components)
    assigned = assignments(mfa, store)
    prompts = held_out_prompts(store, options)
    results = []
    for region in regions(options, mfa, store, tokenizer, assigned):
        results.append(measure(options, model, mfa, region, prompts))
        print(f"region {region.component}: {region.name}", flush=True)
    return results


def held_out_prompts(store: ActivationStore, options: argparse.Namespace) -> Tensor:
    """Beginnings of documents spread over the store, of those held out where some are, (prompts, PROMPT_TOKENS)."""
    numbers = [n for n in range(store.n_documents) if options.toy or is_held_out(store.source(n))]
    spread = [numbers[i] for i in torch.linspace(0, len(numbers) - 1, 4 * options.prompts).long().tolist()]
    beginnings = [store.document_tokens(document)[:PROMPT_TOKENS] for document in spread]
    return torch.stack([ids.long() for ids in beginnings if len(ids) == PROMPT_TOKENS][: options.prompts])


def regions(
    options: argparse.Namespace, mfa: MFA, store: ActivationStore, tokenizer: Any, assigned: Assignments
) -> list[Region]:
    """Regions that differ from each other, whose favourite tokens are words, and are most of what they own."""
    shown = interesting_regions(mfa, store, 4 * options.regions, assigned=assigned)
    summaries = region_summaries(mfa, store, tokenizer, shown, n_contexts=0, assigned=assigned)
    tokens, x, owner = store.tokens.long(), store.tensor(), assigned.components
    total, everywhere = x.double().sum(0), len(x)
    found = []
    for summary in summaries:
        words = [token.token.strip("·") for token in summary.tokens[:3]]
        inside = owner == summary.component
        own = vocabulary(tokens, inside)
        if not all(len(word) > 2 and word.isidentifier() for word in words) or own[tokens[inside]].float().mean() < 0.5:
            continue
        of_region = x[inside].double().sum(0)
        difference = of_region / inside.sum() - (total - of_region) / (everywhere - inside.sum())
        found.append(
            Region(
                summary.component, " ".join(words), own,
                # The row after a row holds the next token, but for one row in each window.
                vocabulary(tokens, inside.roll(1).index_fill(0, torch.tensor(0), False)), difference.float(),
            )
        )  # fmt: skip
    return found[: options.regions]


def vocabulary(tokens: Tensor, inside: Tensor) -> Tensor:
    """Returns True for token ids that are LIFT times as frequent among the rows `inside` as overall, (V,) bool."""
    totals = torch.bincount(tokens)
    held = torch.bincount(tokens[inside], minlength=len(totals))
    lift = (held / inside.sum()) / (totals.clamp_min(1) / len(tokens))
    return (lift >= LIFT) & (held >= LEAST)


def measure(options: argparse.Namespace, model: Any, mfa: MFA, region: Region, prompts: Tensor) -> dict[str, Any]:
    """Every way to steer at every KL; None where it cannot be reached."""
    generator = torch.Generator().manual_seed(options.seed + region.component)
    random = torch.randn(mfa.n_features, generator=generator)
    random *= region.difference.norm() / random.norm()
    specs: dict[str, Callable[[float], Any]] = {
        "interpolation": lambda alpha: Toward(region.component, alpha),
        "addition": lambda alpha: Add(mfa.means[region.component].detach(), alpha),
        "difference in means": lambda alpha: Add(region.difference, alpha),
        "random": lambda alpha: Add(random, alpha),
    }
    out: dict[str, Any] = {"component": region.component, "tokens": region.name, "vocabulary": int(region.own.sum())}
    with steer(model, mfa, options.layer, interventions=[]) as handle:
        out["unsteered"] = generated(options, model, handle, region, prompts, 0.0)._asdict()
        for method in METHODS:
            out[method] = [
                at_kl(options, model, handle, region, prompts, specs[method], method, kl) for kl in options.kls
            ]
    return out


def at_kl(
    options: argparse.Namespace, model: Any, handle: Handle, region: Region, prompts: Tensor,
    spec: Callable[[float], Any], method: str, kl: float,
) -> dict[str, float] | None:  # fmt: skip
    try:
        alpha = alpha_for_kl(
            model, {"input_ids": prompts}, handle, kl, spec=spec, most=MOST.get(method, FARTHEST), tolerance=0.01
        )  # fmt: skip
    except ValueError:
        return None
    handle.update(interventions=spec(alpha))
    return generated(options, model, handle, region, prompts, alpha)._asdict()


@torch.no_grad()
def generated(
    options: argparse.Namespace, model: Any, handle: Handle, region: Region, prompts: Tensor, alpha: float
) -> Score:
    """Continues the prompts, sampled at temperature 1 from the same seed every time, and scores what was written."""
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        out = model.generate(
            prompts, do_sample=True, top_k=0, min_new_tokens=options.new_tokens, max_new_tokens=options.new_tokens,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    start = prompts.shape[1]
    written = out.sequences[:, start:]
    steered = torch.stack(out.logits, 1).double().log_softmax(-1)
    with handle.paused():
        unsteered = model(out.sequences).logits[:, start - 1 : -1].double().log_softmax(-1)
    divergence = (steered.exp() * (steered - unsteered)).sum(-1)

    def rate(words: Tensor) -> float:
        return float((words[written.clamp_max(len(words) - 1)] & (written < len(words))).double().mean())

    nll = -unsteered.gather(-1, written.unsqueeze(-1)).mean()
    return Score(alpha, rate(region.own), rate(region.following), float(nll), float(divergence.mean()))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over regions, and its standard error."""
    v = torch.tensor(values, dtype=torch.float64)
    return float(v.mean()), float(v.std() / len(v) ** 0.5) if len(v) > 1 else float("nan")


def reached(results: list[dict[str, Any]], i: int) -> list[dict[str, Any]]:
    """Regions where every method reaches the i-th KL: all are averaged over the same ones."""
    return [r for r in results if all(r[method][i] is not None for method in METHODS)]


def markdown(results: list[dict[str, Any]], kls: list[float]) -> str:
    head = "| KL at the prompt | way | alpha | concept rate | next rate | NLL, nats | KL along the text |"
    lines = [head, "|---|---|---|---|---|---|---|"]

    def row(first: str, way: str, scores: list[dict[str, float]]) -> str:
        def cell(name: str, digits: int, percent: bool = False) -> str:
            mean, error = mean_and_error([score[name] for score in scores])
            scale, unit = (100, "%") if percent else (1, "")
            return f"{scale * mean:.{digits}f} ± {scale * error:.{digits}f}{unit}"

        cells = [cell("alpha", 2), cell("concept", 1, True), cell("next", 1, True), cell("nll", 2), cell("kl", 2)]
        return f"| {first} | {way} | " + " | ".join(cells) + " |"

    lines.append(row("0", f"unsteered ({len(results)} regions)", [r["unsteered"] for r in results]))
    for i, kl in enumerate(kls):
        same = reached(results, i)
        for method in METHODS if same else ():
            first = f"{kl} ({len(same)} regions)" if method == METHODS[0] else ""
            lines.append(row(first, method, [r[method][i] for r in same]))
    lines += ["", "Interpolation less addition, paired by region (mean ± standard error):", ""]
    for i, kl in enumerate(kls):
        if same := reached(results, i):
            parts = []
            for name, scale, unit in (("concept", 100, " points"), ("next", 100, " points"), ("nll", 1, " nats")):
                pairs = [scale * (r["interpolation"][i][name] - r["addition"][i][name]) for r in same]
                mean, error = mean_and_error(pairs)
                parts.append(f"{name} {mean:+.2f} ± {error:.2f}{unit}")
            lines.append(f"- KL {kl}: " + ", ".join(parts))
    return "\n".join(lines)


def figure(results: list[dict[str, Any]], kls: list[float], path: Path) -> None:
    """Concept and next rate against KL, and against fluency."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "steering_proof", "svg.fonttype": "none"})  # same figures, same file
    from matplotlib import pyplot

    picture, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for method in METHODS:
        at = [i for i in range(len(kls)) if reached(results, i)]

        def means(name: str, at: list[int] = at, method: str = method) -> list[float]:
            return [mean_and_error([r[method][i][name] for r in reached(results, i)])[0] for i in at]

        reached_kls = [kls[i] for i in at]
        panels[0].plot(reached_kls, means("concept"), "o-", label=method)
        panels[1].plot(reached_kls, means("next"), "o-", label=method)
        panels[2].plot(means("nll"), means("concept"), "o-", label=method)
    unsteered = {
        name: mean_and_error([r["unsteered"][name] for r in results])[0] for name in ("concept", "next", "nll")
    }
    for panel, name in zip(panels, ("concept", "next")):
        panel.axhline(unsteered[name], color="grey", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", xlabel="KL after the prompt, nats", ylabel=f"{name} rate")
    panels[1].plot([], [], "k*", label="unsteered")
    panels[2].plot(unsteered["nll"], unsteered["concept"], "k*")
    panels[2].set(xlabel="NLL under the unsteered model, nats per token", ylabel="concept rate")
    panels[1].legend()
    picture.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
