"""Screening against the dense fused scans and the yardstick (bench/scan_rates.py) of the same run, on a CPU.

    python -m bench.bench_screen [--threads 2] [--repeats 3] [--toy]
    python -m bench.bench_screen --curve [FOLDER]    # cost against K: screen_curve.json and screen_curve.svg

Ratios of the smallest of several times, taken in turns, so that what else the machine does weighs on all three alike.
Mixtures fitted to activations of a real model (bench/activations.py); 32,768 components grown from 4,096 by splitting;
and, for what screening costs where it cannot help, one that was never trained. The curve is of mixtures fitted with 512
to 4,096 components, on held-out activations, and of the last one grown by splitting up to 32,768, on tokens drawn from
it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import activations
from bench.activations import Toy
from bench.real import Real
from bench.screen_survivors import split
from mfa_kernels import MFA
from mfa_kernels.commands.demo import timed
from mfa_kernels.ops import Woodbury
from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.common.products import yardsticks
from mfa_kernels.ops.scan import int8
from mfa_kernels.ops.scan.types import SLOTS, activity_threshold
from mfa_kernels.ops.screen import neighbors as lists
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.screen.cost import bytes_read
from mfa_kernels.ops.screen.types import Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Int8Rows

GEMM_COLUMNS = 4096 * 11
"""Columns of the product at a time: 32,768 components at once would need gigabytes."""

FITTED = (512, 1024, 2048, 4096)
GROWN = (2, 4, 8)
"""K of the curve, unless told otherwise: fitted, and how many components the last of them is split into, each."""

CURVE_TOKENS = 1024
CHOOSING = 256
"""Tokens that choose p for the curve, not among those measured."""


def smallest_times(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds, the least of `repeats`, the functions taking turns."""
    times = {name: float("inf") for name in functions}
    for _ in range(repeats + 1):  # the first round warms up, and counts when it is the fastest
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - begin)
    return times


class Prepared(NamedTuple):
    """A mixture with its factors, and how the scans are called on tokens x."""

    parameters: tuple[Tensor, Tensor, Tensor, Tensor]
    woodbury: Woodbury
    constants: Tensor
    threshold: float

    @classmethod
    def of(cls, mfa: MFA) -> Prepared:
        means, loadings, noise, log_weights = (p.detach() for p in mfa.parameters_in_compute_dtype())
        woodbury = mfa.woodbury()
        threshold = activity_threshold(mfa.n_components, means.dtype)
        return cls((means, loadings, noise, log_weights), woodbury, woodbury.constants(log_weights), threshold)

    def dense(self, x: Tensor) -> tuple[Tensor, ...]:
        f = self.woodbury
        return cpp.library().scan(x, f.rows, self.constants, f.scale, False, self.threshold, SLOTS, False)[:4]

    def int8(self, x: Tensor) -> dict[str, Callable[[], object]]:
        """The dense scan that begins in int8, where this processor gains by it."""
        if not self.woodbury.int8[0].numel():
            return {}
        rows = Int8Rows(*self.woodbury.int8)
        return {"int8": partial(int8.scan, x, self.woodbury, self.constants, rows, self.threshold, SLOTS)}

    def screened(self, x: Tensor, screen: Screen) -> ScreenedPairs:
        return op.scan(x, self.woodbury, self.constants, screen, self.threshold, SLOTS)

    def listed(self, screen: Screen) -> Screen:
        """The same with lists of neighbors."""
        return op.with_neighbors(screen, self.parameters, self.woodbury)

    def lines_left(self, x: Tensor, found: ScreenedPairs, screen: Screen) -> Tensor:
        """Share of the components whose marginal bound a token needs."""
        return op.lines_left(x, self.woodbury, self.constants, screen, found.active.logits[:, 0] - self.threshold)

    def not_listed(self, x: Tensor, screen: Screen) -> float:
        """Share of the tokens that are farther from their component than its list of neighbors goes."""
        assert screen.neighbors is not None
        best = self.screened(x, screen).active
        component = best.components[:, 0].long()
        distance = (2 * (self.constants[component] - best.logits[:, 0])).clamp_min(0).sqrt()
        return (distance >= screen.neighbors.horizons[component]).double().mean().item()

    def share_of_bytes(self, x: Tensor, found: ScreenedPairs, screen: Screen) -> Tensor:
        """Returns the share of all parameters that a token reads when it comes alone."""
        read = bytes_read(found.evaluated, self.woodbury, screen, self.lines_left(x, found, screen))
        return read / (self.woodbury.rows.nbytes + self.constants.nbytes)


def yardsticks_of(tokens: int, components: int, features: int, rank: int) -> dict[str, Callable[[], object]]:
    """The product [N, D] x [D, K (R + 1)], a part of the columns at a time, by torch.mm and by oneDNN."""
    columns = components * (rank + 1)
    chunks = -(-columns // GEMM_COLUMNS)

    def repeated(product: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(chunks):
                product()

        return run

    return {name: repeated(run) for name, run in yardsticks(tokens, columns // chunks, features).items()}


def with_yardstick(times: dict[str, float]) -> dict[str, float]:
    """The times, with that of the faster product as "gemm" in place of both."""
    products = ("torch.mm", "oneDNN")
    kept = {name: value for name, value in times.items() if name not in products}
    return {"gemm": min(times[name] for name in products), **kept}


def measure(name: str, mfa: MFA, x: Tensor, repeats: int) -> None:
    """Prints a line for three p, and for the one that `mfa.screen` chooses; of a large mixture for one alone."""
    count, features, rank = mfa.n_components, mfa.n_features, mfa.rank
    prepared = Prepared.of(mfa)
    woodbury = prepared.woodbury
    products, dense = yardsticks_of(len(x), count, features, rank), partial(prepared.dense, x)

    log_prob, _, _, counts = dense()
    print(f"\n{name}: N={len(x)} K={count} D={features} R={rank}, {counts.double().mean():.2f} components active")
    widths = {op.default_features(features), -(-features // 192) * 16, -(-features // 64) * 16}
    if (chosen := op.choose(x[:CHOOSING], prepared.parameters, woodbury)) is not None:  # as `mfa.screen` does
        widths.add(chosen.basis.shape[1])
    for kept in [lists.FEATURES] if count > 2 * lists.AT_ONCE else sorted(widths):
        screen, seconds = timed(lambda: op.screen(prepared.parameters, woodbury, kept))  # noqa: B023
        basis = screen.basis
        _, again = timed(lambda: op.screen(prepared.parameters, woodbury, basis=basis))  # noqa: B023
        screened = partial(prepared.screened, x, screen)
        listed, seconds_listed = timed(lambda: prepared.listed(screen))  # noqa: B023
        by_lists = partial(prepared.screened, x, listed)
        found = screened()
        functions = {**products, "dense": dense, **prepared.int8(x), "screened": screened, "lists": by_lists}
        times = with_yardstick(smallest_times(functions, repeats))
        left = prepared.lines_left(x, found, screen)
        computed = found.evaluated[found.evaluated >= 0].double()
        saved = (times["screened"] - times["lists"]) / len(x)
        facts = {
            "of the yardstick": f"{times['screened'] / times['gemm']:.4f}, {times['lists'] / times['gemm']:.4f}",
            "of the dense scan": f"{times['screened'] / times['dense']:.3f}, {times['lists'] / times['dense']:.4f}",
            "lists": f"{seconds_listed:.2f} s, paid by {seconds_listed / saved / count:.0f} K rows"
            if saved > 0
            else "lose",
            "lists leave": f"{prepared.not_listed(x, listed):.1%}",
            "dense, of the yardstick": f"{times['dense'] / times['gemm']:.2f}",
            "int8": f"{times['int8'] / times['gemm']:.2f}" if "int8" in times else "not here",
            "yardstick ms": f"{1e3 * times['gemm']:.0f}",
            "marginal bounds left": f"{left.mean():.2%}",
            "computed, mean": f"{computed.mean():.2f}",
            "tokens by the dense scan": f"{(found.evaluated < 0).double().mean():.2%}",
            "largest certificate": f"{found.dropped.max():.1e}",
            "log p(x) off by": f"{(found.active.log_prob - log_prob).abs().max():.1e}, "
            f"{(by_lists().active.log_prob - log_prob).abs().max():.1e}",
            "stage 0 ms": f"{1e3 * seconds:.0f}, {1e3 * again:.0f} with its basis",
        }
        print(f"  p={kept:4d}  " + "   ".join(f"{key} {value}" for key, value in facts.items()))


def one_token(name: str, mfa: MFA, x: Tensor, repeats: int) -> None:
    """Prints what a few tokens cost: time against the dense scan, and the share of all parameters that one reads."""
    prepared = Prepared.of(mfa)
    screen = op.choose(x[:CHOOSING], prepared.parameters, prepared.woodbury, lists.FEATURES)
    if screen is None:
        print(f"\n{name}: nothing to screen")
        return
    share = prepared.share_of_bytes(x[CHOOSING:], prepared.screened(x[CHOOSING:], screen), screen)
    print(
        f"\n{name}: one token, K={mfa.n_components} D={mfa.n_features} R={mfa.rank} p={screen.basis.shape[1]}: reads "
        f"{share.mean():.3f} of the parameters' bytes, {share.amax():.3f} at most"
    )
    listed = prepared.listed(screen)
    for count in (1, 2, 4, 8, 16):
        few = x[:count].contiguous()
        functions = {
            "dense": partial(prepared.dense, few),
            "screened": partial(prepared.screened, few, screen),
            "lists": partial(prepared.screened, few, listed),
        }
        times = smallest_times(functions, 10 * repeats)
        print(f"  N={count:2d}  " + "   ".join(f"{key} {1e3 * value:.3f} ms" for key, value in times.items()))


def point(mfa: MFA, x: Tensor, repeats: int) -> dict[str, Any]:
    """One K of the curve, on tokens (CURVE_TOKENS + CHOOSING, D)."""
    count, features, rank = mfa.n_components, mfa.n_features, mfa.rank
    prepared = Prepared.of(mfa)
    x, sample = (part.contiguous() for part in x.split([CURVE_TOKENS, CHOOSING]))
    screen = op.choose(sample, prepared.parameters, prepared.woodbury, lists.FEATURES)
    if screen is None:
        screen = op.screen(prepared.parameters, prepared.woodbury)
    kept = screen.basis.shape[1]
    listed, list_seconds = timed(lambda: prepared.listed(screen))
    one, found = x[:1].contiguous(), prepared.screened(x, screen)
    evaluated, left = found.evaluated, prepared.lines_left(x, found, screen)
    functions = {
        **yardsticks_of(len(x), count, features, rank),
        "dense": partial(prepared.dense, x),
        **prepared.int8(x),
        "screened": partial(prepared.screened, x, screen),
        "lists": partial(prepared.screened, x, listed),
        "stage_0": partial(op.refresh, screen, prepared.parameters, prepared.woodbury),
    }
    alone = {
        "dense": partial(prepared.dense, one),
        "screened": partial(prepared.screened, one, screen),
        "lists": partial(prepared.screened, one, listed),
    }
    times, times_alone = with_yardstick(smallest_times(functions, repeats)), smallest_times(alone, 10 * repeats)
    screened = evaluated[evaluated >= 0].double()
    return {
        "K": count,
        "p": kept,
        "microseconds_per_token": {key: 1e6 * value / len(x) for key, value in times.items() if key != "stage_0"},
        "of_the_gemm": {key: times[key] / times["gemm"] for key in times if key not in ("gemm", "stage_0")},
        "of_the_dense_scan": {key: times[key] / times["dense"] for key in ("screened", "lists")},
        "list_seconds": list_seconds,
        "tokens_beyond_their_list": prepared.not_listed(x, listed),
        "lines_left": left.mean().item(),
        "batches_by_lines": screen.batches_by_lines,
        "computed_per_token": screened.mean().item(),
        "tokens_by_the_dense_scan": (evaluated < 0).double().mean().item(),
        "stage_0_ms": 1e3 * times["stage_0"],
        "stage_0_in_tokens_of_the_dense_scan": times["stage_0"] / times["dense"] * len(x),
        "one_token_ms": {key: 1e3 * value for key, value in times_alone.items()},
        "one_token_share_of_bytes": prepared.share_of_bytes(x, found, screen).mean().item(),
    }


def curve(found: Real | Toy, options: argparse.Namespace) -> None:
    """Writes screen_curve.json and screen_curve.svg; screen_curve_toy with --toy."""
    points = []

    def add(mfa: MFA, x: Tensor) -> None:
        points.append(point(mfa, x, options.repeats))
        print(json.dumps(points[-1]), flush=True)
        gc.collect()  # gigabytes, before the next one is made

    tokens = CURVE_TOKENS + CHOOSING
    held = found.split()[1]
    for count in options.fitted:
        largest = found.mixture(count)
        add(largest, held[:tokens])
    for children in options.grown:
        grown = split(largest, children)
        add(grown, grown.sample(tokens, generator=torch.Generator().manual_seed(1)))
        del grown
    of_all = {
        "D": largest.n_features,
        "R": largest.rank,
        "fitted up to": options.fitted[-1],
        "N": CURVE_TOKENS,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    path = options.curve / ("screen_curve_toy" if options.toy else "screen_curve")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**of_all, "points": points}, indent=1) + "\n")
    draw(of_all, points, path.with_suffix(".svg"))


def draw(of_all: dict[str, Any], points: list[dict[str, Any]], path: Path) -> None:
    """Microseconds of a token against K, among others and alone; the same points give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = [p["K"] for p in points]
    names = {
        "gemm": "yardstick",
        "dense": "dense scan in float32",
        "int8": "dense scan, int8 first",
        "screened": "every component bounded",
        "lists": "lists of neighbors",
    }
    with plt.rc_context({"svg.hashsalt": "mfa_kernels", "svg.fonttype": "none", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharex=True)
        for axes, key, scale, label in (
            (left, "microseconds_per_token", 1, f"microseconds per token of {of_all['N']}"),
            (right, "one_token_ms", 1e3, "microseconds for one token alone"),
        ):
            for i, (name, title) in enumerate(names.items()):
                if name in points[0][key]:
                    values = [scale * p[key][name] for p in points]
                    axes.plot(counts, values, marker="o", ms=3, label=title, color=f"C{i}")
            axes.axvline(of_all["fitted up to"] * 2**0.5, color="0.7", lw=0.8, ls=":")
            axes.set_ylabel(label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("K, components (right of the dots: grown by splitting)")
            axes.grid(alpha=0.3)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(f"D={of_all['D']}, R={of_all['R']}, {of_all['threads']} threads")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    figures = Path(__file__).parent / "figures"
    parser.add_argument("--curve", type=Path, nargs="?", const=figures, metavar="FOLDER", help="cost against K alone")
    parser.add_argument("--fitted", type=int, nargs="+", default=FITTED, metavar="K", help="of the curve")
    parser.add_argument("--grown", type=int, nargs="*", default=GROWN, metavar="CHILDREN", help="of the curve")
    parser.add_argument("--only", nargs="*", default=["small", "large", "grown", "untrained", "one"])
    activations.add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        if options.curve:
            curve(activations.chosen(options, 768), options)
            return
        if "small" in options.only:
            found = activations.chosen(options)
            measure("fitted", found.mixture(512), found.split()[1][:4096], options.repeats)
        if {"large", "grown", "one"} & set(options.only):
            found = activations.chosen(options, 768)
            mfa, x = found.mixture(4096), found.split()[1]
            if "one" in options.only:
                one_token("fitted", mfa, x[:1024].contiguous(), options.repeats)
            if "large" in options.only:
                measure("fitted", mfa, x[:2048].contiguous(), options.repeats)
            if "grown" in options.only:
                mfa = split(mfa, 8)
                x = mfa.sample(512, generator=torch.Generator().manual_seed(1))
                measure("grown by splitting", mfa, x, options.repeats)
        if "untrained" in options.only:
            mfa = MFA(1024, 768, 10)
            measure("untrained", mfa, torch.randn(2048, 768), options.repeats)


if __name__ == "__main__":
    main()
