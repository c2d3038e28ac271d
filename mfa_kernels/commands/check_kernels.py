"""`mfa-kernels doctor --check`: runs every family of GPU kernels on small problems, each in a process of its own.

Their first use is checked anew (`mfa_kernels.ops.common.first_use`): what passes here is trusted from then on, what
does not is served by plain PyTorch. A kernel that takes its process with it stops no other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ops.common import backends, first_use

TOKENS = (1, 16, 17, 64, 1000)
SECONDS = 180.0
"""That a family may take, the compilation included."""

_COMPONENTS, _FEATURES, _RANK, _SLOTS = 200, 96, 10, 16


class Finding(NamedTuple):
    """What comes of a family.

    Attributes:
        family: its name.
        states: how many first uses ended in each of "default", "careful" and "plain".
        seconds: that they took.
        note: why not all of them are "default"; "" where all are, or there are none: no kernels, no first use.
    """

    family: str
    states: dict[str, int]
    seconds: float
    note: str

    @property
    def passed(self) -> bool:
        return not self.note and set(self.states) <= {first_use.DEFAULT}


class Problem:
    """A mixture and tokens of it on a device."""

    def __init__(self, device: str, tokens: int, dtype: torch.dtype, per_component: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        noise = 0.5 + torch.rand((_COMPONENTS, _FEATURES) if per_component else (_FEATURES,), generator=generator)
        self.means, self.loadings = normal(_COMPONENTS, _FEATURES).to(device), normal(_COMPONENTS, _FEATURES, _RANK)
        self.loadings = (self.loadings / 4).to(device)
        self.noise, self.log_weights = noise.to(device), normal(_COMPONENTS).log_softmax(0).to(device)
        owner = torch.randint(_COMPONENTS, (tokens,), generator=generator)
        self.x = (self.means[owner.to(device)] + normal(tokens, _FEATURES).to(device) / 2).to(dtype)
        self.owner = owner.to(device)

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.means, self.loadings, self.noise, self.log_weights

    def woodbury(self) -> Any:
        from mfa_kernels import ops

        return ops.factorize(*self.parameters[:3], self.means.mean(0))

    def active(self, exact: bool = True) -> Any:
        from mfa_kernels import ops

        return ops.log_prob(self.x, *self.parameters, self.woodbury(), _SLOTS, exact)


def exercises() -> dict[str, Callable[[Problem], Any]]:
    """What runs the kernels of each family."""
    from mfa_kernels import ops
    from mfa_kernels.ops.intervene import op as steering
    from mfa_kernels.ops.intervene.types import Edit
    from mfa_kernels.ops.kmeans import op as kmeans
    from mfa_kernels.ops.kmeans.types import ClusterSums
    from mfa_kernels.ops.pairs import op as pairs
    from mfa_kernels.ops.pairs.types import Pairs
    from mfa_kernels.ops.scan import op as scan
    from mfa_kernels.ops.scan.types import activity_threshold
    from mfa_kernels.ops.screen import op as screening
    from mfa_kernels.ops.statistics import op as statistics
    from mfa_kernels.ops.statistics.types import SufficientStatistics
    from mfa_kernels.ops.woodbury.types import Parameters

    def screened(p: Problem) -> None:
        if p.noise.dim() == 2:
            return  # which is not screened
        constants, parameters = p.woodbury().constants(p.log_weights), Parameters(*p.parameters)
        found = screening.screen(parameters, p.woodbury(), screening.default_features(_FEATURES))
        screening.scan(p.x, p.woodbury(), constants, found, activity_threshold(_COMPONENTS, torch.float32), _SLOTS)

    def slots(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        found = p.active()
        latents = torch.ones(len(p.x), _SLOTS, _RANK, device=p.x.device)
        return found.components, found.logits.softmax(1), latents

    def gradients(p: Problem) -> None:
        x, *parameters = (t.detach().clone().requires_grad_() for t in (p.x, *p.parameters))
        means, loadings, noise, log_weights = parameters
        ops.log_prob(x, means, loadings, noise, log_weights, p.woodbury(), _SLOTS).log_prob.sum().backward()

    def sums(p: Problem) -> None:
        found, out = p.active(), SufficientStatistics.zeros(p.means, _RANK, p.noise.dim() == 2)
        statistics.accumulate(p.x, found.components, found.logits.softmax(1), p.woodbury(), out)

    def clusters(p: Problem) -> None:
        center, out = p.means.mean(0), ClusterSums.zeros(p.means)
        kmeans.cluster_sums(p.x, center, p.owner, torch.ones_like(p.x[:, 0]).float(), None, out)

    def steered(p: Problem) -> None:
        like: dict[str, Any] = {"device": p.x.device}
        rules = torch.tensor([[0, -1, 0]], dtype=torch.int32, **like)
        coefficients = torch.tensor([[[0.5, 0.0, 0.0]]], **like)
        edit = Edit(coefficients, torch.ones(1, 1, _FEATURES, **like), rules, torch.zeros(1, **like))
        steering.intervene(p.x[None], edit)

    def latents(p: Problem) -> None:
        numbers = torch.arange(len(p.x), device=p.x.device)
        pairs.explain(Pairs(p.x, numbers, p.owner.int()), p.woodbury())

    def decoded(p: Problem) -> None:
        pairs.decode(*slots(p), *p.parameters[:2])

    def decoded_gradients(p: Problem) -> None:
        grad = torch.ones(len(p.x), _FEATURES, device=p.x.device)
        torch.ops.mfa_kernels.decode_backward(grad, *slots(p), *p.parameters[:2], [True, True])

    return {
        "factors": lambda p: p.woodbury(),  # of the CUDA library, where there is one
        "scan": lambda p: (p.active(), p.active(exact=False)),
        "screened scan": screened,
        "every logit": lambda p: scan.dense_logits(p.x, p.woodbury(), p.log_weights),
        "latents": latents,
        "gradients": gradients,
        "decode": decoded,
        "gradients of decode": decoded_gradients,
        "statistics": sums,
        "nearest": lambda p: kmeans.nearest(p.x, p.means),
        "cluster sums": clusters,
        "steering": steered,
    }


def cases(device: str, counts: Sequence[int]) -> Iterator[Problem]:
    """The problems that a family is tried on, of so many tokens each."""
    for per_component in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in counts:
                yield Problem(device, tokens, dtype, per_component)


def run(family: str, device: str, counts: Sequence[int] = TOKENS) -> Finding:
    """Runs a family in this process, on problems of so many tokens each."""
    began, exercise = time.perf_counter(), exercises()[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the note says the same
        for problem in cases(device, counts):
            exercise(problem)
    own = [entry for entry in first_use.entries() if entry["family"] == family and entry["pid"] == os.getpid()]
    states: dict[str, int] = {}
    for entry in own:
        states[entry["state"]] = states.get(entry["state"], 0) + 1
    notes = sorted({str(entry["note"]) for entry in own if entry["state"] != first_use.DEFAULT})
    return Finding(family, states, time.perf_counter() - began, "; ".join(notes))


def nothing_to_check(device: str) -> str | None:
    """Why there are no GPU kernels to run on a device; None where there are."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    name, reason = backends.decided(torch.empty(0, device=device), _RANK)
    return None if name == "triton" else reason or f"{name} serves {device}"


def run_all(device: str, seconds: float = SECONDS, at_once: int = 4) -> Iterator[Finding]:
    """Forgets what earlier checks found, and runs every family in a process of its own, so many of them at once."""
    first_use.forget()
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda family: alone(family, device, seconds), exercises())


def alone(family: str, device: str, seconds: float = SECONDS, counts: Sequence[int] = TOKENS) -> Finding:
    """Runs a family in a process of its own."""
    began = time.perf_counter()
    environment = {**os.environ, "MFA_KERNELS_TRUST": "check", "CUDA_LAUNCH_BLOCKING": "1"}
    command = [sys.executable, "-m", "mfa_kernels.commands.check_kernels", family, device, *map(str, counts)]
    try:
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Finding(family, {}, seconds, f"not done after {seconds:.0f} s")
    if out.returncode:
        said = [line for line in out.stderr.strip().splitlines() if line.strip()]
        how = f"killed by signal {-out.returncode}" if out.returncode < 0 else f"status {out.returncode}"
        return Finding(family, {}, time.perf_counter() - began, f"{how}: {said[-1] if said else 'nothing was said'}")
    return Finding(**json.loads(out.stdout.splitlines()[-1]))


def table(findings: list[Finding]) -> str:
    """The findings, a line for each family."""
    lines = [f"{'family':<22}{'first uses':>10}{'careful':>9}{'plain':>7}{'seconds':>9}  note"]
    for finding in findings:
        states = finding.states
        counts = sum(states.values()), states.get(first_use.CAREFUL, 0), states.get(first_use.PLAIN, 0)
        lines.append(
            f"{finding.family:<22}{counts[0]:>10}{counts[1]:>9}{counts[2]:>7}{finding.seconds:>9.1f}  "
            f"{finding.note or ('passed' if states else 'no kernel ran: plain PyTorch serves it')}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], [int(count) for count in sys.argv[3:]])._asdict()))
