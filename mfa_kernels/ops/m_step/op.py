"""The M-step of components from their sums, and the log-density of the prior: by the C++ kernels or plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfa_kernels.ops.common import cpp
from mfa_kernels.ops.common.products import product
from mfa_kernels.ops.m_step import portable
from mfa_kernels.ops.statistics.types import SufficientStatistics
from mfa_kernels.ops.woodbury.types import Parameters, Woodbury

_CHUNK_ELEMENTS = 1 << 23  # numbers in the loadings of the components that are worked on at once


class Maximum(NamedTuple):
    """What maximises the expected log posterior, but for the noise.

    Attributes:
        change: of the means, (K, D) float64.
        loadings: (K, D, R), in the dtype of the parameters.
        left: what means and loadings leave of the squares of the tokens and the prior, less the squares themselves:
            (D,) float64 where components share the noise, else (K, D).
    """

    change: Tensor
    loadings: Tensor
    left: Tensor


def chunks(loadings: Tensor) -> tuple[Tensor, ...]:
    """Numbers of components (K, D, R), in chunks that are worked on at once."""
    _, features, rank = loadings.shape
    step = max(1, _CHUNK_ELEMENTS // (features * (rank + 1)))
    return torch.arange(len(loadings), device=loadings.device).split(step)


@torch.no_grad()
def solve(
    s: SufficientStatistics, parameters: Parameters, woodbury: Woodbury, covariance: Tensor, strength: float,
    least: float,
) -> Maximum:  # fmt: skip
    """The M-step of means and loadings.

    Args:
        s: of the tokens, under these parameters.
        parameters: float32 or float64.
        woodbury: of these parameters.
        covariance: of the residuals of the prior's tokens, (D, D) float64.
        strength: tokens of the prior per component, nu.
        least: tokens that a component owns, up to which its parameters stay.

    Raises:
        torch.linalg.LinAlgError: the statistics of a component are not those of any tokens.
    """
    if not woodbury.is_cpp:
        return Maximum(*portable.solve(s, parameters, covariance, strength, least, chunks(parameters.loadings)))
    left = torch.zeros_like(s.squares)
    found = []
    for k in map(_span, chunks(parameters.loadings)):
        terms, gains, spread = _spread(woodbury, k, covariance)
        sums = (part[k] for part in (s.mass, s.shift, s.latent, s.second, s.cross))
        own_left = left if left.dim() == 1 else left[k]
        loadings = parameters.loadings[k].contiguous()
        found.append(cpp.library().m_step_solve(gains, spread, *terms, loadings, *sums, own_left, strength, least))
    change, loadings_found = (torch.cat(parts) for parts in zip(*found))
    return Maximum(change, loadings_found, left)


@torch.no_grad()
def traces(parameters: Parameters, woodbury: Woodbury, covariance: Tensor) -> Tensor:
    """tr C_k^-1 S of every component, for a covariance S (D, D) float64: (K,) float64."""
    noise = parameters.noise_variance.double()
    whole = (covariance.diagonal() / noise).sum(-1).expand(len(parameters.means))
    if not woodbury.is_cpp:
        return whole - portable.explained_traces(parameters, covariance, chunks(parameters.loadings))
    found = []
    for k in map(_span, chunks(parameters.loadings)):
        terms, gains, spread = _spread(woodbury, k, covariance)
        found.append(cpp.library().m_step_traces(gains, spread, *terms))
    return whole - torch.cat(found)


def _span(numbers: Tensor) -> slice:
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


def _spread(woodbury: Woodbury, k: slice, covariance: Tensor) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """The terms of some components, their gains G (k, R, D), and G S, in the dtype of the terms."""
    terms = woodbury.rows[k], woodbury.cholesky[k], woodbury.scale, woodbury.per_component
    gains = cpp.library().m_step_gains(*terms)
    return terms, gains, product(gains.flatten(0, 1), covariance.to(gains)).view(gains.shape)
