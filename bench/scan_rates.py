"""log p(x) and the training step against the yardstick: the faster of torch.mm and oneDNN's linear for the product
[N, D] x [D, K (R + 1)], which any formulation by matrix products takes.

    python -m bench.scan_rates [--rounds 21] [--threads 2]     # mixtures with near one-hot responsibilities
    python -m bench.scan_rates --real                          # fitted to activations of a real model
    python -m bench.scan_rates --bounds 100000000              # bounds of the int8 level against float64

Medians of rounds in which everything takes its turn, so that what else the machine does weighs on all alike. The step
is `loss = mfa(x); loss.backward()` with gradients for all parameters, stage 0 included. "float32" is without the int8
level. In a diffuse mixture every component is active for every token.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench import activations, baselines
from mfa_kernels import MFA, ops
from mfa_kernels.commands.rates import processor
from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.common.products import yardsticks
from mfa_kernels.ops.scan import int8
from mfa_kernels.ops.scan.types import SLOTS, activity_threshold
from mfa_kernels.ops.woodbury import int8 as stage_0
from mfa_kernels.ops.woodbury.types import Int8Rows

Functions = dict[str, Callable[[], object]]


def medians(functions: Functions, rounds: int) -> dict[str, float]:
    """Seconds; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@contextmanager
def without_int8() -> Iterator[None]:
    """Stage 0 makes no rows in int8, so that everything after it takes the scan in float32."""
    pays, stage_0.pays = stage_0.pays, lambda woodbury: False
    try:
        yield
    finally:
        stage_0.pays = pays


class Work:
    """What is timed of a mixture on tokens x."""

    def __init__(self, mfa: MFA, x: Tensor) -> None:
        self.mfa, self.x = mfa, x
        self.parameters = [p.detach() for p in mfa.parameters_in_compute_dtype()]
        self.woodbury = ops.factorize(*self.parameters[:3], mfa.center)
        self.bare = dataclasses.replace(self.woodbury, int8=())

    def factors(self) -> None:
        ops.factorize(*self.parameters[:3], self.mfa.center)

    @torch.no_grad()
    def log_prob(self) -> None:
        ops.log_prob(self.x, *self.parameters, self.woodbury)

    @torch.no_grad()
    def log_prob_float32(self) -> None:
        ops.log_prob(self.x, *self.parameters, self.bare)

    def step(self) -> None:
        self.mfa.zero_grad()
        self.mfa.refresh()  # an optimiser would have changed the parameters: stage 0 counts
        self.mfa(self.x).backward()

    def step_float32(self) -> None:
        with without_int8():
            self.step()

    def scans(self) -> Functions:
        return {"log_prob": self.log_prob, "log_prob, float32": self.log_prob_float32}

    def steps(self) -> Functions:
        return {"factors": self.factors, "step": self.step, "step, float32": self.step_float32}

    def candidates(self) -> str:
        """How many logits the int8 level leaves of a token, and how many tokens take the scan in float32."""
        constants = self.woodbury.constants(self.parameters[3])
        threshold = activity_threshold(len(constants), constants.dtype)
        rows = Int8Rows(*self.woodbury.int8)
        _, _, whole = int8.scan(self.x, self.woodbury, constants, rows, threshold, SLOTS)
        low, high = int8.bounds(self.x, self.woodbury, constants, rows)
        left = (high >= low.amax(-1, keepdim=True) - threshold).sum(-1).double()
        owner = low.argmax(-1, keepdim=True)
        width = (high.gather(1, owner) - low.gather(1, owner)).median()
        return (
            f"{left.mean():.2f} candidates a token, {left.median():.0f} in the median, {left.quantile(0.99):.0f} at 99%"
            f"; {whole} of {len(self.x)} tokens take the scan in float32; a bound of the best is {width:.1f} nats wide"
        )


def diffuse(components: int, features: int, rank: int) -> MFA:
    mfa = MFA(components, features, rank)
    with torch.no_grad():
        mfa.means.mul_(0.01)
    return mfa


def row(name: str, shape: tuple[int, int, int, int], functions: Functions, rounds: int) -> None:
    tokens, components, features, rank = shape
    products = yardsticks(tokens, components * (rank + 1), features)
    times = medians({**products, **functions}, rounds)
    floor = min(times[name] for name in products)
    rate = 2 * tokens * components * features * (rank + 1) / floor / 1e9
    cells = [f"{value / floor:.2f}" for name, value in times.items()]
    title = f"{name} N={tokens} K={components} D={features} R={rank}"
    print(f"| {title} | {1e3 * floor:.0f} ms, {rate:.0f} GFLOP/s | " + " | ".join(cells) + " |", flush=True)


def header(names: list[str]) -> None:
    print("\n| time / yardstick | yardstick | " + " | ".join(["torch.mm", "oneDNN", *names]) + " |")
    print("|" + "---|" * (len(names) + 4), flush=True)


def planted(rounds: int) -> None:
    for number, shape in enumerate(baselines.SHAPES.values()):
        x, (means, loadings, noise, log_weights) = baselines.problem(shape)
        work = Work(MFA.from_parameters(means, loadings, noise, log_weights.exp()), x)
        crowded = Work(diffuse(*shape[1:]), torch.randn(*shape[::2], generator=torch.Generator().manual_seed(0)))
        functions = {
            **work.scans(), **work.steps(),
            "diffuse log_prob": crowded.log_prob, "the same, float32": crowded.log_prob_float32,
            "diffuse step": crowded.step,
        }  # fmt: skip
        if number == 0:
            header(list(functions))
        row("planted", shape, functions, rounds)


def real(options: argparse.Namespace) -> None:
    lines = []
    for number, (components, tokens) in enumerate(((512, 4096), (4096, 2048))):
        found = activations.chosen(options)
        mfa, held = found.mixture(components), found.split()[1]
        x = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:tokens]].contiguous()
        work = Work(mfa, x)
        functions = {**work.scans(), **work.steps()}
        if number == 0:
            header(list(functions))
        row("fitted", (tokens, components, mfa.n_features, mfa.rank), functions, options.rounds)
        lines.append(f"K={components}: {work.candidates()}" if work.woodbury.int8[0].numel() else "no int8 level here")
    print("\n" + "\n".join(lines))


@torch.no_grad()
def bounds(options: argparse.Namespace) -> None:
    """Counts bounds that the logits of the float32 rows, in float64, are outside of; held-out tokens first."""
    found = activations.chosen(options)
    mfa = found.mixture(512)
    fitted, held = found.split()[:2]
    x = torch.cat([held, fitted[: max(0, options.bounds // (2 * mfa.n_components) - len(held))]])
    parameters = [p.detach() for p in mfa.parameters_in_compute_dtype()]
    woodbury = ops.factorize(*parameters[:3], mfa.center)
    constants, rows = woodbury.constants(parameters[3]), stage_0.int8_rows(woodbury)
    unpacked = ops.woodbury.types.unpack_rows(woodbury.rows, mfa.n_features).double()
    means, a, scale = unpacked[:, 0], unpacked[:, 1:], woodbury.scale.double()
    seen = outside = 0
    closest = math.inf
    for own in x.split(512):
        low, high = int8.bounds(own.contiguous(), woodbury, constants, rows)
        logits = torch.empty(low.shape, dtype=torch.float64)
        for k in range(mfa.n_components):
            v = (own.double() - means[k]) * scale
            logits[:, k] = constants[k].double() - 0.5 * (v.square().sum(-1) - (v @ a[k].T).square().sum(-1))
        outside += int((logits < low).sum()) + int((logits > high).sum())
        room = torch.minimum(high - logits, logits - low) / (high - low)
        closest = min(closest, room.amin().item())
        seen += 2 * low.numel()
    print(f"{seen:,} bounds, {outside} violated; the closest keeps {closest:.1%} of its width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--real", action="store_true", help="mixtures fitted to activations of a real model")
    parser.add_argument("--bounds", type=int, metavar="COUNT", help="check so many bounds instead of timing")
    activations.add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{processor()}, torch {torch.__version__}, {cpp.library().vector_bytes}-byte vectors")
    if options.bounds:
        bounds(options)
    elif options.real:
        real(options)
    else:
        planted(options.rounds)


if __name__ == "__main__":
    main()
