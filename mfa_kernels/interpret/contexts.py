"""Contexts of a region: the tokens that it owns, and the text around them.

The rows of a region are those it is the most responsible for; measured mixtures of real activations are almost
one-hot. One pass over the activations (`assignments`) finds them, and everything else here reads its result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from mfa_kernels.common import checks
from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.precision import full_precision
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.mixture.decomposition import Decomposition, check_decomposition
from mfa_kernels.mixture.local import LocalMixture
from mfa_kernels.mixture.screening import pays_for_rows

if TYPE_CHECKING:
    from mfa_kernels.data.store import ActivationStore
    from mfa_kernels.mixture.codes import Code

BATCH_SIZE = 8192
_SAMPLE_ROWS = 256  # to tune a screen on
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_LARGEST_ID = (1 << 31) - 1
_LOOKED_AT = 50  # rows read per context wanted, at most, since some regions repeat one text


def show_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as one line of text: ⏎ and ⇥ for line ends and tabs, escapes for what else cannot be printed."""
    if not len(ids):
        return ""
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    # SentencePiece tokenizers drop the space that a text begins with; the piece still has it.
    if str(tokenizer.convert_ids_to_tokens(int(ids[0]))).startswith("▁") and not text.startswith(" "):
        text = " " + text
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def show_token(tokenizer: Any, token_id: int) -> str:
    """One token with every space visible: "·the", "⏎", "····"; its piece where it is not whole characters.

    An id that the tokenizer does not know, as where a model has more rows than that has tokens, is shown as "<id 40>".
    """
    token_id = checks.check_integer(token_id, "token_id", 0, _LARGEST_ID)
    check_tokenizer(tokenizer)
    try:
        piece = tokenizer.convert_ids_to_tokens(token_id)
    except IndexError:  # so says SentencePiece
        piece = None
    if piece is None:
        return show_id(token_id)
    text = show_text(tokenizer, [token_id])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(piece)
    return text.replace(" ", "·")


def show_id(token_id: int) -> str:
    """A token of which nothing else is known: unlike any text, and unlike the token of a number."""
    return f"<id {token_id}>"


@dataclass(frozen=True)
class Context:
    """A row of a store in its text.

    Attributes:
        row: its number in the store.
        component: the region it belongs to.
        score: what it was ranked by.
        token_id: its token.
        token: as `show_token` gives it.
        before, after: the text around it, as `show_text` gives it.
    """

    row: int
    component: int
    score: float
    token_id: int
    token: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}⟦{self.token}⟧{self.after}"


@dataclass(frozen=True, eq=False)
class Assignments:
    """The region and responsibility of each of N rows, on the CPU.

    Attributes:
        components: the most responsible component, (N,) int32; -1 for a row that is not finite.
        responsibilities: p(component | x), (N,); NaN for a row that is not finite, as below.
        distances: Mahalanobis distance to the centroid, in standard deviations of the component, (N,). Most rows are
            near sqrt(D). For a decomposition that is no `MFA`: Euclidean distance to what the component alone decodes
            to, which for K-means is the centroid.
        latents: E[z | x, component], (N, R), if asked for.
        n_components: K.
    """

    components: Tensor
    responsibilities: Tensor
    distances: Tensor
    latents: Tensor | None
    n_components: int

    @cached_property
    def _groups(self) -> tuple[Tensor, list[int]]:
        """Rows in the order of their components, and where each component begins among them."""
        counts = torch.bincount(self.components + 1, minlength=self.n_components + 1)
        return self.components.argsort(stable=True), counts.cumsum(0).tolist()

    @property
    def skipped(self) -> int:
        """Rows that are not finite and belong to no component."""
        return self._groups[1][0]

    @property
    def counts(self) -> Tensor:
        """Rows of each component, (K,) int64."""
        return torch.tensor(self._groups[1]).diff()

    def rows(self, component: int) -> Tensor:
        """Returns the rows of a component, int64, ascending."""
        k = checks.check_component(component, self.n_components)
        order, starts = self._groups
        return order[starts[k] : starts[k + 1]]


@torch.no_grad()
def assignments(
    mfa: Decomposition,
    store: ActivationStore,
    *,
    latents: bool = False,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> Assignments:
    """Reads the activations once, for the most responsible component of every row.

    Where the C++ kernels serve the mixture, many rows are screened, as after `mfa.screen()`. The mixture is left as it
    is, screened or not.

    Args:
        mfa: the mixture, on any device, or another decomposition, such as what `kmeans` returned.
        store: N rows of its width.
        latents: keep the latents of every row too, 4 R bytes each; the rest is 12 bytes a row.
        batch_size: rows at once; changes no result.
        progress: show a progress bar.

    Raises:
        ValueError: the store has another width than the mixture, or no rows.
    """
    check_store(store)
    progress = checks.check_flag(progress, "progress")
    batch_size = checks.check_integer(batch_size, "batch_size", 1)
    if store.n_features != check_decomposition(mfa).n_features:
        raise ValueError(f"store has {store.n_features} features, but the mixture has {mfa.n_features}")
    n = len(store)
    if n == 0:
        raise ValueError("store has no rows")
    components = torch.empty(n, dtype=torch.int32)
    responsibilities, distances = torch.empty(2, n)
    like = mfa.directions(0)
    kept = torch.empty(n, len(like)) if latents else None
    distances_of = partial(_euclidean, mfa)
    if isinstance(mfa, LocalMixture):
        mfa = _screened(mfa, store)
        distances_of = partial(_mahalanobis, mfa)
    start = 0
    with progress_bar(total=n, desc="assign", unit="row", unit_scale=True, progress=progress) as bar:
        for batch in store.batches(batch_size):
            x = batch.to(like.device)
            code = mfa.code(x, top_k=1)
            k = code.components[:, 0]
            here = slice(start, start + len(x))
            components[here] = k
            responsibilities[here] = code.responsibilities[:, 0]
            distances[here] = distances_of(x, code).masked_fill_(k < 0, torch.nan)
            if kept is not None:
                kept[here] = code.latents[:, 0].masked_fill(k.unsqueeze(-1) < 0, torch.nan)
            start += len(x)
            bar.update(len(x))
    return Assignments(components, responsibilities, distances, kept, mfa.n_components)


def _screened(mfa: LocalMixture, store: ActivationStore) -> LocalMixture:
    """The mixture for a pass over the store: a copy with a screen of its own where there is none yet and it pays."""
    n = len(store)
    if not pays_for_rows(mfa.woodbury(), n) or mfa.screened()[0]:
        return mfa
    own = copy.copy(mfa)  # the same parameters
    sample = store.rows(torch.linspace(0, n - 1, _SAMPLE_ROWS).round().long())
    own.screen(sample[sample.isfinite().all(-1)].to(mfa.means.device))
    return own


def _euclidean(mfa: Decomposition, x: Tensor, code: Code) -> Tensor:
    """|x - what the first component of the code alone decodes to|, (B,)."""
    return (x - mfa.decode(code.hard())).norm(dim=-1)


def _mahalanobis(mfa: LocalMixture, x: Tensor, code: Code) -> Tensor:
    """sqrt((x - mu_k)^T C_k^-1 (x - mu_k)), (B,): |lam (x - mu_k)|^2 - |L_k^T z|^2, by the Woodbury identity."""
    (means, _, noise, _), woodbury = mfa.prepared()
    k, z, cholesky = code.components[:, 0].clamp_min(0), code.latents[:, 0], woodbury.cholesky
    noise = noise if noise.dim() == 1 else noise[k]
    outside = ((x.to(means.dtype) - means[k]).square() / noise).sum(-1)
    with full_precision(x):
        inside = (cholesky[k].mT @ z.unsqueeze(-1)).squeeze(-1).square().sum(-1)
    return (outside - inside).clamp_min(0).sqrt()


def region_latents(mfa: Decomposition, store: ActivationStore, component: int, assigned: Assignments) -> Tensor:
    """E[z | x, component] of the rows of a component, (n, R), on the CPU; only these rows are read."""
    rows = assigned.rows(component)
    if assigned.latents is not None:
        return assigned.latents[rows]
    if not isinstance(mfa, LocalMixture):
        raise TypeError(f"mfa must have a posterior, or assigned latents, got {type(mfa).__name__}, which has none")
    with torch.no_grad():
        parts = [
            mfa.posterior(store.rows(part).to(mfa.means.device), component)[0].cpu() for part in rows.split(BATCH_SIZE)
        ]
    return torch.cat(parts).float() if parts else torch.empty(0, mfa.rank)


def ensure_assignments(
    mfa: Decomposition, store: ActivationStore, assigned: Assignments | None, progress: bool
) -> Assignments:
    """Returns `assigned` if it can be of this mixture and store, computed when None; raises otherwise."""
    check_store(store)
    check_decomposition(mfa)
    if assigned is None:
        return assignments(mfa, store, progress=progress)
    if not isinstance(assigned, Assignments):
        raise TypeError(f"assigned must be what `assignments` returned, got {type(assigned).__name__}")
    checks.check_flag(progress, "progress")
    if len(assigned.components) != len(store) or assigned.n_components != mfa.n_components:
        raise ValueError(
            f"assigned holds {len(assigned.components)} rows and {assigned.n_components} components, "
            f"but store and mfa have {len(store)} and {mfa.n_components}"
        )
    return assigned


def check_store(store: Any) -> None:
    """Raises unless something has the rows of activations and where they come from."""
    if not all(hasattr(store, name) for name in ("n_features", "rows", "batches", "context", "document_tokens")):
        raise TypeError(f"store must be an ActivationStore, as `harvest` makes it, got {type(store).__name__}")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises unless something turns ids into text."""
    if not hasattr(tokenizer, "decode") or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")


def check_axis(mfa: Decomposition, axis: int) -> int:
    """`axis` if the mixture has such a latent; raises otherwise."""
    return checks.check_component(axis, len(mfa.directions(0)), "axis")


def _read(
    store: ActivationStore, tokenizer: Any, component: int, before: int, after: int, row: int, score: float
) -> Context:
    ids, at = store.context(row, before, after)
    texts = show_text(tokenizer, ids[:at]), show_text(tokenizer, ids[at + 1 :])
    return Context(row, component, score, ids[at], show_token(tokenizer, ids[at]), *texts)


def _read_distinct(read: Callable[[int, float], Context], rows: Tensor, scores: Tensor, n: int) -> list[Context]:
    """The first n of these rows whose text is not one that came before."""
    found: dict[str, Context] = {}
    for row, score in zip(rows[: n * _LOOKED_AT].tolist(), scores[: n * _LOOKED_AT].tolist()):
        if len(found) == n:
            break
        context = read(row, score)
        found.setdefault(str(context), context)
    return list(found.values())


@overload
def top_contexts(
    mfa: Decomposition, store: ActivationStore, tokenizer: Any, component: int, n: int = ..., by: str = ...,
    *, axis: int | None = ..., sign: int = ..., before: int = ..., after: int = ...,
    assigned: Assignments | None = ..., progress: bool = ...,
) -> list[Context]: ...  # fmt: skip
@overload
def top_contexts(
    mfa: Decomposition, store: ActivationStore, tokenizer: Any, component: Sequence[int], n: int = ...,
    by: str = ..., *, axis: int | None = ..., sign: int = ..., before: int = ..., after: int = ...,
    assigned: Assignments | None = ..., progress: bool = ...,
) -> dict[int, list[Context]]: ...  # fmt: skip
def top_contexts(
    mfa: Decomposition,
    store: ActivationStore,
    tokenizer: Any,
    component: int | Sequence[int],
    n: int = 20,
    by: str = "responsibility",
    *,
    axis: int | None = None,
    sign: int = 1,
    before: int = 10,
    after: int = 10,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> list[Context] | dict[int, list[Context]]:
    """Returns the rows of a region that show it best, in their text; texts that repeat are shown once.

    Args:
        mfa: the mixture, or another decomposition; by="latent" needs one with local directions.
        store: activations with their tokens.
        tokenizer: the Hugging Face tokenizer of these tokens.
        component: a region, or several, all served by one pass over the data.
        n: contexts per region; fewer come back where its best 50 n rows have fewer different ones.
        by: "responsibility" (many rows have a responsibility that rounds to 1: among equals, the nearest first),
            "distance" (as in `Assignments.distances`, the nearest first), or "latent" (largest sign * z_axis).
        axis: of the latent, for by="latent".
        sign: +1 or -1, for by="latent".
        before, after: tokens of text on either side.
        assigned: what `assignments` returned for this mixture and store; computed here when None.
        progress: show a progress bar.

    Returns:
        Contexts, best first, with r, the distance or z_axis as score; for several regions, a dict of such lists.
    """
    checks.check_choice(by, ("responsibility", "distance", "latent"), "by")
    check_decomposition(mfa)
    check_tokenizer(tokenizer)
    progress, n = checks.check_flag(progress, "progress"), checks.check_integer(n, "n", 1)
    before, after = checks.check_integer(before, "before"), checks.check_integer(after, "after")
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    if by == "latent":
        if axis is None:
            raise ValueError('axis: by="latent" needs the index of a latent, got None')
        axis = check_axis(mfa, axis)
    is_one = not is_several(component) and not isinstance(component, range)
    components = (
        [checks.check_component(component, mfa.n_components)]
        if is_one
        else checks.check_components(component, mfa.n_components, "component")
    )
    assigned = ensure_assignments(mfa, store, assigned, progress)
    result = {}
    for k in progress_bar(components, desc="contexts", unit="region", progress=progress and len(components) > 1):
        rows = assigned.rows(k)
        if by == "latent":
            score = region_latents(mfa, store, k, assigned)[:, axis]
            order = score.argsort(descending=sign > 0, stable=True)
        else:
            score = assigned.distances[rows]
            order = score.argsort(stable=True)
            if by == "responsibility":
                score = assigned.responsibilities[rows]
                order = order[score[order].argsort(descending=True, stable=True)]
        read = partial(_read, store, tokenizer, k, before, after)
        result[k] = _read_distinct(read, rows[order], score[order], n)
    return result[components[0]] if isinstance(component, int) else result


@dataclass(frozen=True)
class AxisContexts:
    """Contexts near one quantile of a latent axis inside a region.

    Attributes:
        quantile: in [0, 1]; 0 and 1 are the extremes.
        value: z at that quantile, in prior standard deviations (z ~ N(0, I)).
        contexts: ordered by z, which is their score.
    """

    quantile: float
    value: float
    contexts: list[Context]


def axis_contexts(
    mfa: Decomposition,
    store: ActivationStore,
    tokenizer: Any,
    component: int,
    axis: int,
    n: int = 5,
    quantiles: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    before: int = 10,
    after: int = 10,
    assigned: Assignments | None = None,
    progress: bool = True,
) -> list[AxisContexts]:
    """Returns contexts along one latent of a region, from one extreme of z_axis to the other.

    Single axes mean something once a rotation is chosen: `mfa.rotate("varimax")` or `mfa.rotate("principal")`.

    Args:
        mfa: the mixture.
        store: activations with their tokens.
        tokenizer: the Hugging Face tokenizer of these tokens.
        component: the region.
        axis: the latent, in [0, R).
        n: contexts per quantile, those of the rows nearest to it in rank; texts that repeat are shown once.
        quantiles: of z_axis over the rows of the region.
        before, after: tokens of text on either side.
        assigned: what `assignments` returned; computed here when None.
        progress: show a progress bar.

    Returns:
        One entry per quantile, in the order given; no entries for a region without rows.
    """
    component = checks.check_component(component, check_decomposition(mfa).n_components)
    axis = check_axis(mfa, axis)
    check_tokenizer(tokenizer)
    n = checks.check_integer(n, "n", 1)
    before, after = checks.check_integer(before, "before"), checks.check_integer(after, "after")
    given = checks.check_finite(checks.check_tensor(quantiles, "quantiles"), "quantiles").flatten()
    quantiles = [checks.check_number(q, "quantiles", 0, 1) for q in given.tolist()]
    assigned = ensure_assignments(mfa, store, assigned, progress)
    rows, z = assigned.rows(component), region_latents(mfa, store, component, assigned)[:, axis]
    return along_axis(store, tokenizer, component, rows, z, n, quantiles, before, after)


def along_axis(
    store: ActivationStore,
    tokenizer: Any,
    component: int,
    rows: Tensor,
    z: Tensor,
    n: int,
    quantiles: Sequence[float],
    before: int = 10,
    after: int = 10,
) -> list[AxisContexts]:
    """Returns `axis_contexts` of the rows of a region (n,), given one of their latents (n,)."""
    if not len(rows):
        return []
    z, order = z.sort(stable=True)
    rows = rows[order]
    read = partial(_read, store, tokenizer, component, before, after)
    groups = []
    for quantile in quantiles:
        at = round(quantile * (len(rows) - 1))
        nearest = (torch.arange(len(rows)) - at).abs().argsort(stable=True)
        contexts = _read_distinct(read, rows[nearest], z[nearest], n)
        groups.append(AxisContexts(quantile, float(z[at]), sorted(contexts, key=lambda c: c.score)))
    return groups
