"""`mfa-kernels demo`: the main job from end to end (harvest, fit, look at topics or regions, steer)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels import MFA
from mfa_kernels.commands import topic_demo
from mfa_kernels.common.checks import check_component, check_integer, check_number, check_positive
from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.common.sharing import SMOLLM2
from mfa_kernels.data import gguf
from mfa_kernels.data.genres import genre_texts
from mfa_kernels.data.harvest import harvest
from mfa_kernels.data.language_model import check_sampling, continuation, load_language_model, origin, resolve_layer
from mfa_kernels.data.store import ActivationStore
from mfa_kernels.data.text import check_files
from mfa_kernels.data.tiny_lm.corpus import stdlib_texts
from mfa_kernels.evaluation import evaluate, score_table
from mfa_kernels.fitting import fit, kmeans
from mfa_kernels.interpret.contexts import Assignments, assignments, region_latents
from mfa_kernels.interpret.figures import region_scatter, regions_map
from mfa_kernels.interpret.lens import logit_shift
from mfa_kernels.interpret.regions import RegionSummary, interesting_regions, region_summaries
from mfa_kernels.interpret.report import write_report
from mfa_kernels.interpret.topics import genre_counts, topics
from mfa_kernels.ops.common import cpp
from mfa_kernels.steering import steer

PROMPTS = ("    def close(self):\n", "The return value is", "    def test_read(self):\n")
"""Prompts for the small model that ships with the package, which has read the standard library's sources."""

STANDARD_DEVIATIONS = 2.0
"""How far the second steering moves inside the region, along its widest local direction."""


_SMALL: dict[str, Any] = {"tokens": 200_000, "components": 256, "prompts": PROMPTS}
_LARGE: dict[str, Any] = {"tokens": 60_000, "components": 128, "prompts": topic_demo.PROMPTS}


@dataclass(frozen=True)
class Options:
    """The options of `mfa-kernels demo`; see its --help. What is None is filled in by `filled`."""

    out: Path
    small: bool = False  # the model that ships with the package, reading the standard library, and its regions
    model: str | None = None
    layer: int | str | None = None
    text: tuple[str, ...] = ()
    tokens: int | None = None
    components: int | None = None
    rank: int = 10
    epochs: int = 10
    alpha: float = 0.3  # toward a region
    kl: float = topic_demo.KL  # toward a topic
    component: int | None = None
    prompts: tuple[str, ...] | None = None
    new_tokens: int = 32
    temperature: float = 0.7
    seed: int = 0
    seeds: int = 4  # of the texts that a topic's table counts
    device: torch.device | str = "cpu"  # of the language model and of the mixture


def filled(options: Options) -> Options:
    """Returns the options with what depends on the model filled in, but for the layer."""
    defaults = {**(_SMALL if options.small else _LARGE), "model": None if options.small else SMOLLM2}
    return replace(options, **{name: value for name, value in defaults.items() if getattr(options, name) is None})


_HELD_OUT = 0.05  # of the activations, by `fit` itself

FILES = ("fit.jsonl", "evaluation.json", "regions.html", "regions.png", "region.png")
"""Files of a demonstration, next to its store and its mixture."""


class Rows:
    """Rows [start, stop) of a store, in the form that `fit` and `evaluate` take."""

    def __init__(self, store: ActivationStore, start: int, stop: int) -> None:
        self.store, self.start, self.stop, self.n_features = store, start, stop, store.n_features
        self.meta = store.meta

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, index: Tensor) -> Tensor:
        return self.store.rows(index + self.start)

    @property
    def texts(self) -> Tensor:
        return self.store.texts[self.start : self.stop]


class Fitted(NamedTuple):
    """What the first half made: a language model, activations of its layer, and a mixture of them."""

    model: Any
    tokenizer: Any
    layer: int | str
    store: ActivationStore
    training_rows: int
    mfa: MFA
    assigned: Assignments


def run(options: Options) -> list[Path]:
    """Runs the demonstration with printed reports, and returns the files that it wrote."""
    check(options)
    options = filled(options)
    fitted = _fitted(options)
    shown, chosen, summaries = _topics(options, fitted) or _regions(options, fitted)
    written = [options.out / name for name in ("activations", "mfa", "fit.jsonl", "evaluation.json")]
    written += _reports(
        options.out, fitted.mfa, fitted.store, fitted.tokenizer, fitted.model, shown, chosen, summaries, fitted.assigned
    )
    print("\nWritten:")
    for path in written:
        print(f"  {path}")
    mfa, store = written[1], written[0]
    print("\nTo go on:")
    print(f"  mfa-kernels explore {mfa} {store}    # all regions, on a page of your browser")
    print(f"  mfa-kernels report {mfa} {store} --csv regions.csv")
    print(f"  mfa-kernels evaluate {mfa} {store}")
    print(f'  mfa-kernels steer {mfa} "{fitted_prompt(options)}" -k {chosen} --alpha 0.3')
    return written


def fitted_prompt(options: Options) -> str:
    """Returns a prompt for the command that is shown last: the first that fits a line."""
    prompts = options.prompts or ()
    return next((prompt for prompt in prompts if '"' not in prompt and "\n" not in prompt), "Once")


def _fitted(options: Options) -> Fitted:
    """Harvests, fits and evaluates."""
    tokens, components = check_integer(options.tokens, "tokens", 1), check_integer(options.components, "components", 1)
    model, tokenizer = load_language_model(options.model)
    model.to(options.device)
    depth = model.config.get_text_config().num_hidden_layers
    middle = depth // 2 if options.small else min(round(topic_demo.DEPTH * depth), depth - 1)
    layer = middle if options.layer is None else options.layer
    layer_path = resolve_layer(model, layer)[0]
    print(f"model   {options.model or 'tiny_lm, the small model that ships with mfa_kernels'}, after {layer_path}")

    cpp.library()  # built now if it is not yet, so that no time below contains the build
    held_out = max(tokens // 10, 1)
    texts, seed = _texts(options)
    store, seconds = timed(
        lambda: harvest(
            model, tokenizer, texts, layer, options.out / "activations",
            max_tokens=tokens + held_out, seed=seed, overwrite=True,
        )
    )  # fmt: skip
    print(f"harvest {len(store):,} activations of width {store.n_features} in {seconds:.1f} s")
    split = min(tokens, len(store) * 10 // 11)
    training, test = Rows(store, 0, split), Rows(store, split, len(store))

    clusters, kmeans_seconds = timed(lambda: kmeans(training, components, seed=options.seed, device=options.device))
    mfa, fit_seconds = timed(
        lambda: fit(
            training, components, options.rank, clusters=clusters, epochs=options.epochs, seed=options.seed,
            held_out=_HELD_OUT,
            log=options.out / "fit.jsonl", device=options.device,
        )
    )  # fmt: skip
    mfa.extra = {**origin(model, tokenizer), "layer": layer_path}
    mfa.save_pretrained(options.out / "mfa")
    if mfa.fit_report.interrupted:
        raise KeyboardInterrupt
    score = evaluate(mfa, test, clusters.centroids)
    print(f"fit     K={mfa.n_components} R={mfa.rank} on {len(training):,} activations\n")
    print(score_table(score, mfa.n_components, "held-out activations", kmeans_seconds, fit_seconds))
    atomic_write_json(options.out / "evaluation.json", score.as_dict())
    return Fitted(model, tokenizer, layer, store, split, mfa, assignments(mfa, store))


def _topics(options: Options, fitted: Fitted) -> tuple[list[int], int, list[RegionSummary]] | None:
    """Shows topics and steers toward four; None where the texts have no genres, or a region was asked for."""
    if options.small or options.component is not None:
        return None
    mfa, store, assigned = fitted.mfa, fitted.store, fitted.assigned
    counts = genre_counts(mfa, store, assigned=assigned)
    found = topics(mfa, store, fitted.tokenizer, mfa.n_components, counts=counts, assigned=assigned)
    if not counts.are_genres or not found:
        return None
    chosen = topic_demo.chosen_topics(found, 4)
    best = topic_demo.chosen_topics(found, len(counts.names))
    rest = [topic for topic in found if topic not in best]
    shown = sorted([*best, *rest[: max(0, 12 - len(best))]], key=lambda topic: -topic.score)
    topic_demo.show_topics(mfa, store, fitted.tokenizer, shown, assigned)
    topic_demo.show_steering(
        fitted.model, fitted.tokenizer, mfa, fitted.layer, store, fitted.training_rows, counts, chosen,
        prompts=options.prompts or topic_demo.PROMPTS, seeds=options.seeds, new_tokens=options.new_tokens,
        kl=options.kl, seed=options.seed,
    )  # fmt: skip
    summaries = region_summaries(mfa, store, fitted.tokenizer, assigned=assigned)
    return [topic.component for topic in shown], chosen[0].component, summaries


def _regions(options: Options, fitted: Fitted) -> tuple[list[int], int, list[RegionSummary]]:
    """Shows the most peculiar regions and steers toward one."""
    mfa, store, assigned = fitted.mfa, fitted.store, fitted.assigned
    shown = interesting_regions(mfa, store, 12, assigned=assigned)
    if not shown:
        raise ValueError(
            f"tokens: no region owns enough of {len(store):,} to be shown: read more, or fit fewer components"
        )
    summaries = region_summaries(mfa, store, fitted.tokenizer, assigned=assigned)
    by_component = {summary.component: summary for summary in summaries}
    print(f"\n{len(shown)} regions: their share of all tokens, the tokens that set them apart, and one context each")
    print("(the token is in [brackets])\n\nregion   share  tokens")
    for component in shown:
        print(describe(by_component[component]))

    chosen = worth_steering(shown, by_component) if options.component is None else options.component
    if chosen not in by_component:
        raise ValueError(f"component {chosen} owns no token of this store: choose another region to steer toward")
    _steering(
        options, fitted.model, fitted.tokenizer, mfa, store, fitted.layer, by_component[chosen], assigned
    )  # fmt: skip
    return shown, chosen, summaries


def check(options: Options) -> None:
    """Raises now the errors that harvesting or fitting would raise later."""
    if options.small and options.model is not None:
        raise ValueError(f"small: it has a model of its own, got model {options.model!r} too: leave one of them out")
    options = filled(options)
    check_integer(options.rank, "rank", 1)  # to move inside a region
    check_integer(options.epochs, "epochs")
    check_number(options.alpha, "alpha")
    check_positive(options.kl, "kl")
    check_integer(options.seeds, "seeds", 1)
    check_sampling(options.new_tokens, options.temperature, options.seed)
    tokens, components = check_integer(options.tokens, "tokens", 1), check_integer(options.components, "components", 1)
    if options.component is not None:
        check_component(options.component, components)
    # As `fit` holds out its share, and K-means wants a row for each.
    if components > tokens * (1 - _HELD_OUT):
        raise ValueError(
            f"components must be at most the activations to train on, {1 - _HELD_OUT:.0%} of {tokens:,}, "
            f"got {components}"
        )
    check_files(options.text)
    if options.model == SMOLLM2:
        try:
            gguf.smollm2()
        except ImportError as error:
            raise OSError(
                f"model: {SMOLLM2} cannot be loaded, {error} (in a checkout, `make real`); --small shows the steps on "
                "the model that ships with the package"
            ) from error


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result of `work`, and its seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def _texts(options: Options) -> tuple[Iterable[Any], int | None]:
    """Returns the texts, and the seed of their order; None where they come in one that is balanced already."""
    if options.text:
        return [Path(path) for path in options.text], options.seed
    if options.small:
        return stdlib_texts("all"), options.seed
    return genre_texts(), None


def describe(summary: RegionSummary) -> str:
    """Returns two lines: a region's share and preferred tokens, and a context."""
    tokens = "  ".join(token.token for token in summary.tokens)
    context = summary.contexts[0]
    return (
        f"{summary.component:>6}  {summary.share:6.2%}  {tokens}\n"
        f"{'':>16}{context.before[-48:]}[{context.token}]{context.after[:32]}"
    )


def _steering(
    options: Options,
    model: Any,
    tokenizer: Any,
    mfa: MFA,
    store: ActivationStore,
    layer: int | str,
    region: RegionSummary,
    assigned: Assignments,
) -> None:
    """Prints text after the same prompts: unsteered, toward a region, and moved inside it."""
    component = region.component
    z = region_latents(mfa, store, component, assigned)
    axis = int(z.std(0).argmax())
    move = torch.zeros(mfa.rank)
    move[axis] = STANDARD_DEVIATIONS * z[:, axis].std()
    toward = {"component": component, "alpha": options.alpha}
    ways: dict[str, dict[str, Any]] = {
        f"toward region {component}, alpha {options.alpha}": toward,
        f"and inside it, z[{axis}] {float(move[axis]):+.1f}": {**toward, "latents": move},
        f"and inside it, z[{axis}] {float(-move[axis]):+.1f}": {**toward, "latents": -move},
    }
    print(f"\nSteering toward region {component}: {'  '.join(token.token for token in region.tokens)}")
    print(
        f"(alpha {options.alpha:g}: that share of the way to its centroid; z[{axis}]: then along this latent of it, in"
    )
    print("prior standard deviations)\n")

    def write(prompt: str) -> str:
        return continuation(model, tokenizer, prompt, options.new_tokens, options.temperature, options.seed)

    prompts = options.prompts or PROMPTS
    for prompt in prompts:
        print(f"  {prompt!r}")
        print(f"    unsteered:  {write(prompt)!r}")
        for name, arguments in ways.items():
            with steer(model, mfa, layer, **arguments):
                print(f"    {name}:  {write(prompt)!r}")
    prompt = prompts[0]
    print(f"\nNext token after {prompt!r}: log-probabilities that rise most, in nats")
    for name, arguments in ways.items():
        shift = logit_shift(model, tokenizer, prompt, partial(steer, model, mfa, layer, **arguments))
        rises = "  ".join(f"{change.token} {change.change:+.1f}" for change in shift.rises[:8])
        print(f"  {name}:  {rises}")


def worth_steering(shown: list[int], summaries: dict[int, RegionSummary]) -> int:
    """Returns the first region shown whose favourite tokens are words, so that their effect can be read."""
    for component in shown:
        tokens = [token.token.strip("·") for token in summaries[component].tokens[:3]]
        if all(len(token) > 1 and token.isidentifier() for token in tokens):
            return component
    return shown[0]


def _reports(
    out: Path,
    mfa: MFA,
    store: ActivationStore,
    tokenizer: Any,
    model: Any,
    shown: list[int],
    chosen: int,
    summaries: list[RegionSummary],
    assigned: Assignments,
) -> list[Path]:
    """Writes figures and the page that holds them; without matplotlib, the page alone; returns their paths."""
    figures = find_spec("matplotlib") is not None
    paths = []
    if figures:
        paths.append(regions_map(mfa, summaries, out / "regions.png", labelled=shown))
        paths.append(region_scatter(mfa, store, chosen, out / "region.png", tokenizer=tokenizer, assigned=assigned))
    else:
        print("\n(no figures: pip install mfa_kernels[report])")
    paths.append(
        write_report(
            out / "regions.html", mfa, store, tokenizer, model=model, components=shown, figures=figures,
            assigned=assigned,
        )
    )  # fmt: skip
    return paths
