"""Screening against the dense fused scans and the yardstick (bench/scan_rates.py) of the same run, on a CPU.

    python -m bench.bench_screen [--threads 2] [--repeats 3] [--toy]
    python -m bench.bench_screen --only why          # what bounds from p coordinates leave, and what that costs
    python -m bench.bench_screen --curve [FOLDER]    # cost against K: screen_curve.json and screen_curve.svg

Ratios of the smallest of several times, taken in turns, so that what else the machine does weighs on all alike.
Mixtures fitted to activations of a real model (bench/activations.py), on held-out ones; 32,768 components grown from
4,096 by splitting, on the same; and, for what screening costs where it cannot help, a mixture that was never trained.
The curve is of mixtures fitted with 512 to 4,096 components, and of the last one grown by splitting up to 32,768.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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
from mfa_kernels.ops.screen import op
from mfa_kernels.ops.screen.basis import basis as choose_basis
from mfa_kernels.ops.screen.cost import DENSE_SHARE, bytes_read
from mfa_kernels.ops.screen.types import Screen, ScreenedPairs
from mfa_kernels.ops.woodbury.types import Int8Rows, Parameters

Functions: TypeAlias = "dict[str, Callable[[], object]]"
"""What is timed, by name."""

GEMM_COLUMNS = 4096 * 11
"""Columns of the product at a time: 32,768 components at once would need gigabytes."""

FITTED = (512, 1024, 2048, 4096)
GROWN = (2, 4, 8)
"""K of the curve, unless told otherwise: fitted, and how many components the last of them is split into, each."""

SECTIONS = ("small", "large", "grown", "untrained", "one")
"""What is measured unless told otherwise."""

TOKENS = 2048
OUT_OF_REACH = -1e6
"""Nats above the best logit: a scan with such a threshold bounds every component and keeps none."""

CURVE_TOKENS = 2048
CHOOSING = 256
"""Tokens that choose p; for the curve, not among those measured."""

WIDTHS = (128, 192, 256)
"""The p that are measured, beside the one chosen."""

WHY_WIDTHS = (64, 128, 192, 256, 320)
WHY_TOKENS = 256
"""Tokens whose bounds of all components are held at once."""

PRODUCTS = ("torch.mm", "oneDNN")
SLOW = (*PRODUCTS, "dense", "int8", "stage_0")
MOST_FAST, SLOW_REPEATS = 4096, 2
"""With more components than that, what is slow is repeated no more often than this: a call takes seconds."""


def smallest_times(functions: Functions, repeats: int, components: int = 0) -> dict[str, float]:
    """Seconds, the least of `repeats`, the functions taking turns; of a large mixture, the slow ones fewer times."""
    times = {name: float("inf") for name in functions}
    for turn in range(repeats + 1):  # the first round warms up, and counts when it is the fastest
        for name, function in functions.items():
            if components > MOST_FAST and name in SLOW and turn > SLOW_REPEATS:
                continue
            begin = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - begin)
    return times


class Prepared(NamedTuple):
    """A mixture with its factors, and how the scans are called on tokens x."""

    parameters: Parameters
    woodbury: Woodbury
    constants: Tensor
    threshold: float

    @classmethod
    def of(cls, mfa: MFA) -> Prepared:
        parameters, woodbury = mfa.prepared()
        threshold = activity_threshold(mfa.n_components, parameters.means.dtype)
        return cls(parameters, woodbury, woodbury.constants(parameters.log_weights), threshold)

    def dense(self, x: Tensor) -> tuple[Tensor, ...]:
        f = self.woodbury
        return cpp.library().scan(x, f.rows, self.constants, f.scale, False, self.threshold, SLOTS, False)[:4]

    def int8(self, x: Tensor) -> Functions:
        """The dense scan that begins in int8, where this processor gains by it."""
        if not self.woodbury.int8[0].numel():
            return {}
        rows = Int8Rows(*self.woodbury.int8)
        return {"int8": partial(int8.scan, x, self.woodbury, self.constants, rows, self.threshold, SLOTS)}

    def screened(self, x: Tensor, screen: Screen) -> ScreenedPairs:
        return op.scan(x, self.woodbury, self.constants, screen, self.threshold, SLOTS)

    def chosen(self, x: Tensor) -> Screen | None:
        """The screen that `mfa.screen` would choose for tokens like x."""
        found = op.choose(x, self.parameters, self.woodbury)
        assert found is None or isinstance(found, Screen)
        return found

    def screens(self, widths: Iterable[int]) -> dict[int, tuple[Screen, float]]:
        """Screens of several p on the same coordinates, and the seconds of stage 0 without their eigenproblem."""
        widths = sorted(widths)
        q = choose_basis(self.woodbury, self.parameters.log_weights.exp(), widths[-1])
        make = partial(op.screen, self.parameters, self.woodbury)
        return {kept: timed(partial(make, basis=q[:, :kept])) for kept in widths}

    def left(self, x: Tensor, screen: Screen, bars: Tensor) -> Tensor:
        """How many components have bounds that reach the bars (N, 1), (N,) float64."""
        counts = [
            (~(op.bounds(part, self.woodbury, self.constants, screen) < bar)).sum(-1)
            for part, bar in zip(x.split(WHY_TOKENS), bars.split(WHY_TOKENS))
        ]
        return torch.cat(counts).double()

    def share_of_bytes(self, found: ScreenedPairs, screen: Screen) -> Tensor:
        """Returns the share of all parameters that a token reads when it comes alone."""
        read = bytes_read(found.evaluated, self.woodbury, screen)
        return read / (self.woodbury.rows.nbytes + self.constants.nbytes)


def yardsticks_of(tokens: int, components: int, features: int, rank: int) -> Functions:
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
    kept = {name: value for name, value in times.items() if name not in PRODUCTS}
    return {"gemm": min(times[name] for name in PRODUCTS), **kept}


def measure(name: str, mfa: MFA, x: Tensor, repeats: int) -> None:
    """Prints a line for three p, and for the one that `mfa.screen` chooses."""
    count, features, rank = mfa.n_components, mfa.n_features, mfa.rank
    prepared, x = Prepared.of(mfa), x.contiguous()
    chosen = prepared.chosen(x[:CHOOSING])
    picked = 0 if chosen is None else chosen.basis.shape[1]
    screens = prepared.screens({kept for kept in (picked, *WIDTHS) if 0 < kept <= features})
    functions: Functions = {
        **yardsticks_of(len(x), count, features, rank),
        "dense": partial(prepared.dense, x),
        **prepared.int8(x),
        **{f"p={kept}": partial(prepared.screened, x, screen) for kept, (screen, _) in screens.items()},
    }
    times = with_yardstick(smallest_times(functions, repeats, count))
    log_prob, _, _, counts = prepared.dense(x)
    print(f"\n{name}: N={len(x)} K={count} D={features} R={rank}, {counts.double().mean():.2f} components active")
    for kept, (screen, seconds) in screens.items():
        found, own = prepared.screened(x, screen), times[f"p={kept}"]
        facts = {
            "of the yardstick": f"{own / times['gemm']:.4f}",
            "of the dense scan": f"{own / times['dense']:.4f}",
            "int8, of the yardstick": f"{times['int8'] / times['gemm']:.4f}" if "int8" in times else "not here",
            "yardstick ms": f"{1e3 * times['gemm']:.0f}",
            **facts_of(found),
            "log p(x) off by": f"{(found.active.log_prob - log_prob).abs().max():.1e}",
            "stage 0 ms": f"{1e3 * seconds:.0f}",
        }
        mark = ", chosen" if kept == picked else ""
        print(f"  p={kept:4d}{mark}  " + "   ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


def facts_of(found: ScreenedPairs) -> dict[str, str]:
    """How the pairs were found."""
    computed = found.evaluated[found.evaluated >= 0].double()
    return {
        "computed": f"mean {computed.mean():.2f}, median {computed.median():.0f}" if len(computed) else "none",
        "tokens by the dense scan": f"{(found.evaluated < 0).double().mean():.2%}",
        "largest certificate": f"{found.dropped.max():.1e}",
    }


def why(mfa: MFA, x: Tensor, repeats: int) -> None:
    """Prints, for several p, how many components bounds leave of tokens, and what the scan costs and which part of that
    are the projection and what is computed in full: how many coordinates are too few, and from where on more of them
    cost more than what they rule out."""
    count, features = mfa.n_components, mfa.n_features
    prepared, x = Prepared.of(mfa), x.contiguous()
    screens = prepared.screens(kept for kept in WHY_WIDTHS if kept <= features)
    bounded = prepared._replace(threshold=OUT_OF_REACH)
    functions: Functions = yardsticks_of(len(x), count, features, mfa.rank)
    for kept, (screen, _) in screens.items():
        functions[f"p={kept}"] = partial(prepared.screened, x, screen)
        functions[f"bounds, p={kept}"] = partial(bounded.screened, x, screen)
        functions[f"projection, p={kept}"] = partial(torch.mm, x, screen.basis)
    times = with_yardstick(smallest_times(functions, repeats, count))
    bars = prepared.dense(x)[2][:, :1] - prepared.threshold
    print(f"\nwhy: N={len(x)} K={count} D={features} R={mfa.rank}, components left per token")
    for kept, (screen, _) in screens.items():
        left = prepared.left(x, screen, bars)
        most, nearly = left.quantile(0.9), left.quantile(0.99)
        print(
            f"  p={kept:4d}  mean {left.mean():.1f}   median {left.median():.0f}   90% {most:.0f}   99% {nearly:.0f}   "
            f"more than K/{DENSE_SHARE} {(left > count // DENSE_SHARE).double().mean():.2%}   "
            f"of the yardstick {times[f'p={kept}'] / times['gemm']:.4f}: bounds "
            f"{times[f'bounds, p={kept}'] / times['gemm']:.4f}, of that a product with Q "
            f"{times[f'projection, p={kept}'] / times['gemm']:.4f}",
            flush=True,
        )


def one_token(name: str, mfa: MFA, x: Tensor, repeats: int) -> None:
    """Prints what a few tokens cost: time against the dense scan, and the share of all parameters that one reads."""
    prepared = Prepared.of(mfa)
    screen = prepared.chosen(x[:CHOOSING])
    if screen is None:
        print(f"\n{name}: nothing to screen")
        return
    share = prepared.share_of_bytes(prepared.screened(x[CHOOSING:], screen), screen)
    print(
        f"\n{name}: one token, K={mfa.n_components} D={mfa.n_features} R={mfa.rank} p={screen.basis.shape[1]}: reads "
        f"{share.mean():.3f} of the parameters' bytes, {share.amax():.3f} at most"
    )
    for count in (1, 2, 4, 8, 16):
        few = x[:count].contiguous()
        functions: Functions = {
            "dense": partial(prepared.dense, few),
            "screened": partial(prepared.screened, few, screen),
        }
        times = smallest_times(functions, 10 * repeats)
        print(f"  N={count:2d}  " + "   ".join(f"{key} {1e3 * value:.3f} ms" for key, value in times.items()))


def point(mfa: MFA, x: Tensor, repeats: int) -> dict[str, Any]:
    """One K of the curve, on tokens (CURVE_TOKENS + CHOOSING, D)."""
    count, features, rank = mfa.n_components, mfa.n_features, mfa.rank
    prepared = Prepared.of(mfa)
    x, sample = (part.contiguous() for part in x.split([CURVE_TOKENS, CHOOSING]))
    screen = prepared.chosen(sample)
    if screen is None:
        (screen, _), *_ = prepared.screens([op.default_features(features)]).values()
    found, one = prepared.screened(x, screen), x[:1].contiguous()
    functions: Functions = {
        **yardsticks_of(len(x), count, features, rank),
        "dense": partial(prepared.dense, x),
        **prepared.int8(x),
        "screened": partial(prepared.screened, x, screen),
        "stage_0": partial(op.refresh, screen, prepared.parameters, prepared.woodbury),
    }
    alone: Functions = {"dense": partial(prepared.dense, one), "screened": partial(prepared.screened, one, screen)}
    times = with_yardstick(smallest_times(functions, repeats, count))
    times_alone = smallest_times(alone, 10 * repeats)
    evaluated = found.evaluated
    return {
        "K": count,
        "p": screen.basis.shape[1],
        "microseconds_per_token": {key: 1e6 * value / len(x) for key, value in times.items() if key != "stage_0"},
        "of_the_gemm": {key: times[key] / times["gemm"] for key in times if key not in ("gemm", "stage_0")},
        "of_the_dense_scan": {"screened": times["screened"] / times["dense"]},
        "computed_per_token": evaluated[evaluated >= 0].double().mean().item(),
        "tokens_by_the_dense_scan": (evaluated < 0).double().mean().item(),
        "stage_0_ms": 1e3 * times["stage_0"],
        "stage_0_in_tokens_of_the_dense_scan": times["stage_0"] / times["dense"] * len(x),
        "one_token_ms": {key: 1e3 * value for key, value in times_alone.items()},
        "one_token_share_of_bytes": prepared.share_of_bytes(found, screen).mean().item(),
    }


def curve(found: Real | Toy, options: argparse.Namespace) -> None:
    """Writes screen_curve.json and screen_curve.svg; screen_curve_toy with --toy."""
    points = []
    x = found.split()[1][: CURVE_TOKENS + CHOOSING]

    def add(mfa: MFA) -> None:
        points.append(point(mfa, x, options.repeats))
        print(json.dumps(points[-1]), flush=True)
        gc.collect()  # gigabytes, before the next one is made

    for count in options.fitted:
        largest = found.mixture(count)
        add(largest)
    for children in options.grown:
        add(split(largest, children))
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
        "screened": "screened",
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


def of_many(found: Real | Toy, options: argparse.Namespace) -> None:
    """The sections on mixtures of many components."""
    mfa, x = found.mixture(4096), found.split()[1][:TOKENS]
    if "one" in options.only:
        one_token("fitted", mfa, x[:1024].contiguous(), options.repeats)
    if "large" in options.only:
        measure("fitted", mfa, x, options.repeats)
    if "why" in options.only:
        for own in (found.mixture(512), mfa):
            why(own, x, options.repeats)
    if {"grown", "why"} & set(options.only):
        mfa = split(mfa, 8)
        if "grown" in options.only:
            measure("grown by splitting", mfa, x, options.repeats)
        if "why" in options.only:
            why(mfa, x, options.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    figures = Path(__file__).parent / "figures"
    parser.add_argument("--curve", type=Path, nargs="?", const=figures, metavar="FOLDER", help="cost against K alone")
    parser.add_argument("--fitted", type=int, nargs="+", default=FITTED, metavar="K", help="of the curve")
    parser.add_argument("--grown", type=int, nargs="*", default=GROWN, metavar="CHILDREN", help="of the curve")
    parser.add_argument("--only", nargs="*", default=SECTIONS, choices=[*SECTIONS, "why"])
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
        if {"large", "grown", "one", "why"} & set(options.only):
            of_many(activations.chosen(options, 768), options)
        if "untrained" in options.only:
            measure("untrained", MFA(1024, 768, 10), torch.randn(TOKENS, 768), options.repeats)


if __name__ == "__main__":
    main()
