"""Wrong calls of every operator: `python -m tests.ops.fuzz COUNT SEED BACKEND` says what became of them, as JSON.

A call is one that works, with one or two of its arguments changed: another shape, dtype, stride or device, indices out
of range, something missing, or the tensor of another mixture. It has to be refused, naming an argument, or to work.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.ops.kmeans import op as kmeans  # noqa: F401  (registers an operator, as the next does)
from mfa_kernels.ops.kmeans.types import ClusterSums
from mfa_kernels.ops.screen import differentiable  # noqa: F401
from mfa_kernels.ops.screen import op as screening
from mfa_kernels.ops.statistics.op import SufficientStatistics
from tests.helpers.mixtures import mixture, tokens
from tests.ops.intervene.cases import case


def calls(components: int, features: int, rank: int, per_component: bool, tokens_: int = 7) -> dict[str, list[Any]]:
    """Arguments of every operator that work, for one mixture."""
    m = mixture(components, features, rank, per_component=per_component, spread=0.5)
    x, f = tokens(m, tokens_), m.woodbury()
    op, n = torch.ops.mfa_kernels, torch.arange(tokens_)
    active = op.log_prob(x, *m, *f.tensors(), 4)
    k, z = active[1][:, 0].contiguous(), torch.randn(tokens_, rank)
    pairs = [x, n, k, *m[:3]]
    slots = [active[1].clamp_min(0), active[2].softmax(-1), torch.randn(tokens_, 4, rank)]
    center = torch.zeros(features)
    owner, distance = op.nearest(x, m.means, center)
    steps = SufficientStatistics.zeros(m.means, rank, per_component).tensors()[:6]
    many = x.repeat(40, 1) if f.is_cpp else x  # enough for the int8 level, where there is one
    made: dict[str, list[Any]] = {
        "factors": [*m[:3]],
        "scan_rows": [f.rows, f.cholesky, f.scale, f.center, per_component],
        "int8_rows": [f.rows, f.cholesky, f.scale, f.center, per_component],
        "log_prob": [many, *m, *f.tensors(), 4, True, *f.scan, *f.int8],
        "log_prob_keeping": [many, *m, *f.tensors(), 4, *f.int8],
        "log_prob_backward": [torch.ones(tokens_), torch.zeros(tokens_, 4), x, *m, *f.tensors(), *active, [True] * 5],
        "component_log_prob": [x, *m[:3], *f.tensors()],
        "component_log_prob_backward": [torch.ones(tokens_, components), x, *m[:3], *f.tensors(), [True] * 4],
        "latents": [*pairs, *f.tensors()],
        "latents_backward": [torch.ones(tokens_, rank), z, *pairs, f.cholesky, [True] * 4],
        "decode": [*slots, *m[:2]],
        "decode_backward": [torch.ones(tokens_, features), *slots, *m[:2], [True] * 2],
        "nearest": [x, m.means, center, None],
        "cluster_sums": [x, center, owner, distance, None, *ClusterSums.zeros(m.means)],
        "statistics": [
            x,
            active[1],
            active[2].softmax(-1),
            f.rows,
            f.cholesky,
            f.scale,
            f.center,
            per_component,
            *steps,
        ],
    }
    c = case(shape=(components, features, rank), per_component=per_component, dtype=torch.float32)
    made["intervene"] = c.operands()
    if not f.is_cpp:
        del made["log_prob_keeping"]
    screen = None if per_component or not f.is_cpp else screening.screen(m, f, 16)
    if screen is not None:
        made["screened_log_prob"] = [x, *m, *f.tensors(), *screen, 4]
        made["select_screened"] = [x, f.rows, f.constants(m.log_weights), f.scale, *screen, 20.0, 4]
    return made


CHANGES: list[Callable[[Tensor, random.Random], Any]] = [
    lambda t, r: t[: max(0, len(t) - 1)] if t.dim() else t[None],
    lambda t, r: t[..., : max(0, t.shape[-1] - 1)] if t.dim() else t[None, None],
    lambda t, r: torch.cat([t, t]) if t.dim() else t[None],
    lambda t, r: t[:0] if t.dim() else t[None],
    lambda t, r: t.unsqueeze(r.randrange(t.dim() + 1)),
    lambda t, r: t.flatten(),
    lambda t, r: t.reshape(-1)[0] if t.numel() else t[None],
    lambda t, r: t.transpose(0, -1) if t.dim() > 1 else t[None],
    lambda t, r: t.expand(3, *t.shape),
    lambda t, r: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t[None],
    lambda t, r: t.to(r.choice([torch.float64, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64])),
    lambda t, r: t.to("meta"),
    lambda t, r: t + 10**6 if not t.is_floating_point() and t.dtype != torch.bool else t * 1e30,
    lambda t, r: t - 10**6 if not t.is_floating_point() and t.dtype != torch.bool else -t,
    lambda t, r: torch.full_like(t, torch.nan) if t.is_floating_point() else torch.zeros_like(t),
    lambda t, r: t.to_sparse() if t.dim() else t[None],
    lambda t, r: None,
    lambda t, r: "a string",
    lambda t, r: t.numpy() if not t.is_meta else t,
]  # fmt: skip


def changed(arguments: list[Any], others: list[Any], random_: random.Random) -> list[Any]:
    """The arguments with one or two of them made wrong."""

    def copy(value: Any) -> Any:
        return (
            [copy(v) for v in value]
            if isinstance(value, list)
            else value.clone()
            if isinstance(value, Tensor)
            else value
        )

    out = copy(arguments)
    for place in random_.sample(range(len(out)), random_.choice([1, 1, 1, 2])):
        value = out[place]
        if isinstance(value, Tensor) and random_.random() < 0.2:
            out[place] = others[place]
        elif isinstance(value, Tensor):
            out[place] = random_.choice(CHANGES)(value, random_)
        elif isinstance(value, bool):
            out[place] = not value
        elif isinstance(value, int):
            out[place] = random_.choice([0, -1, 10**4])
        elif isinstance(value, list) and value and isinstance(value[0], Tensor) and random_.random() < 0.8:
            one = random_.randrange(len(value))
            value[one] = random_.choice(CHANGES[:-3])(value[one], random_)
        elif isinstance(value, list):
            out[place] = random_.choice([[], value[:1], value * 2])
        elif value is None:
            out[place] = random_.choice([torch.zeros(3), torch.zeros(3, 2, dtype=torch.bool)])
    return out


def main(count: int, seed: int, backend: str) -> None:
    faulthandler.enable()
    random_, done = random.Random(seed), {"calls": 0, "refused": 0, "unnamed": 0, "worked": 0}
    shapes = [((5, 21, 3), (4, 21, 3)), ((9, 40, 2), (9, 32, 2)), ((70, 33, 4), (70, 33, 3)), ((6, 16, 1), (5, 17, 2))]
    pools = [
        (calls(*size, per), calls(*other, not per)) for size, other in shapes for per in (False, True)
    ]  # fmt: skip
    unnamed = []
    while done["calls"] < count:
        own, others = random_.choice(pools)
        name = random_.choice(sorted(own))
        if name not in others:
            others = own
        arguments = changed(own[name], others[name], random_)
        done["calls"] += 1
        print(done["calls"], name, file=sys.stderr)
        operator = getattr(torch.ops.mfa_kernels, name)
        names = {a.name for a in operator.default._schema.arguments}
        try:
            operator(*arguments)
            done["worked"] += 1
        except Exception as error:
            done["refused"] += 1
            of_pytorch = isinstance(error, NotImplementedError) and "backend" in str(error)  # sparse tensors
            of_backend = "MFA_KERNELS_BACKEND=" in str(error)  # names the variable that asks for what cannot be
            if not (of_pytorch or of_backend) and not names & set(re.findall(r"\w+", str(error))):
                done["unnamed"] += 1
                unnamed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    print("\n".join(unnamed[:20]))
    print(json.dumps(done))


if __name__ == "__main__":
    os.environ["MFA_KERNELS_BACKEND"] = sys.argv[3]
    os.environ.setdefault("TRITON_INTERPRET", "1")
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
