"""Cases to measure, the most important first. Each case returns what it found, a flat dictionary for the JSON file."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.gpu import first, problems
from bench.gpu.harness import Bench, Case, Results, Timing
from bench.gpu.problems import GEMMA, LLAMA, RELATIVE_ERROR, TOKENS, Problem, shape
from bench.gpu.watch import profiled
from mfa_kernels import kmeans, ops
from mfa_kernels.ops.kmeans.op import cluster_sums, nearest
from mfa_kernels.ops.kmeans.types import ClusterSums
from mfa_kernels.ops.scan.types import activity_threshold
from mfa_kernels.ops.screen import op as screening
from mfa_kernels.ops.screen.basis import basis
from mfa_kernels.ops.statistics.op import SufficientStatistics, accumulate, expectation
from mfa_kernels.steering import Offset, Toward
from mfa_kernels.steering.apply import Program


def _timed(timing: Timing, tokens: int) -> dict[str, Any]:
    return {
        "ms": 1e3 * timing.median, "ms_fastest": 1e3 * timing.fastest, "ms_slowest": 1e3 * timing.slowest,
        "repeats": timing.repeats, "tokens_per_s": tokens / timing.median,
    }  # fmt: skip


def _of_matmul(results: Results, flops: int, seconds: float) -> dict[str, Any]:
    rate = flops / seconds / 1e12
    ceiling = results.get("ceilings", {}).get("bf16_tflops")
    return {"tflops": rate, **({"percent_of_bf16_matmul": 100 * rate / ceiling} if ceiling else {})}


# log p(x) and the training step


def scan(bench: Bench, results: Results, folder: Path, components: int, features: int, precision: str = "exact"):
    """mfa.log_prob(x), stage 0 cached."""
    sizes = shape(bench, components, features)
    problem = problems.make(bench, sizes, precision=precision)
    mfa = problem.mfa
    with torch.no_grad():
        found = _checked(problem, precision)
        timing = bench.median(lambda i: mfa.log_prob(problem.batches[i]))
        found |= _timed(timing, sizes.tokens) | _of_matmul(results, sizes.scan_flops, timing.median)
        found["temporaries_mb"] = bench.peak(lambda i: mfa.log_prob(problem.batches[i])) / 1e6
        counts = mfa.active_pairs(problem.batches[0]).counts
        found["active_per_token"] = counts.double().mean().item()

        def stage_0(i: int) -> None:
            mfa.refresh()
            mfa.woodbury()

        found["factors_ms"] = 1e3 * bench.median(stage_0, 0.5).median
    return found


def _checked(problem: Problem, precision: str) -> dict[str, Any]:
    """The error on a few tokens of a batch; raises where it is not that of the policy."""
    x = problem.batches[0]
    found, truth = problem.mfa.log_prob(x)[:4].double(), problems.log_prob_fp64(problem, x[:4])
    error = float(((found - truth).abs() / truth.abs()).max())
    if precision == "exact" and not error < RELATIVE_ERROR:
        raise AssertionError(f"log p(x) is off by {error:.1e} of itself: {found.tolist()} for {truth.tolist()}")
    return {"relative_error": error, "error_nats": float((found - truth).abs().max())}


def screened_scan(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """The scan through the bounds of p coordinates, over the dense scan of the same tokens; for several p."""
    sizes = shape(bench, components, features)
    problem = problems.make(bench, sizes, decay=1.0)
    parameters, woodbury = problem.parameters(), problem.mfa.woodbury()
    on_gpu = woodbury.scan[0].numel() > 0  # or in the interpreter
    if not on_gpu and not woodbury.is_cpp:
        return {"skipped": "neither C++ nor Triton kernels here"}
    batches = problem.batches if on_gpu else [x.to(woodbury.scale) for x in problem.batches]
    constants = woodbury.constants(parameters[3])
    threshold = activity_threshold(sizes.components, woodbury.scale.dtype)
    with torch.no_grad():
        timing = bench.median(lambda i: problem.mfa.log_prob(batches[i]))
        found = {"dense_ms": 1e3 * timing.median}
        wanted = problem.mfa.log_prob(batches[0])
        widths = sorted({max(16, sizes.features // share) for share in (32, 16, 8)})
        q = basis(woodbury, parameters[3].exp(), widths[-1])
        for kept in widths:
            own = q[:, :kept]
            if on_gpu:
                from mfa_kernels.ops.screen import triton_screen

                scan = triton_screen.scan

                def prepare(i: int, own: Tensor = own) -> Any:
                    return triton_screen.screen(*parameters[:3], woodbury, own)
            else:
                scan = screening.scan

                def prepare(i: int, own: Tensor = own) -> Any:
                    return screening.screen(parameters, woodbury, basis=own)

            screen = prepare(0)
            found[f"p{kept}_screen_ms"] = 1e3 * bench.median(prepare, 0.5).median
            active, dropped, evaluated = scan(batches[0], woodbury, constants, screen, threshold, 16)
            error = float(((active.log_prob - wanted).abs() / wanted.abs()).max())
            if not error < 2 * RELATIVE_ERROR or not bool((dropped <= 2e-7).all()):
                raise AssertionError(f"p={kept}: off by {error:.1e} of the dense scan, dropped {float(dropped.max())}")
            timing = bench.median(
                lambda i, s=screen, scan=scan: scan(batches[i], woodbury, constants, s, threshold, 16)
            )
            kept_few = evaluated > 0
            found[f"p{kept}_ms"] = 1e3 * timing.median
            found[f"p{kept}_of_dense"] = 1e3 * timing.median / found["dense_ms"]
            found[f"p{kept}_evaluated"] = evaluated[kept_few].double().mean().item()
            found[f"p{kept}_took_the_dense_scan"] = 1 - kept_few.double().mean().item()
    return found


def step(bench: Bench, results: Results, folder: Path, components: int, features: int, diffuse: bool = False):
    """loss = mfa(x); loss.backward(), stage 0 and the gradients of all parameters included."""
    sizes = shape(bench, components, features)
    if diffuse and not bench.rehearsal:
        sizes = sizes._replace(tokens=4096)
    problem = problems.make(bench, sizes, diffuse=diffuse)
    mfa = problem.mfa

    def train(i: int) -> None:
        mfa.zero_grad(set_to_none=True)
        mfa.refresh()  # an optimiser would have changed the parameters
        mfa(problem.batches[i]).backward()

    timing = bench.median(train)
    if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mfa.parameters()):
        raise AssertionError("a gradient is missing or not finite")
    gradients = sum(p.grad.nbytes for p in mfa.parameters())
    found = _timed(timing, sizes.tokens) | _of_matmul(results, sizes.scan_flops, timing.median)
    found["gradients_mb"] = gradients / 1e6
    found["profile"] = profiled(bench, train)
    mfa.zero_grad(set_to_none=True)
    found["peak_mb"] = bench.peak(train) / 1e6
    scanned = results.get(_name("scan", components, features), {}).get("ms")
    if scanned and not diffuse:
        found["ratio_to_scan"] = found["ms"] / scanned
    return found


def few_tokens(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """1, 4 and 16 tokens against all components: the cost of steering; of rows that are larger than the cache."""
    sizes = shape(bench, components, features, tokens=16)
    problem = problems.make(bench, sizes)
    mfa, found = problem.mfa, {}
    bandwidth = results.get("ceilings", {}).get("copy_gb_per_s")
    with torch.no_grad():
        found |= _checked(problem, "exact")
        for count in (1, 4, 16):
            batches = [x[:count].clone() for x in problem.batches]
            timing = bench.median(lambda i, batches=batches: mfa.log_prob(batches[i]), 0.5)
            found[f"n{count}_us"] = 1e6 * timing.median
            try:
                timing = bench.graph(lambda i, batches=batches: mfa.log_prob(batches[i]))
            except RuntimeError as error:
                found[f"n{count}_graph"] = f"not captured: {str(error).splitlines()[0]}"
            else:
                found[f"n{count}_graph_us"] = 1e6 * timing.median
            # Of the rows in half precision: a path that reads them in float32 reaches half of the ceiling at most.
            rate = sizes.row_bytes / timing.median / 1e9
            found[f"n{count}_gb_per_s"] = rate
            if bandwidth and sizes.row_bytes > 2 * bench.cache_bytes:
                found[f"n{count}_percent_of_copy"] = 100 * rate / bandwidth
    return found


def steered_step(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """A decode step of an 8B-shaped model (its matrix products, batch 1, bfloat16), steered in the middle or not."""
    problem = problems.make(bench, shape(bench, components, features, tokens=16))
    width = problem.mfa.n_features
    layers = 2 if bench.rehearsal else 32
    sizes = ((width, 3 * width // 2), (width, width), (width, 7 * width), (7 * width // 2, width))  # Llama-3.1-8B's
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": bench.device}
    weights = [[torch.randn(m, n, **like) for m, n in sizes] for _ in range(layers)]  # zeros would take less time
    inputs = [torch.randn(1, m, **like) for m, _ in sizes]
    hidden = [x[:1].unsqueeze(0).clone() for x in problem.batches]
    toward = [(Toward(3, 0.4), Offset(3, [1.0] * problem.mfa.rank))]
    ways: dict[str, Program | None] = {
        "unsteered": None,
        "fixed": Program(problem.mfa, toward, bench.device),
        "gated": Program(problem.mfa, toward, bench.device, gate=(3, 0.5)),
    }

    def decode(program: Program | None) -> Callable[[int], Any]:
        def call(i: int) -> None:
            for index, layer in enumerate(weights):
                for x, weight in zip(inputs, layer):
                    x @ weight
                if program is not None and index == layers // 2:
                    program(hidden[i], True, (0,))

        return call

    found: dict[str, Any] = {}
    with torch.no_grad():
        found["profile"] = profiled(bench, lambda i: ways["gated"](hidden[i], True, (0,)))
        for name, program in ways.items():
            found[f"{name}_ms"] = 1e3 * bench.median(decode(program), 1.0).median
            if not bench.rehearsal:
                try:
                    found[f"{name}_graph_ms"] = 1e3 * bench.graph(decode(program)).median
                except RuntimeError as error:
                    found[f"{name}_graph"] = f"not captured: {str(error).splitlines()[0]}"
    for name in ("fixed", "gated"):
        for clock in ("ms", "graph_ms"):
            if f"{name}_{clock}" in found and f"unsteered_{clock}" in found:
                found[f"{name}_{clock}_percent"] = 100 * (found[f"{name}_{clock}"] / found[f"unsteered_{clock}"] - 1)
    return found


@torch.no_grad()
def candidates(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """What the bounds of fp16 leave: candidates of a token, crowded tokens, and the bound of the best logit in nats."""
    from mfa_kernels.ops.common import configs, triton_tokens
    from mfa_kernels.ops.scan import triton_merge, triton_pipeline, triton_scan
    from mfa_kernels.ops.woodbury.types import ScanRows

    problem = problems.make(bench, shape(bench, components, features))
    woodbury = problem.mfa.woodbury()
    if not woodbury.scan or not woodbury.scan[0].numel():
        return {"skipped": "no Triton kernels here"}
    constants, rows, x = woodbury.constants(problem.parameters()[3]), ScanRows(*woodbury.scan), problem.batches[0]
    tokens = triton_tokens.scan_tokens(x, woodbury.scale, woodbury.center, rows.rows.shape[-1], False)
    config = configs.configured(configs.Scan, x, len(x), components)
    partials = triton_scan.scan_tiles(tokens, rows, constants, config, bounds=True)
    kept, crowded = triton_merge.candidates(partials, tokens.norms, components, triton_pipeline.CANDIDATES)
    bound = ((partials.upper[..., 0].amax(-1) - partials.lower.amax(-1)) / 2).double()
    counts = (kept >= 0).sum(-1)[crowded == 0].double()
    return {
        "candidates_per_token": counts.mean().item(), "candidates_most": counts.max().item(),
        "crowded_share": crowded.double().mean().item(), "bound_median_nats": bound.median().item(),
        "bound_largest_nats": bound.max().item(),
    }  # fmt: skip


# Everything downstream, K-means


def pairs(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """Measures work on the active pairs: latents, decoding, the backward of log p(x), and encode as a whole."""
    sizes = shape(bench, components, features)
    problem = problems.make(bench, sizes)
    mfa, batches = problem.mfa, problem.batches
    parameters, woodbury = problem.parameters(), mfa.woodbury()
    with torch.no_grad():
        active = [mfa.active_pairs(x) for x in batches]
        tokens = torch.arange(sizes.tokens, device=bench.device)
        codes = [mfa.encode(x) for x in batches]
        upstream = torch.full_like(active[0].log_prob, 1 / sizes.tokens), torch.zeros_like(active[0].logits)

        def backward(i: int) -> Any:
            return torch.ops.mfa_kernels.log_prob_backward(
                *upstream, batches[i], *parameters, *woodbury.tensors(), *active[i], [False, True, True, True, True]
            )

        def latents(i: int) -> Tensor:
            return ops.latents(batches[i], tokens, active[i].components[:, 0].clamp_min(0), *parameters[:3], woodbury)

        calls: dict[str, Callable[[int], Any]] = {
            "latents": latents,
            "decode": lambda i: mfa.decode(codes[i]),
            "backward": backward,
            "encode": lambda i: mfa.encode(batches[i]),
        }
        found: dict[str, Any] = {f"{name}_ms": 1e3 * bench.median(call, 0.7).median for name, call in calls.items()}
    return {**found, "pairs_per_token": float((active[0].components >= 0).sum()) / sizes.tokens}


@torch.no_grad()
def em_pass(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """The E-step of a batch, scan and statistics; and its statistics alone, on the pairs that the scan found."""
    sizes = shape(bench, components, features)
    problem = problems.make(bench, sizes)
    mfa, batches, parameters, woodbury = problem.mfa, problem.batches, problem.parameters(), problem.mfa.woodbury()
    out = SufficientStatistics.zeros(parameters[0], sizes.rank, False)
    timing = bench.median(lambda i: expectation(batches[i], parameters, woodbury, out))
    if not all(bool(t.isfinite().all()) for t in out.tensors()):
        raise AssertionError("a sum is not finite")
    found = _timed(timing, sizes.tokens)
    found["temporaries_mb"] = bench.peak(lambda i: expectation(batches[i], parameters, woodbury, out)) / 1e6
    found["profile"] = profiled(bench, lambda i: expectation(batches[i], parameters, woodbury, out))
    active = [mfa.active_pairs(x) for x in batches]
    weights = [torch.where(a.components >= 0, a.logits.softmax(-1), 0) for a in active]
    timing = bench.median(lambda i: accumulate(batches[i], active[i].components, weights[i], woodbury, out), 0.7)
    found["statistics_ms"] = 1e3 * timing.median
    found["statistics_gb_per_s"] = (2 * out.cross.nbytes + woodbury.rows.nbytes) / timing.median / 1e9
    scanned = results.get(_name("scan", components, features), {}).get("ms")
    return {**found, **({"ratio_to_scan": found["ms"] / scanned} if scanned else {})}


@torch.no_grad()
def k_means_iteration(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """Nearest centroids and the sums by cluster of a batch; and a matrix product of the same flops, in fp16."""
    sizes = shape(bench, components, features)
    problem = problems.make(bench, sizes)
    center = problem.mfa.means.detach().mean(0)
    centroids, batches = problem.mfa.means.detach() - center, problem.batches
    del problem
    bench.clean()
    sums = ClusterSums.zeros(centroids)

    def iteration(i: int) -> None:
        owner, distance = nearest(batches[i], centroids, center)
        cluster_sums(batches[i], center, owner, distance, None, sums)

    timing = bench.median(iteration)
    owner, distance = nearest(batches[0], centroids, center)
    few = (batches[0][:64].double() - center.double(), centroids.double())
    best = torch.cdist(*few, compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()
    if not torch.allclose(distance[:64].double(), best, rtol=1e-5):
        raise AssertionError("a row has a nearer centroid")
    flops = 2 * sizes.tokens * sizes.components * sizes.features
    found = _timed(timing, sizes.tokens) | _of_matmul(results, flops, timing.median)
    found["profile"] = profiled(bench, iteration)
    found["temporaries_mb"] = bench.peak(iteration) / 1e6
    alone = bench.median(lambda i: cluster_sums(batches[i], center, owner, distance, None, sums), 0.5)
    found["sums_ms"] = 1e3 * alone.median
    left, right = [x.half() for x in batches], centroids.half().T
    out = torch.empty(sizes.tokens, sizes.components, dtype=torch.float16, device=bench.device)
    product = bench.median(lambda i: torch.mm(left[i], right, out=out), 0.5)
    return {**found, "product_ms": 1e3 * product.median, "ratio_to_product": timing.median / product.median}


def k_means(bench: Bench, results: Results, folder: Path, components: int, features: int) -> dict[str, Any]:
    """One update of the centroids and the assignment after it: two passes over the rows; and cdist for comparison."""
    sizes = shape(bench, components, features, tokens=4 * TOKENS)
    problem = problems.make(bench, sizes)
    start = problem.mfa.means.detach().clone()
    batches, features_, clusters = problem.batches, sizes.features, sizes.components
    del problem
    bench.clean()

    def passes(i: int) -> None:
        kmeans(batches[i], clusters, init=start, iterations=1, tol=0.0, sample=sizes.tokens, progress=False)

    timing = bench.median(passes)
    found = _timed(timing, 2 * sizes.tokens)
    found |= _of_matmul(results, 2 * 2 * sizes.tokens * clusters * features_, timing.median)
    found["temporaries_mb"] = bench.peak(passes) / 1e6

    def plain(i: int) -> None:
        for part in batches[i].split(16384):
            torch.cdist(part.float(), start).argmin(1)

    found["cdist_argmin_ms_for_two_passes"] = 2e3 * bench.median(plain).median
    return found


# What people run today


def plain(bench: Bench, results: Results, folder: Path, components: int, features: int, compiled: bool = False):
    """The formula as the paper's code writes it, float32, in as few slices of tokens as memory allows; or compiled."""
    sizes = shape(bench, components, features)
    problem = problems.make(bench, sizes)
    leaves = [p.clone().requires_grad_() for p in problem.parameters()]
    batches = problem.batches
    del problem
    bench.clean()
    log_prob = baselines.plain_log_prob
    if compiled:
        log_prob = torch.compile(log_prob, dynamic=False, backend="aot_eager" if bench.rehearsal else "inductor")
    # N x K x R several times over: products, their transposed copy, the solution, and what autograd keeps of them.
    slice_ = sizes.tokens
    while slice_ > 16 and 6 * 4 * slice_ * sizes.components * sizes.rank > 0.7 * bench.free_bytes():
        slice_ //= 2

    def forward(i: int) -> None:
        with torch.no_grad():
            for part in batches[i].split(slice_):
                log_prob(part.float(), *leaves)

    def train(i: int) -> None:
        for leaf in leaves:
            leaf.grad = None
        for part in batches[i].split(slice_):
            (-log_prob(part.float(), *leaves).sum() / sizes.tokens).backward()

    timing = bench.median(forward)
    found = {"tokens_per_slice": slice_, **_timed(timing, sizes.tokens)}
    found["step_ms"] = 1e3 * bench.median(train).median
    scanned, trained = (results.get(_name(kind, components, features), {}).get("ms") for kind in ("scan", "step"))
    if scanned:
        found["times_our_scan"] = found["ms"] / scanned
    if trained:
        found["times_our_step"] = found["step_ms"] / trained
    return found


# The tests


def gpu_tests(bench: Bench, results: Results, folder: Path) -> dict[str, Any]:
    """`pytest -m gpu` in a process of its own, on several workers where pytest-xdist is there."""
    root, report, log = Path(__file__).parents[2], folder / "gpu-tests.xml", folder / "gpu-tests.log"
    tests = "tests/gpu" if bench.rehearsal else "tests"  # to collect all of them takes longer than the one that runs
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not host", tests, "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "--durations=10"]
    environment = dict(os.environ)
    if bench.rehearsal:
        environment["MFA_KERNELS_TEST_DEVICE"] = "cpu"
        command += ["-k", "threshold"]
    else:
        command += ["-n", "4", "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
        command += ["--timeout=60"] if importlib.util.find_spec("pytest_timeout") else []
    report.unlink(missing_ok=True)
    with log.open("w") as file:
        limit = max(30.0, min(240.0, bench.remaining - 30))
        # A session of its own: workers that hang in a kernel are killed with it, and do not disturb what comes next.
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: Any = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {limit:.0f} s"
    if not report.exists():
        return {"passed": 0, "failed": 0, "status": status, "log": log.read_text()[-3000:]}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    failed = total["failures"] + total["errors"]
    found = {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}
    found |= {"seconds": sum(float(suite.get("time", 0)) for suite in suites), "status": status}
    if status != 0:
        lines = [line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))]
        found["log"] = "\n".join(lines)[-6000:]
    return found


def _name(kind: str, components: int, features: int) -> str:
    return f"{kind} {'llama' if features == LLAMA else 'gemma'} K={components}"


def _case(kind: str, estimate: float, function: Any, components: int, features: int, **options: Any) -> Case:
    run = functools.partial(function, components=components, features=features, **options)
    return Case(_name(kind, components, features), estimate, run)


FIRST = [
    Case("environment", 5, first.environment),
    Case("smoke", 15, first.smoke),
    Case("doctor --check", 60, first.kernel_check),
    Case("sums of the tensor cores", 3, first.sums),
    Case("ceilings", 6, first.ceilings),
    Case("profiled scan", 10, first.profiled_scan),
]
"""Whether anything is wrong: 90 seconds."""

SECOND = [
    Case("all ceilings", 10, functools.partial(first.ceilings, all_of_them=True)),
    _case("scan", 20, scan, 8192, LLAMA),
    _case("scan, fast", 15, scan, 8192, LLAMA, precision="fast"),
    _case("candidates", 5, candidates, 8192, LLAMA),
    _case("step", 20, step, 8192, LLAMA),
    _case("few tokens", 10, few_tokens, 8192, LLAMA),
    _case("EM pass", 15, em_pass, 8192, LLAMA),
    _case("k-means iteration", 10, k_means_iteration, 8192, LLAMA),
    _case("pairs", 15, pairs, 8192, LLAMA),
    _case("steered decode step", 25, steered_step, 8192, LLAMA),
    _case("screened scan over dense scan", 40, screened_scan, 8192, LLAMA),
    Case("gpu tests", 120, gpu_tests),
    Case("compute-sanitizer", 60, first.sanitizer),
    _case("scan", 25, scan, 32768, LLAMA),
    _case("scan", 15, scan, 8192, GEMMA),
    _case("step", 15, step, 8192, GEMMA),
    _case("few tokens", 8, few_tokens, 8192, GEMMA),
    _case("candidates", 5, candidates, 8192, GEMMA),
    _case("scan", 10, scan, 1024, LLAMA),
    _case("step", 10, step, 1024, LLAMA),
    _case("few tokens", 8, few_tokens, 1024, LLAMA),
    _case("plain", 40, plain, 8192, LLAMA),
    _case("plain, compiled", 60, plain, 8192, LLAMA, compiled=True),
    _case("k-means", 15, k_means, 8192, LLAMA),
    _case("scan", 10, scan, 1024, GEMMA),
    _case("step", 10, step, 1024, GEMMA),
    _case("few tokens", 8, few_tokens, 1024, GEMMA),
    _case("diffuse step", 20, step, 1024, LLAMA, diffuse=True),
    _case("EM pass", 8, em_pass, 1024, GEMMA),
    _case("k-means iteration", 8, k_means_iteration, 1024, GEMMA),
    _case("k-means", 15, k_means, 1024, GEMMA),
    _case("pairs", 10, pairs, 1024, GEMMA),
    _case("plain", 15, plain, 1024, GEMMA),
    _case("plain, compiled", 45, plain, 1024, GEMMA, compiled=True),
    _case("few tokens", 15, few_tokens, 32768, LLAMA),
    _case("scan", 20, scan, 32768, GEMMA),
    _case("step", 30, step, 32768, LLAMA),
    _case("few tokens", 12, few_tokens, 32768, GEMMA),
    _case("step", 25, step, 32768, GEMMA),
    _case("k-means", 25, k_means, 32768, GEMMA),
    _case("plain", 60, plain, 32768, GEMMA),
    _case("diffuse step", 40, step, 8192, LLAMA, diffuse=True),
]
"""What is measured, the most important first; what others take, later than what we do."""

STAGES = {1: FIRST, 2: SECOND}
