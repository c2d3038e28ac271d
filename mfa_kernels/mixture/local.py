"""A mixture that one process holds whole: densities, posteriors, draws, cached Woodbury terms."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from mfa_kernels import ops
from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import check_component, check_generator, check_integer, check_integers, check_positive
from mfa_kernels.common.modes import door
from mfa_kernels.common.moved import RenamedAttribute
from mfa_kernels.mixture import functional
from mfa_kernels.mixture.base import Mixture, Parameters
from mfa_kernels.mixture.screening import DRAWS, ModelScreen, tuned
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.scan.error_bound import error_bound
from mfa_kernels.ops.scan.types import SLOTS
from mfa_kernels.ops.screen import differentiable
from mfa_kernels.ops.screen.op import serves
from mfa_kernels.ops.screen.types import AnyScreen


class LocalMixture(Mixture):
    """A mixture that one process holds whole: the methods that an `MFA` has and a `ShardedMFA` has not.

    Attributes:
        evaluated: after a call that was screened (see `screen`), components per token whose logit was computed, int32;
            -1 where the token took the dense scan. None otherwise.
    """

    evaluated: Tensor | None = None
    _screen: ModelScreen | None = None
    _cache: tuple[Any, tuple[Tensor, ...], Parameters, ops.Woodbury] | None = None

    def woodbury(self) -> ops.Woodbury:
        """Returns the Woodbury terms of these parameters, outside autograd; kept until a parameter changes."""
        return self.prepared()[1]

    factors = RenamedAttribute("woodbury")

    def refresh(self) -> None:
        """Forgets the Woodbury terms. Needed only after a change that PyTorch does not count, as through
        `parameter.data`."""
        self._cache = None

    def prepared(self) -> tuple[Parameters, ops.Woodbury]:
        """Returns detached parameters in the compute dtype and their Woodbury terms, kept until a parameter changes."""
        sources = (self.means, self.loadings, self.log_noise, self.weight_logits, self.center)
        if torch.compiler.is_compiling():
            return self._factorize()
        if self._is_training_step() or any(t.is_inference() for t in sources):
            # While training, what is kept cannot be trusted: fused optimisers do not bump `tensor._version`.
            self.refresh()
            return self._factorize()
        key = (self.noise_floor, *(t._version for t in sources))
        if self._cache is None or self._cache[0] != key or any(a is not b for a, b in zip(self._cache[1], sources)):
            self._cache = (key, sources, *self._factorize())
        return self._cache[2:]

    def _is_training_step(self) -> bool:
        """True where gradients to the parameters are wanted."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def _factorize(self) -> tuple[Parameters, ops.Woodbury]:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # The terms may be used outside inference mode, and saved there for a backward pass.
            with torch.inference_mode(False):
                return self._factorize()
        with torch.no_grad():
            parameters = self.parameters_in_compute_dtype()
            return parameters, ops.factorize(*parameters[:3], self.center)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": None, "_screen": None, "evaluated": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.inference_mode(False), torch.no_grad():  # a copy made in inference mode has tensors of that mode
            for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
                if tensor.is_inference():
                    own = tensor.clone()
                    setattr(self, name, nn.Parameter(own, tensor.requires_grad) if name in self._parameters else own)

    @door
    @torch.no_grad()
    def screen(self, x: Tensor | None = None) -> bool:
        """Turns certified screening on: from now, most components are ruled out by bounds instead of being computed.

        Results agree with the dense scan's to rounding (`mfa_kernels/ops/screen/README.md`), gradients too. It serves
        `forward`, `log_prob`, `encode`, `assign`, `reconstruct` and the gates of `steer`. Until the parameters change,
        the bounds made here are used; making them takes longer than the dense scan of ten thousand tokens
        (`bench/RESULTS.md`, "Screening, CPU"). After a change, as in training, a batch that is large enough to pay for
        it renews them on the same coordinates. Smaller batches take the dense scan, and so do all once the bounds rule
        out too little.

        Args:
            x: (..., D), a few hundred tokens like those to come: they decide how many coordinates the bounds use. None
                draws them from the mixture itself.

        Returns:
            True where screening is on. False where the dense scan costs less on x (diffuse mixtures), for noise per
            component, and where neither the C++ kernels nor Triton serve the mixture. On a GPU, training steps take
            the dense scan.
        """
        self._screen = self.evaluated = None
        found = ModelScreen(self.woodbury())
        if serves(found.woodbury):
            x = self.sample(DRAWS, torch.Generator(self.means.device).manual_seed(0)) if x is None else x
            found = tuned(self, self.flattened(x)[0])
        self._screen = found
        return found.screen is not None

    @torch.no_grad()
    def screened(self) -> tuple[bool, AnyScreen | None]:
        """Returns (tried, screen): whether screening was tuned for the current parameters, and its screen, None where
        the dense scan costs less."""
        if self._screen is None or self._screen.woodbury is not self.woodbury():
            return False, None
        return True, self._screen.screen

    def active_pairs(self, x: Tensor, slots: int = SLOTS) -> ops.ActivePairs:
        """Returns log p(x) and the active pairs of x (N, D); differentiable when gradients are on."""
        return self._scan(x, slots)[0]

    def _scan(self, x: Tensor, slots: int) -> tuple[ops.ActivePairs, Tensor | None]:
        """The active pairs, and the bound (N,) on what a screen left out, where one was used."""
        detached, woodbury = self.prepared()
        training = self._is_training_step()
        parameters = self.parameters_in_compute_dtype() if training else detached
        if not torch.compiler.is_compiling():
            self.evaluated = None
            # On a GPU, stage 0 of the bounds, in float64, would cost a training step more than the scan saves.
            state = None if training and x.is_cuda else self._screen
            screen = None if state is None else state.following(self, detached, woodbury, len(x))
            if screen is not None:
                found = differentiable.log_prob(x, parameters, woodbury, screen, slots)
                self.evaluated = found.evaluated
                if len(x):
                    self._screen = ModelScreen(woodbury, screen, found.evaluated)
                return found.active, found.dropped
        return ops.log_prob(x, *parameters, woodbury, slots, exact=self.precision != "fast"), None

    @overload
    def log_prob(self, x: Tensor, return_error_bound: Literal[False] = False) -> Tensor: ...
    @overload
    def log_prob(self, x: Tensor, return_error_bound: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def log_prob(self, x: Tensor, return_error_bound: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """log p(x) per token: (..., D) -> (...). NaN for a token that is not finite, or so far out that its
        density overflows the dtype; other tokens are not affected.

        Args:
            x: (..., D).
            return_error_bound: whether to return also a bound on the error of log p(x), (...) float64, in nats, from
                rounding and from components that were left out (`mfa_kernels/ops/scan/README.md`). It needs precision
                "exact". It is a guarantee, not an estimate: it allows every rounding to be as large as possible and in
                one direction. It grows with the squared Mahalanobis distance under the noise; actual errors are
                typically some hundred times smaller. Two values that differ by more than the sum of their bounds are
                certain to differ.
        """
        if not return_error_bound:
            return super().log_prob(x)
        flat, lead = self.flattened(x)
        if self.precision != "exact":
            raise ValueError(f'return_error_bound needs precision "exact", the mixture has {self.precision!r}')
        active, dropped = self._scan(flat, SLOTS)
        bound = error_bound(flat, *self.prepared(), active, dropped)
        return active.log_prob.reshape(lead), bound.reshape(lead)

    def _log_density(self, x: Tensor) -> Tensor:
        if self.precision == "reference":
            return functional.plain(reference.log_prob, x, *self.parameters_in_compute_dtype())
        return super()._log_density(x)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log p(x | k) for every component: (..., D) -> (..., K). Dense; the weights are not included."""
        flat, lead = self.flattened(x)
        parameters = self.parameters_in_compute_dtype()[:3]
        if self.precision == "reference":
            out = functional.plain(reference.component_log_prob, flat, *parameters)
        else:
            out = ops.component_log_prob(flat, *parameters, self.woodbury())
        return out.reshape(*lead, self.n_components)

    def responsibilities(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """p(k | x), dense: (..., D) -> (..., K). softmax((log pi + log p(x|k)) / temperature), eq. 8."""
        if not torch.compiler.is_compiling():
            temperature = check_positive(temperature, "temperature")
        log_weights = self.parameters_in_compute_dtype()[3]
        return ((self.component_log_prob(x) + log_weights) / temperature).softmax(-1)

    def posterior(self, x: Tensor, component: int | Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and covariance of p(z | x, k), which is normal.

        Args:
            x: (..., D).
            component: an int, or an integer tensor that broadcasts to (...).

        Returns:
            mean (..., R) and covariance M_k^-1, (R, R) for an int, else (..., R, R).
        """
        flat, lead = self.flattened(x)
        cholesky = self.woodbury().cholesky
        if isinstance(component, Tensor) or is_several(component):
            component = check_integers(component, "component")
            try:
                index = component.to(flat.device).expand(lead).reshape(-1).long()
            except (RuntimeError, NotImplementedError) as error:  # a tensor on the meta device has no values to read
                raise ValueError(
                    f"component must broadcast to {tuple(lead)}, as x has it, got {tuple(component.shape)} on "
                    f"{component.device}"
                ) from error
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= self.n_components):
                raise IndexError(
                    f"component must be in [0, {self.n_components}), got values from {int(index.min())} to "
                    f"{int(index.max())}"
                )
            covariance = torch.cholesky_inverse(cholesky[index]).reshape(*lead, self.rank, self.rank)
        else:
            k = check_component(component, self.n_components)
            index = torch.full((flat.shape[0],), k, device=flat.device)
            covariance = torch.cholesky_inverse(cholesky[k])
        mean = self._latents(flat, index.int().unsqueeze(-1)).squeeze(1)
        return mean.reshape(*lead, self.rank), covariance

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws from the mixture, (n, D). ValueError where so many do not fit into memory."""
        n, generator = check_integer(n, "n"), check_generator(generator)
        means, loadings, noise_variance, log_weights = self.parameters_in_compute_dtype()
        like: dict[str, Any] = {"generator": generator, "device": means.device, "dtype": means.dtype}
        try:
            uniform = torch.rand(n, **like)
            z, noise = torch.randn(n, self.rank, **like), torch.randn(n, self.n_features, **like)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the allocator of a CPU raises RuntimeError, not OutOfMemoryError
            raise ValueError(f"n must be a number of draws that fit into memory, got {n}") from error
        components = torch.searchsorted(log_weights.exp().cumsum(0), uniform).clamp_max(self.n_components - 1)
        noise *= noise_variance.expand_as(means)[components].sqrt()
        ones = torch.ones(n, 1, dtype=means.dtype, device=means.device)
        return ops.decode(components.int().unsqueeze(-1), ones, z.unsqueeze(1), means, loadings) + noise
