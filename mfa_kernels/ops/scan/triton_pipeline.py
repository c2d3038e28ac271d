"""Runs stage 1 on a GPU: low-precision speed, fp32 results.

    tokens -> scan -> candidates -> exact logits of the candidates -> finish
                          \\-> tokens of candidate overflow: every logit, from differences -> finish

Nothing here waits for the device: shapes are fixed, overflows are counted there, and programs that have nothing to do
leave at once. So it can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.ops.common import configs, cuda
from mfa_kernels.ops.common.triton_tokens import scan_tokens
from mfa_kernels.ops.pairs.triton_pairs import explain
from mfa_kernels.ops.pairs.types import Pairs
from mfa_kernels.ops.scan import triton_merge as merge
from mfa_kernels.ops.scan.triton_all_logits import all_logits
from mfa_kernels.ops.scan.triton_scan import scan_tiles
from mfa_kernels.ops.scan.types import ActivePairs
from mfa_kernels.ops.woodbury.types import ScanRows, Woodbury

CANDIDATES = 16
"""Components per token that are recomputed exactly; of a token with more, every logit is."""

FEW = 16
"""Tokens up to which reading the rows takes all the time: CUDA C++ does it, where it could be built."""

MOST_LOGITS = 1 << 26
"""Logits of tokens whose candidates overflow in memory at a time, at most (256 MB)."""


def scan(
    x: Tensor, woodbury: Woodbury, rows: ScanRows, constants: Tensor, slots: int, exact: bool = True
) -> ActivePairs:
    """log p(x) and the active pairs of every token; see `mfa_kernels.ops.scan.op`.

    Args:
        x: (N, D), contiguous, any float dtype but float64.
        woodbury: float32, portable layout.
        rows: the scan's view of them.
        constants: (K,).
        slots: S.
        exact: False leaves out the exact logits of the candidates: logits are off by the rounding of fp16 operands.
    """
    count, components = x.shape[0], constants.shape[0]
    with torch.cuda.device_of(x):
        out = ActivePairs.empty(count, slots, constants)
        if count == 0:
            return out
        if exact and count <= FEW and not woodbury.per_component and slots <= CANDIDATES:
            library = cuda.library_in_use()
            if library is not None:
                return _few_tokens(library, x, woodbury, rows, constants, slots)
        config = configs.configured(configs.Scan, x, count, components)
        tokens = scan_tokens(x, rows.scale, woodbury.center, rows.rows.shape[-1], woodbury.per_component)
        partials = scan_tiles(tokens, rows, constants, config, bounds=exact)
        if not exact:
            merge.finish_fast(partials, tokens.length, not woodbury.per_component, components, out)
            return out
        found, candidate_overflow = merge.candidates(partials, tokens.norms, components, CANDIDATES)
        each = torch.arange(count * CANDIDATES, device=x.device) // CANDIDATES
        logits, _ = explain(Pairs(x, each, found.flatten()), woodbury, constants, with_t=False)
        assert logits is not None  # constants were given
        merge.finish(found, logits, candidate_overflow, components, out)
        finish_candidate_overflow(x, woodbury, constants, candidate_overflow, out)
    return out


def _few_tokens(
    library: Any, x: Tensor, woodbury: Woodbury, rows: ScanRows, constants: Tensor, slots: int
) -> ActivePairs:
    """Does the same by csrc/cuda/few_tokens.cuh: the rows are read once, at the speed of memory, in two launches."""
    f, threshold = woodbury, math.log(constants.shape[0]) - merge.LOG_EPS
    out = ActivePairs(*library.few_tokens(x, f.rows, f.scale, f.center, *rows[:5], constants, threshold, slots))
    finish_candidate_overflow(x, woodbury, constants, (out.counts < 0).int(), out)
    return out


def finish_candidate_overflow(
    x: Tensor,
    woodbury: Woodbury,
    constants: Tensor,
    flags: Tensor,
    out: ActivePairs,
    log_eps: float = merge.LOG_EPS,
) -> None:
    """Writes the tokens whose flag (N,) int32 is 1, from all their logits; T is log K - log_eps."""
    count, components = x.shape[0], constants.shape[0]
    index, total = merge.gather(flags)
    at_once = max(1, min(count, MOST_LOGITS // components))
    buffer = constants.new_empty(at_once, components)
    for first in range(0, count, at_once):
        part = index[first : first + at_once]
        left = total if at_once == count else (total - first).clamp(0, at_once)
        all_logits(x, woodbury, constants, part, left, buffer[: part.shape[0]])
        merge.finish_all_logits(buffer, part, left, components, out, log_eps)
