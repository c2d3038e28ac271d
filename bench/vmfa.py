"""The peer: v-MFA (Salwig et al., arXiv 2501.12299) written plainly, in PyTorch on batches of rows by component.

A row has C candidates. An E-step looks at the G neighbors of each of them and at one component at random, and keeps the
best C; what a component's neighbors are is estimated from the rows that it owns, as the mean of how much less likely
they are under another one. The M-step is that of a mixture of factor analyzers with one noise for all components, as
`mfa_kernels` has it by default. Centroids begin as rows drawn by AFK-MC2 (Bachem et al., 2016), and a few passes with
isotropic components come first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CANDIDATES, NEIGHBORS = 3, 15
"""C and G, of the paper's experiments."""

WARMUP = 10  # passes with isotropic components
_CHAIN = 5  # steps of AFK-MC2 for each centroid
_FLOOR = 1e-4  # share of the variance of the data, below which no noise falls


class VMFA:
    """The model and the state of its training.

    Args:
        x: (N, D) float32.
        components, rank: K, R.
        seed: of everything that is drawn.
    """

    def __init__(self, x: Tensor, components: int, rank: int, seed: int = 0) -> None:
        self.x, self.rank = x - x.mean(0), rank  # |x|^2 - 2 x.mu + |mu|^2 needs the origin among the rows
        self.origin, x = x.mean(0), self.x
        self.generator = torch.Generator().manual_seed(seed)
        self.means = x[self._seeds(components)].clone()
        variance = x.var(0)
        self.floor = _FLOOR * variance
        self.noise = torch.full_like(variance, float(variance.mean()))
        self.loadings = torch.zeros(components, x.shape[1], rank)
        self.log_weights = torch.full((components,), -math.log(components))
        self.kept = torch.randint(components, (len(x), CANDIDATES), generator=self.generator)
        self.neighbors = torch.randint(components, (components, NEIGHBORS), generator=self.generator)
        self.passes = 0

    def _seeds(self, count: int) -> Tensor:
        """AFK-MC2: a Markov chain for each centroid, whose proposals are rows by their distance from the first."""
        first = torch.randint(len(self.x), (1,), generator=self.generator)
        distance = (self.x - self.x[first]).square().sum(1).double()
        proposal = distance / distance.sum() / 2 + 0.5 / len(self.x)
        drawn = torch.multinomial(proposal, count * _CHAIN, replacement=True, generator=self.generator)
        uniform = torch.rand(count * _CHAIN, generator=self.generator, dtype=torch.float64)
        chosen = self.x.new_empty(count, self.x.shape[1])
        chosen[0], index = self.x[first[0]], [int(first)]
        for k in range(1, count):
            steps = slice(k * _CHAIN, (k + 1) * _CHAIN)
            rows = drawn[steps]
            nearest = torch.cdist(self.x[rows], chosen[:k]).square().amin(1).double() / proposal[rows]
            current = 0
            for step in range(1, _CHAIN):
                if nearest[step] > uniform[steps][step] * nearest[current]:
                    current = step
            index.append(int(rows[current]))
            chosen[k] = self.x[index[-1]]
        return torch.tensor(index)

    @property
    def is_warm(self) -> bool:
        """True where components are factor analyzers."""
        return self.passes > WARMUP

    def step(self) -> None:
        """One pass: the E-step, then the M-step."""
        self.passes += 1
        if self.passes == WARMUP + 1:  # isotropic components leave no direction to begin with
            shape = self.loadings.shape
            scale = (self.noise / self.rank).sqrt().unsqueeze(1) if self.rank else 1.0
            self.loadings = torch.randn(shape, generator=self.generator) * scale * 0.1
        candidates = self._search_space()
        self._m_step(self._e_step(candidates))

    def _search_space(self) -> Tensor:
        """Distinct candidates (N, S) int32, sorted; K stands for none."""
        components = len(self.means)
        any_one = torch.randint(components, (len(self.x), 1), generator=self.generator)
        found = torch.cat([self.kept, self.neighbors[self.kept].flatten(1), any_one], 1).int().numpy()
        found.sort(1)  # NumPy has SIMD for short rows of integers, PyTorch has not
        every = torch.from_numpy(found)
        every[:, 1:][every[:, 1:] == every[:, :-1]] = components
        return every

    def _terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Whitened rows A (K, R, D), Cholesky factors of M = I + W^T Psi^-1 W, and constants (K,)."""
        scale = self.noise.rsqrt()
        w = self.loadings * scale.unsqueeze(1)
        cholesky = torch.linalg.cholesky(torch.eye(self.rank) + w.mT @ w)
        a = torch.linalg.solve_triangular(cholesky, w.mT, upper=False)
        log_det = self.noise.log().sum() + 2 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        return a, cholesky, self.log_weights - 0.5 * (log_det + self.x.shape[1] * math.log(2 * math.pi))

    def _e_step(self, candidates: Tensor) -> Tensor:
        """Keeps the best candidates; returns their responsibilities, (N, C)."""
        components, scale = len(self.means), self.noise.rsqrt()
        a, _, constants = self._terms()
        whitened, means = self.x * scale, self.means * scale
        weights = torch.cat([a, means.unsqueeze(1)], 1)  # of each component, a product with R + 1 columns
        offsets, lengths = (weights @ means.unsqueeze(2)).squeeze(2), whitened.square().sum(1)
        logits = torch.full(candidates.shape, -torch.inf)
        order, rows = by_key(candidates.flatten(), components)
        for k, cells in enumerate(order.split(rows)):
            here = cells // candidates.shape[1]
            t = whitened.index_select(0, here) @ weights[k].T
            distance = lengths[here] - 2 * t[:, -1] + offsets[k, -1] - (t[:, :-1] - offsets[k, :-1]).square().sum(1)
            logits.view(-1)[cells] = constants[k] - distance / 2
        best, columns = logits.topk(CANDIDATES, 1)
        self.kept = candidates.gather(1, columns).long()
        self._estimate_neighbors(order, candidates, best[:, :1] - logits)
        missing = self.kept == components  # as where a row has fewer distinct ones
        self.kept = torch.where(missing, self.kept[:, :1], self.kept)
        return best.masked_fill(missing, -torch.inf).softmax(1)

    def _estimate_neighbors(self, order: Tensor, candidates: Tensor, gaps: Tensor) -> None:
        """The components that rows of each lose least under, in the mean; `order` has the cells by component."""
        components = len(self.means)
        owner = self.kept[order // candidates.shape[1], 0]
        again, _ = by_key(owner, components)
        order, owner = order[again], owner[again]
        neighbor = candidates.flatten()[order].long()
        pairs, counts = (owner * components + neighbor).unique_consecutive(return_counts=True)
        ends = gaps.flatten()[order].double().cumsum(0)[counts.cumsum(0) - 1]
        gap = torch.diff(ends, prepend=ends.new_zeros(1)) / counts
        gap[pairs // components == pairs % components] = torch.inf
        by_gap = gap.argsort(stable=True)
        by_gap = by_gap[(pairs[by_gap] // components).argsort(stable=True)]
        owner = pairs[by_gap] // components
        place = torch.arange(len(by_gap)) - torch.searchsorted(owner, owner)
        here = (place < NEIGHBORS) & gap[by_gap].isfinite()
        self.neighbors[owner[here], place[here]] = pairs[by_gap][here] % components

    def _m_step(self, responsibilities: Tensor) -> None:
        components, features = self.means.shape
        a, cholesky, _ = self._terms()
        scale, squares = self.noise.rsqrt(), torch.zeros(features, dtype=torch.float64)
        mass = torch.zeros(components)
        order, rows = by_key(self.kept.flatten(), components)
        for k, cells in enumerate(order.split(rows)):
            r = responsibilities.view(-1)[cells]
            cells, r = cells[r > 0], r[r > 0]
            mass[k] = r.sum()
            if mass[k] < 1e-3:
                continue
            y = self.x[cells // CANDIDATES] - self.means[k]
            weighted = y * r.unsqueeze(1)
            squares += (weighted * y).sum(0).double()
            shift = weighted.sum(0, keepdim=True)
            if not self.is_warm:
                self.means[k] += shift[0] / mass[k]
                squares -= shift[0].double().square() / mass[k]
                continue
            z = torch.linalg.solve_triangular(cholesky[k].T, a[k] @ (y * scale).T, upper=True).T
            cross, latent = z.T @ weighted, r @ z
            second = z.T @ (z * r.unsqueeze(1)) + mass[k] * torch.cholesky_inverse(cholesky[k])
            gram = torch.cat([torch.cat([second, latent.unsqueeze(1)], 1), torch.cat([latent, mass[k : k + 1]])[None]])
            products = torch.cat([cross, shift])
            fitted = torch.linalg.solve(gram.double(), products.double())
            squares -= (fitted * products.double()).sum(0)
            self.loadings[k] = fitted[:-1].T.float()
            self.means[k] += fitted[-1].float()
        self.noise = torch.maximum((squares / mass.sum()).float(), self.floor)
        if not self.is_warm:
            self.noise = self.noise.mean().expand_as(self.noise).clone()
        self.log_weights = ((mass + 1e-6) / (mass + 1e-6).sum()).log()


def by_key(keys: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """The positions of all keys below `count`, sorted by key, and how many each key has.

    A key of 16 bits is sorted by digits, several times as fast as a comparison sort of longer ones.
    """
    found = keys.numpy().astype("uint16" if count < 1 << 16 else "uint32")
    rows = keys.bincount(minlength=count)[:count]
    return torch.from_numpy(found.argsort(kind="stable"))[: int(rows.sum())], rows.tolist()
