"""Localization: which features of a site carry a causal variable, by interchange interventions.

For a pair of a base and a source, a causal model says what the network should answer if the variable had the source's
value. The features that a mask names are taken from the source (`MFAFeaturizer`, and the baselines here); the share of
pairs whose answer is then the expected one is the interchange intervention accuracy (IIA). The mask is learnt through
the frozen network:

    DBM   a gate sigmoid(theta / T) for each feature, T falling; hard gates theta > 0 afterwards
    DAS   no gates: k orthonormal directions, learnt

Source: the causal-variable track of MIB (arXiv 2504.13151), its protocol and defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import (
    check_callable,
    check_floats,
    check_integer,
    check_integers,
    check_number,
    check_positive,
    check_tensor,
    is_flag,
    shown,
)
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.mixture.codes import Code

Logits = Callable[[Tensor, Tensor], Tensor]
"""(patched activations (n, D), numbers of their pairs (n,)) -> logits (n, V): the frozen network above the site."""


class Featurizer(Protocol):
    """What a mask is learnt for."""

    n_masked: int

    def interchange(self, base: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """Base activations (n, D) with the masked features of the sources.

        One with `code(x)` takes what that returned as `base_code` and `source_code` too: codes are then computed once.
        """


class LinearFeaturizer:
    """Coordinates along orthonormal directions: neurons, principal components, random ones.

    Args:
        directions: (D, k), orthonormal columns; None: the D axes, neurons.
    """

    def __init__(self, directions: Any = None, *, n_features: int | None = None) -> None:
        self.directions = None if directions is None else check_floats(directions, "directions")
        if self.directions is None:
            self.n_masked = check_integer(n_features, "n_features", 1)
            return
        if self.directions.dim() != 2 or self.directions.shape[0] < self.directions.shape[1]:
            raise ValueError(f"directions must have shape (D, k) with k <= D, got {tuple(self.directions.shape)}")
        gram = self.directions.mT @ self.directions
        if not torch.allclose(gram, torch.eye(len(gram)).to(gram), atol=1e-3):
            raise ValueError("directions must be orthonormal columns: torch.linalg.qr(directions).Q")
        self.n_masked = self.directions.shape[1]

    @classmethod
    def principal(cls, x: Any, k: int | None = None) -> LinearFeaturizer:
        """The k principal directions of activations (N, D), all where k is None."""
        x = check_floats(x, "x")
        _, _, directions = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
        return cls(directions[:k].mT.float().contiguous())

    @classmethod
    def random(cls, n_features: int, k: int, seed: int = 0) -> LinearFeaturizer:
        """k random orthonormal directions of D features."""
        generator = torch.Generator().manual_seed(check_integer(seed, "seed"))
        return cls(torch.linalg.qr(torch.randn(n_features, k, generator=generator)).Q)

    def interchange(self, base: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """See `Featurizer`."""
        if self.directions is None:
            return base + mask.to(base) * (source - base)
        directions = self.directions.to(base)
        return base + (((source - base) @ directions) * mask.to(base)) @ directions.mT


class DictionaryFeaturizer:
    """Features of a sparse autoencoder, or any encoder and decoder; the base's error is kept.

    Args:
        encode: (n, D) -> (n, F).
        decode: (n, F) -> (n, D).
        n_masked: F.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], n_masked: int) -> None:
        self.encode, self.decode = check_callable(encode, "encode"), check_callable(decode, "decode")
        self.n_masked = check_integer(n_masked, "n_masked", 1)

    def code(self, x: Tensor) -> Tensor:
        """The features of x (n, D): what `interchange` takes in place of computing them again; (n, F), dense."""
        return self.encode(x)

    def interchange(
        self,
        base: Tensor,
        source: Tensor | None,
        mask: Tensor,
        *,
        base_code: Tensor | None = None,
        source_code: Tensor | None = None,
    ) -> Tensor:
        """See `Featurizer`."""
        if source_code is None:
            assert source is not None
            source_code = self.encode(source)
        own, others = self.encode(base) if base_code is None else base_code, source_code
        return base + (self.decode(own + mask.to(own) * (others - own)) - self.decode(own))


@dataclass(frozen=True)
class Localization:
    """What `localize` finds, on the pairs that it has not trained on.

    Attributes:
        iia: interchange intervention accuracy with the hard mask (DAS: with its directions).
        iia_soft: with the gates as they were at the end of training; None for DAS, and for a mask that was given.
        cause, isolation: `iia` of the pairs whose answer changes with the variable, and of those whose answer has to
            stay; None where there are none, or it is not said which they are.
        n_selected, n_masked: features in the hard mask, and of how many; of DAS, directions and D.
        same_region: share of pairs whose base and source are in one region; None without a mixture.
        theta: what the gates are made of, (n_masked,); None for DAS, and for a mask that was given.
        directions: of DAS, (D, k); None otherwise.
        losses: cross entropy of each step of training, nats.
        right: of each pair that is judged, whether the answer with the hard mask is the expected one, (M,) bool.
        judged: numbers of these pairs, (M,).
    """

    iia: float
    iia_soft: float | None
    cause: float | None
    isolation: float | None
    n_selected: int
    n_masked: int
    same_region: float | None
    theta: Tensor | None = None
    directions: Tensor | None = None
    losses: list[float] = field(default_factory=list)
    right: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    judged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


def localize(
    logits: Logits,
    labels: Any,
    base: Any,
    source: Any,
    features: Featurizer | None = None,
    *,
    mask: Any = None,
    das: int | None = None,
    changes: Any = None,
    held_out: Any = 0.3,
    epochs: int = 8,
    batch_size: int = 64,
    lr: float = 0.01,
    penalty: float = 0.0,
    temperatures: tuple[float, float] = (1.0, 0.01),
    seed: int = 0,
    progress: bool = True,
) -> Localization:
    """Learns which features of a site carry a variable, and says how well they do on other pairs.

    Args:
        logits: (patched (n, D), pairs (n,)) -> (n, V): runs the network above the site for these pairs; differentiable.
        labels: the answers that the causal model expects, (N,) integers below V.
        base, source: activations at the site, (N, D), computed once: the layers below are frozen.
        features: what the mask chooses among; None with `das`.
        mask: a mask to be judged as it is, (n_masked,); None learns one.
        das: so many directions are learnt in place of a mask.
        changes: (N,) bool, true for pairs whose answer changes with the variable.
        held_out: pairs that are judged and not trained on: their share, the last ones; or which, (N,) bool. With `mask`
            and a share, all are judged.
        epochs: passes over the others.
        batch_size: pairs per step.
        lr: of AdamW.
        penalty: on the sum of the gates.
        temperatures: of the gates, at the first and the last step; linear in between.
        seed: of the order of the pairs and of DAS's start.
        progress: show a bar when it takes more than two seconds.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_callable(logits, "logits")
    base, source, labels = check_floats(base, "base"), check_floats(source, "source"), check_integers(labels, "labels")
    if base.dim() != 2 or source.shape != base.shape:
        raise ValueError(f"source must have the shape (N, D) of base, {tuple(base.shape)}, got {tuple(source.shape)}")
    if tuple(labels.shape) != base.shape[:1]:
        raise ValueError(f"labels must have shape ({len(base)},), one for each pair, got {tuple(labels.shape)}")
    source, labels = source.to(base), labels.to(base.device)
    if changes is not None:
        changes = check_tensor(changes, "changes").bool()
        if tuple(changes.shape) != base.shape[:1]:
            raise ValueError(f"changes must have shape ({len(base)},), got {tuple(changes.shape)}")
    if (features is None) == (das is None):
        raise ValueError(f"features or das must be given, and not both, got {shown(features)} and {das}")
    if das is not None and mask is not None:
        raise ValueError("mask needs features, which it is a mask of")
    penalty = check_number(penalty, "penalty", 0)
    epochs, batch_size = check_integer(epochs, "epochs"), check_integer(batch_size, "batch_size", 1)
    lr, (first, last) = check_positive(lr, "lr"), (check_positive(t, "temperatures") for t in temperatures)
    generator = torch.Generator().manual_seed(check_integer(seed, "seed"))
    trained, judged = _split(held_out, len(base), mask is not None)
    model: _Gates | _Rotation
    if das is not None:
        model = _Rotation(base, source, check_integer(das, "das", 1, base.shape[1]), generator)
    else:
        assert features is not None
        model = _Gates(base, source, features, None if mask is None else check_tensor(mask, "mask"))
    model.to(base.device)
    losses: list[float] = []
    if mask is None:
        steps = epochs * -(-len(trained) // batch_size)
        learnt = list(model.parameters())
        optimizer = torch.optim.AdamW(learnt, lr=lr, weight_decay=0.0)
        order = (
            trained[n]
            for _ in range(epochs)
            for n in torch.randperm(len(trained), generator=generator).split(batch_size)
        )
        with progress_bar(total=steps, desc="localize", unit=" steps", delay=2, progress=progress) as bar:
            for step, numbers in enumerate(order):
                temperature = first + (last - first) * step / max(1, steps - 1)
                loss = nn.functional.cross_entropy(logits(model(numbers, temperature), numbers), labels[numbers])
                # Of the gates alone: a mixture or a network that could be trained keeps the gradients that it has.
                whole = loss + penalty * model.size(temperature)
                for parameter, gradient in zip(learnt, torch.autograd.grad(whole, learnt)):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.update(1)

    @torch.no_grad()
    def right(temperature: float | None) -> Tensor:
        parts = [logits(model(n, temperature), n).argmax(-1) == labels[n] for n in judged.split(batch_size)]
        return torch.cat(parts).double().cpu()

    hard = right(None)
    own = None if changes is None else changes[judged].cpu()
    has_gates = isinstance(model, _Gates) and mask is None
    return Localization(
        iia=float(hard.mean()),
        iia_soft=float(right(last).mean()) if has_gates else None,
        cause=_share(hard, own),
        isolation=_share(hard, None if own is None else ~own),
        n_selected=model.selected(),
        n_masked=base.shape[1] if features is None else features.n_masked,
        same_region=model.same_region(judged) if isinstance(model, _Gates) else None,
        theta=model.theta.detach() if isinstance(model, _Gates) and has_gates else None,
        directions=model.directions().detach() if isinstance(model, _Rotation) else None,
        losses=losses,
        right=hard.bool(),
        judged=judged,
    )


def _split(held_out: Any, count: int, is_given: bool) -> tuple[Tensor, Tensor]:
    """Numbers of pairs to train on, and to judge by."""
    if is_flag(held_out) or not is_several(held_out):
        share = check_number(held_out, "held_out", 0, 1)
        apart = count if is_given else max(1, round(share * count))
        which = torch.arange(count) >= count - apart
    else:
        which = check_tensor(held_out, "held_out").cpu()
        if which.dtype != torch.bool or tuple(which.shape) != (count,):
            raise ValueError(f"held_out must be a share, or bool ({count},), got {which.dtype} {tuple(which.shape)}")
    trained, judged = (~which).nonzero()[:, 0], which.nonzero()[:, 0]
    if not len(judged) or (not is_given and not len(trained)):
        raise ValueError(
            f"held_out must leave pairs to train on and pairs to judge by, got {len(trained)} and {len(judged)}"
        )
    return trained, judged


class _Gates(nn.Module):
    """A gate for each entry of a mask: sigmoid(theta / T), or theta > 0 where there is no temperature.

    Codes of a mixture do not change while a mask is learnt: they are computed once.
    """

    def __init__(self, base: Tensor, source: Tensor, features: Featurizer, mask: Tensor | None) -> None:
        super().__init__()
        self.base, self.source, self.features = base, source, features
        _check_features(features, base, source)
        with torch.no_grad():
            code: Any = getattr(features, "code", None)
            self.codes = [] if code is None else [code(x) for x in (base, source)]
        if mask is not None and tuple(mask.shape) != (features.n_masked,):
            raise ValueError(f"mask must have shape ({features.n_masked},), got {tuple(mask.shape)}")
        self.theta = nn.Parameter(torch.zeros(features.n_masked))
        self.register_buffer("mask", mask)

    def gates(self, temperature: float | None) -> Tensor:
        if self.mask is not None:
            found: Any = self.mask
            return found
        return (self.theta > 0).to(self.theta) if temperature is None else (self.theta / temperature).sigmoid()

    def same_region(self, numbers: Tensor) -> float | None:
        """The share of pairs whose base and source are in one region of a mixture."""
        if not self.codes or not isinstance(self.codes[0], Code):
            return None
        base, source = (code.components[numbers, 0] for code in self.codes)
        return float((base == source).double().mean())

    def size(self, temperature: float | None) -> Tensor:
        return self.gates(temperature).sum()

    def selected(self) -> int:
        return int((self.gates(None) > 0).sum())

    def forward(self, numbers: Tensor, temperature: float | None) -> Tensor:
        base, source, gates = self.base[numbers], self.source[numbers], self.gates(temperature)
        if not self.codes:
            return self.features.interchange(base, source, gates)
        own, others = (_rows(code, numbers) for code in self.codes)
        featurizer: Any = self.features
        return featurizer.interchange(base, source, gates, base_code=own, source_code=others)


@torch.no_grad()
def _check_features(features: Featurizer, base: Tensor, source: Tensor) -> None:
    """Tries a pair, so that a featurizer of another width is told as that."""
    width = base.shape[1]
    try:
        found = features.interchange(base[:1], source[:1], torch.zeros(features.n_masked, device=base.device))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"features: {shown(features)} takes no activations of width {width}: {error}") from error
    if tuple(found.shape) != (1, width):
        raise ValueError(f"features must make activations of width {width}, got shape {tuple(found.shape)} for one")


def _rows(code: Any, numbers: Tensor) -> Any:
    """The codes of some pairs: of a mixture, or of an encoder."""
    return (
        Code(**{name: part[numbers] for name, part in vars(code).items()}) if isinstance(code, Code) else code[numbers]
    )


class _Rotation(nn.Module):
    """k orthonormal directions, along which the coordinates are the source's."""

    def __init__(self, base: Tensor, source: Tensor, k: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.source = base, source
        linear = nn.Linear(k, base.shape[1], bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.linalg.qr(torch.randn(base.shape[1], k, generator=generator)).Q)
        self.linear = torch.nn.utils.parametrizations.orthogonal(linear)

    def directions(self) -> Tensor:
        found: Any = self.linear.weight
        return found

    def size(self, temperature: float | None) -> Tensor:
        return self.directions().new_zeros(())  # nothing to make smaller

    def selected(self) -> int:
        return self.directions().shape[1]

    def forward(self, numbers: Tensor, temperature: float | None) -> Tensor:
        directions, base = self.directions().to(self.base), self.base[numbers]
        return base + ((self.source[numbers] - base) @ directions) @ directions.mT


def _share(right: Tensor, of: Tensor | None) -> float | None:
    """The mean over some pairs; None of none."""
    return None if of is None or not of.any() else float(right[of].mean())
