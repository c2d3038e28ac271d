"""Localization where it is known what a network has to compute: a model of three layers that is trained here.

    python -m bench.localization_small               # trains, fits, localizes at every site
    python -m bench.localization_small --draw        # the tables, of what was measured

Prompts of one-token words: three choices of colors (variables pointer and answer), and facts of 200 entities, drawn at
random (country of 20, continent of 5, language of 10). A pair of a color and an object in five is not trained on: the
choices that are localized are of these. Mixture and baselines are fitted to activations of such prompts, all tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench import dots
from bench.race import processor
from mfa_kernels import fit, kmeans
from mfa_kernels.common.files import atomic_write_json
from mfa_kernels.evaluation import Site, comparison
from mfa_kernels.evaluation.comparison import Baselines, Result, compare
from mfa_kernels.evaluation.localization import LinearFeaturizer, localize
from mfa_kernels.evaluation.tasks import Pair, Task
from mfa_kernels.interpret import associate

RESULTS = Path("bench/results/localization-small.json")
FIGURE = Path("docs/figures/localization-small.svg")
ATTRIBUTES = {"country": 20, "continent": 5, "language": 10}
SIZES = {"mark": 3 + len(ATTRIBUTES), "color": 12, "object": 20, "letter": 26, "entity": 200, **ATTRIBUTES}
FIRST = dict(zip(SIZES, [0, *torch.tensor(list(SIZES.values())).cumsum(0).tolist()]))
ASK, IS, ANSWER = range(3)
LAYERS, WIDTH, COMPONENTS, RANK = 3, 96, 128, 8
STEPS, BATCH, PAIRS, PROMPTS = 6000, 64, 3000, 50_000


class World(NamedTuple):
    """What is drawn once: the facts of entities (200, 3), and the pairs of color and object that are held out."""

    facts: Tensor
    unseen: Tensor


class Choices(NamedTuple):
    """Questions: three colors and their letters (n, 3), the line that is right and the object (n,)."""

    colors: Tensor
    letters: Tensor
    line: Tensor
    thing: Tensor

    def ids(self) -> Tensor:
        """[ask, object, is, color, letter, color, letter, color, letter, color, answer], (n, 11)."""
        n = len(self.line)
        colors = FIRST["color"] + self.colors
        lines = torch.stack([FIRST["letter"] + self.letters, colors], 2).flatten(1)
        head = [torch.full((n,), ASK), FIRST["object"] + self.thing, torch.full((n,), IS), _at(colors, self.line)]
        return torch.cat([torch.stack(head, 1), lines, torch.full((n, 1), ANSWER)], 1)

    def answer(self) -> Tensor:
        """The token of the right letter, (n,)."""
        return FIRST["letter"] + _at(self.letters, self.line)


def _at(values: Tensor, place: Tensor) -> Tensor:
    return values[torch.arange(len(place)), place]


def world(generator: torch.Generator) -> World:
    """Facts that are independent of each other."""
    facts = [torch.randint(size, (SIZES["entity"],), generator=generator) for size in ATTRIBUTES.values()]
    return World(torch.stack(facts, 1), torch.rand(SIZES["color"], SIZES["object"], generator=generator) < 0.2)


def choices(count: int, of: World, generator: torch.Generator, unseen: bool) -> Choices:
    """Questions of colors and objects that were trained on, or not."""
    draw = 8 * count if unseen else 2 * count
    colors = torch.rand(draw, SIZES["color"], generator=generator).argsort(1)[:, :3]
    letters = torch.rand(draw, SIZES["letter"], generator=generator).argsort(1)[:, :3]
    line, thing = (torch.randint(n, (draw,), generator=generator) for n in (3, SIZES["object"]))
    kept = (of.unseen[_at(colors, line), thing] == unseen).nonzero()[:count, 0]
    return Choices(colors[kept], letters[kept], line[kept], thing[kept])


def fact_ids(entity: Tensor, attribute: Tensor) -> Tensor:
    """[ask, attribute, entity, answer], (n, 4)."""
    ends = [torch.full_like(entity, token) for token in (ASK, ANSWER)]
    return torch.stack([ends[0], 3 + attribute, FIRST["entity"] + entity, ends[1]], 1)


def fact_answer(of: World, entity: Tensor, attribute: Tensor) -> Tensor:
    """The token of an attribute's value, (n,)."""
    firsts = torch.tensor([FIRST[name] for name in ATTRIBUTES])
    return firsts[attribute] + of.facts[entity, attribute]


def trained(of: World, generator: torch.Generator, steps: int) -> LlamaForCausalLM:
    """A model that answers both."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sum(SIZES.values()), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 100, 4 * (steps - step) / steps)
        asked = choices(BATCH // 2, of, generator, unseen=False)
        entity, attribute = (
            torch.randint(n, (BATCH // 2,), generator=generator) for n in (SIZES["entity"], len(ATTRIBUTES))
        )
        loss = torch.nn.functional.cross_entropy(model(asked.ids()).logits[:, -1], asked.answer())
        facts = model(fact_ids(entity, attribute)).logits[:, -1]
        loss = loss + torch.nn.functional.cross_entropy(facts, fact_answer(of, entity, attribute))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def said(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """What the model answers, (n,)."""
    return torch.cat([model(part).logits[:, -1].argmax(-1) for part in ids.split(1024)])


@torch.no_grad()
def harvested(model: LlamaForCausalLM, of: World, generator: torch.Generator) -> list[Tensor]:
    """Activations of all tokens of many prompts, by layer."""
    asked = choices(PROMPTS // 2, of, generator, unseen=False).ids()
    entity, attribute = (
        torch.randint(n, (PROMPTS // 2,), generator=generator) for n in (SIZES["entity"], len(ATTRIBUTES))
    )
    kept: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for ids in (asked, fact_ids(entity, attribute)):
        for part in ids.split(1024):
            hidden = model(part, output_hidden_states=True).hidden_states[1:]
            for rows, states in zip(kept, hidden):
                rows.append(states.flatten(0, 1))
    return [torch.cat(rows) for rows in kept]


class Problem(NamedTuple):
    """A variable: ids of base and source, the tokens of a site by its name, labels, whether they change."""

    base: Tensor
    source: Tensor
    sites: dict[str, tuple[Tensor, Tensor]]
    labels: Tensor
    changes: Tensor
    variable: Tensor


def problem(name: str, of: World, model: LlamaForCausalLM, generator: torch.Generator) -> tuple[Problem, float]:
    """Pairs whose prompts the model answers right, and the share of prompts that it does."""
    if name in ATTRIBUTES:
        own = list(ATTRIBUTES).index(name)
        entity, other = (torch.randint(SIZES["entity"], (4 * PAIRS,), generator=generator) for _ in range(2))
        shift = torch.randint(1, 3, (len(entity),), generator=generator)
        cause = torch.rand(len(entity), generator=generator) < 0.5
        asked = torch.where(cause, own, (own + shift) % 3)
        base, source = fact_ids(entity, asked), fact_ids(other, torch.full_like(asked, own))
        right = (fact_answer(of, entity, asked), fact_answer(of, other, torch.full_like(asked, own)))
        labels = torch.where(cause, right[1], right[0])
        differ = of.facts[entity, asked] != of.facts[other, asked]
        place = torch.full_like(entity, 2)
        sites, variable = {"entity": (place, place), "last": (place + 1, place + 1)}, of.facts[entity, own]
    else:
        first = choices(4 * PAIRS, of, generator, unseen=True)
        line = (first.line + torch.randint(1, 3, first.line.shape, generator=generator)) % 3
        moved = first.colors.clone()
        rows = torch.arange(len(line))
        moved[rows, line], moved[rows, first.line] = _at(first.colors, first.line), _at(first.colors, line)
        new = torch.rand(len(line), SIZES["letter"], generator=generator).argsort(1)[:, :3]
        kind = torch.randint(3, line.shape, generator=generator)  # the line, the letters, or both
        second = Choices(
            torch.where((kind == 1)[:, None], first.colors, moved),
            torch.where((kind == 0)[:, None], first.letters, new),
            torch.where(kind == 1, first.line, line),
            first.thing,
        )
        base, source, right = first.ids(), second.ids(), (first.answer(), second.answer())
        labels = FIRST["letter"] + _at(first.letters, second.line) if name == "pointer" else right[1]
        differ = torch.ones_like(line, dtype=torch.bool)
        end = torch.full_like(line, base.shape[1] - 1)
        sites = {"symbol": (4 + 2 * first.line, 4 + 2 * second.line), "last": (end, end)}
        variable = first.line if name == "pointer" else right[0]
    solved = [said(model, ids) == answer for ids, answer in zip((base, source), right)]
    kept = (solved[0] & solved[1] & differ).nonzero()[:PAIRS, 0]
    found = Problem(
        base[kept], source[kept], {at: (one[kept], two[kept]) for at, (one, two) in sites.items()}, labels[kept],
        (labels != right[0])[kept], variable[kept],
    )  # fmt: skip
    return found, float(torch.cat(solved).double().mean())


def measure(path: Path, seeds: int, steps: int) -> None:
    """Trains, and localizes every variable at both of its tokens, in the layer that carries it best."""
    generator = torch.Generator().manual_seed(0)
    of, started = world(generator), time.perf_counter()
    model = trained(of, generator, steps)
    print(f"{processor()}, {torch.get_num_threads()} threads: trained in {time.perf_counter() - started:.0f} s")
    activations = harvested(model, of, generator)
    made: dict[int, Baselines] = {}
    known = {"processor": processor(), "threads": torch.get_num_threads(), "sites": []}
    for name in ("pointer", "answer", *ATTRIBUTES):
        found, accuracy = problem(name, of, model, generator)
        judged = torch.arange(len(found.labels)) >= 2 * len(found.labels) // 3
        for at, (here, there) in found.sites.items():
            tried = {}
            for layer in range(LAYERS):
                site = Site(model, layer, {"input_ids": found.base}, {"input_ids": found.source}, here, there)
                whole = LinearFeaturizer(n_features=WIDTH)
                swapped = localize(
                    site.logits, found.labels, site.base, site.source, whole, mask=torch.ones(WIDTH),
                    changes=found.changes, held_out=judged, progress=False,
                )  # fmt: skip
                tried[layer] = (swapped.iia if name == "pointer" else swapped.cause, site)
            carried = {layer: float(value) for layer, (value, _) in tried.items()}
            layer = max(carried, key=lambda n: (round(carried[n], 2), -n))
            print(f"{name}, {at}: prompts right {accuracy:.3f}; the whole activation carries it, by layer: {carried}")
            if carried[layer] < 0.5:
                continue
            site = tried[layer][1]
            if layer not in made:
                mixture = fit(activations[layer], COMPONENTS, RANK, progress=False).requires_grad_(False)
                clusters = kmeans(activations[layer], COMPONENTS, progress=False)
                made[layer] = Baselines(mixture, activations[layer], clusters, progress=False)
            with torch.no_grad():
                nmi = associate(made[layer].mfa.code(site.base), found.variable, n_permutations=20)
            task = Task(
                [Pair("", "", "")] * len(judged), {}, {}, here, there, found.labels, found.changes, judged, accuracy,
                len(judged),
            )  # fmt: skip
            results = compare(site, task, made[layer], seeds=seeds, progress=False)
            known["sites"].append(
                {
                    "variable": name, "at": at, "layer": layer, "accuracy": accuracy, "pairs": len(judged),
                    "judged": int(judged.sum()), "carried": carried, "nmi": nmi.nmi, "nmi_null": nmi.nmi_null,
                    "results": comparison.described(results),
                }
            )  # fmt: skip
            atomic_write_json(path, known)
            print(comparison.table(results), flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all")


def draw(path: Path, figure: Path) -> None:
    """Prints the tables, and writes the figure."""
    known = json.loads(path.read_text())
    print(f"{known['processor']}, {known['threads']} threads")
    sites = []
    for told in known["sites"]:
        about = (
            f"{told['pairs']} pairs, {told['judged']} judged; {told['accuracy']:.1%} of prompts right; NMI of region "
            f"and variable {told['nmi']:.3f} (shuffled {told['nmi_null']:.3f})"
        )
        results = [Result(runs=(), **one) for one in told["results"]]
        sites.append((f"{told['variable']}, {told['at']} token, layer {told['layer']}", about, results))
    dots.told(sites, "A trained model of three layers: IIA, 95% intervals", figure)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.draw:
        draw(options.out, FIGURE)
    else:
        measure(options.out, options.seeds, options.steps)


if __name__ == "__main__":
    main()
