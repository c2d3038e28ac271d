"""The mixture of factor analyzers as a thin torch.nn.Module: parameters, and methods that call the operators."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from mfa_kernels import ops
from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.checks import (
    MOST_COMPONENTS,
    check_activations,
    check_centroids,
    check_choice,
    check_component,
    check_device,
    check_dtype,
    check_finite,
    check_flag,
    check_floats,
    check_generator,
    check_integer,
    check_integers,
    check_number,
    check_parameters,
    check_positive,
)
from mfa_kernels.common.modes import door
from mfa_kernels.common.moved import renamed_attribute
from mfa_kernels.common.precision import no_autocast
from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.mixture import functional
from mfa_kernels.mixture.codes import Code, checked_code, encoded
from mfa_kernels.ops.scan import reference
from mfa_kernels.ops.scan.types import SLOTS, activity_threshold
from mfa_kernels.ops.screen.cost import modelled_cost
from mfa_kernels.ops.screen.types import Screen

if TYPE_CHECKING:
    from mfa_kernels.ops.screen.types import AnyScreen

_Parameters = tuple[Tensor, Tensor, Tensor, Tensor]
_TOKENS_PER_CHUNK = 4096  # of `reconstruct`, so that a diffuse mixture does not hold N x K x R latents
_SCREEN_TOKENS = 256  # draws that stand for the tokens to come

_EXTRA_STATE = "_extra_state"  # its name in a state dict, which PyTorch gives it

NOISES = ("shared", "per_component")


class MFA(nn.Module):
    """p(x) = sum_k pi_k N(x; mu_k, W_k W_k^T + Psi): K Gaussian regions, each with R local directions.

    Source: "From Directions to Regions", arXiv 2602.02464, eq. 5-13.

    Args:
        n_components: K, regions.
        n_features: D, width of the activations.
        rank: R, local directions per region; 0 is a mixture of diagonal Gaussians.
        noise: "shared" (Psi is (D,)) or "per_component" (Psi is (K, D)).
        precision: "exact", "fast" or "reference"; see `mfa_kernels.mixture.functional.log_prob`.
        noise_floor: added to the noise variance, so that no dimension can collapse while training.
        device, dtype: of the parameters.

    Attributes:
        means: mu, parameter (K, D).
        loadings: W, parameter (K, D, R).
        log_noise: log(Psi - noise_floor), parameter (D,) or (K, D).
        weight_logits: parameter (K,); log pi is its log-softmax.
        center: buffer (D,), subtracted from x and means inside the kernels; changes no result, saves digits.
        noise_floor: see above. The density depends on it, so `state_dict` has it too, as what PyTorch calls extra
            state: a mixture of the same shape, dtype and precision loads a dict to the same bits. A dict without a
            floor, of earlier versions or from a file of weights, leaves the mixture its own.
        evaluated: after a call that was screened (see `screen`), components per token whose logit was computed, int32;
            -1 where the token took the dense scan. None otherwise.
    """

    fit_report: Any = None  # `mfa_kernels.fit` leaves its `FitReport` here, which is saved and loaded with the mixture
    processes: Processes = ALONE  # over which the components are spread: see `mfa_kernels.mixture.sharded`
    first_component = 0  # its number, of those held here

    def __init__(
        self,
        n_components: int,
        n_features: int,
        rank: int = 10,
        noise: str = "shared",
        *,
        precision: str = "exact",
        noise_floor: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_components = check_integer(n_components, "n_components", 1, MOST_COMPONENTS)
        n_features = check_integer(n_features, "n_features", 1, MOST_COMPONENTS)
        rank = check_integer(rank, "rank")
        if rank > n_features:
            raise ValueError(f"rank must be at most n_features = {n_features}, got {rank}")
        self.n_components, self.n_features, self.rank = n_components, n_features, rank
        self.noise = check_choice(noise, NOISES, "noise")
        self.precision = check_choice(precision, functional.PRECISIONS, "precision")
        self.noise_floor = check_number(noise_floor, "noise_floor", 0)
        device = device if device is None else check_device(device)
        dtype = dtype if dtype is None else check_dtype(dtype)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.means = nn.Parameter(torch.empty(n_components, n_features, **where))
        self.loadings = nn.Parameter(torch.empty(n_components, n_features, rank, **where))
        noise_shape = (n_features,) if noise == "shared" else (n_components, n_features)
        self.log_noise = nn.Parameter(torch.empty(noise_shape, **where))
        self.weight_logits = nn.Parameter(torch.empty(n_components, **where))
        self.center: Tensor
        self.register_buffer("center", torch.zeros(n_features, **where))
        self.extra: dict[str, Any] = {}  # kept in config.json: model, layer, whatever the user wants to remember
        self._cache: tuple[Any, tuple[Tensor, ...], _Parameters, ops.Woodbury] | None = None
        self._screen: tuple[ops.Woodbury, AnyScreen | None, Tensor | None] | None = None  # of what, and how it did last
        self.evaluated: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Standard normal means, loadings of unit expected column norm, noise variance 1, equal weights."""
        check_generator(generator)
        if self.means.is_meta:  # nothing to draw, and trying it makes PyTorch import its compiler: seconds
            return
        with torch.no_grad():
            self.means.normal_(generator=generator)
            self.loadings.normal_(generator=generator).mul_(self.n_features**-0.5)
            self.log_noise.zero_()
            self.weight_logits.zero_()

    def extra_repr(self) -> str:
        return (
            f"n_components={self.n_components}, n_features={self.n_features}, rank={self.rank}, "
            f"noise={self.noise!r}, precision={self.precision!r}"
        )

    @classmethod
    def _blank(cls, *args: Any, **kwargs: Any) -> MFA:
        """A mixture whose parameters are yet to be written, and have not been drawn from the global generator."""
        mfa = torch.nn.utils.skip_init(cls, *args, **kwargs)
        mfa.center.zero_()
        return mfa

    @classmethod
    @door
    def from_parameters(
        cls, means: Tensor, loadings: Tensor, noise_variance: Tensor, weights: Tensor, *, precision: str = "exact"
    ) -> MFA:
        """A mixture with these parameters; dtypes are promoted to one, everything is moved to the device of means.

        Args:
            means: (K, D).
            loadings: (K, D, R).
            noise_variance: (D,) or (K, D), positive.
            weights: pi, (K,), non-negative; normalised here.
            precision: as in the constructor.

        Raises:
            TypeError, ValueError: naming the argument that does not fit, or is not finite.
        """
        given = {"means": means, "loadings": loadings, "noise_variance": noise_variance, "weights": weights}
        tensors = {name: check_floats(value, name).detach() for name, value in given.items()}
        device, dtype = tensors["means"].device, tensors["means"].dtype
        for name, tensor in tensors.items():
            dtype = torch.promote_types(dtype, tensor.dtype)
            if tensor.is_meta and device.type != "meta":
                raise ValueError(f"{name} must hold values, got a tensor on the meta device")
        means, loadings, noise_variance, weights = (t.to(device=device, dtype=dtype) for t in tensors.values())
        check_parameters(means, loadings, noise_variance, weights, "weights")
        for name, tensor in (("means", means), ("loadings", loadings), ("noise_variance", noise_variance)):
            check_finite(tensor, name)
        if not (noise_variance > 0).all():
            raise ValueError(f"noise_variance must be positive, got a minimum of {noise_variance.min().item()}")
        if not (weights >= 0).all() or not 0 < weights.double().sum() < torch.finfo(dtype).max:
            raise ValueError("weights must be non-negative with a positive, finite sum")
        noise = "shared" if noise_variance.dim() == 1 else "per_component"
        components, features, rank = loadings.shape
        mfa = cls._blank(components, features, rank, noise, precision=precision, device=means.device, dtype=dtype)
        with torch.no_grad():
            mfa.means.copy_(means)
            mfa.loadings.copy_(loadings)
            mfa.log_noise.copy_(noise_variance.log())
            mfa.weight_logits.copy_((weights / weights.sum()).log())
        return mfa

    @classmethod
    @door
    def from_centroids(
        cls,
        centroids: Any,
        rank: int = 10,
        noise: str = "shared",
        *,
        noise_variance: Tensor | float = 1.0,
        generator: torch.Generator | None = None,
        precision: str = "exact",
    ) -> MFA:
        """Regions at K-means centroids (K, D), or those of what `kmeans` returned; loadings random, weights equal: the
        paper's start."""
        centroids, generator = check_centroids(centroids), check_generator(generator)
        check_finite(centroids, "centroids")
        variance = _variance(noise_variance, centroids, check_choice(noise, NOISES, "noise"))
        components, features = centroids.shape
        like: dict[str, Any] = {"device": centroids.device, "dtype": centroids.dtype}
        mfa = cls._blank(components, features, rank, noise, precision=precision, **like)
        mfa.reset_parameters(generator)
        with torch.no_grad():
            mfa.means.copy_(centroids)
            mfa.log_noise.copy_(variance.log())
            mfa.center.copy_(centroids.mean(0))
        return mfa

    @property
    def noise_variance(self) -> Tensor:
        """Psi, (D,) or (K, D)."""
        with no_autocast(self.log_noise):  # which on a GPU would give float32 where the mixture is in half precision
            return self.log_noise.exp() + self.noise_floor

    @property
    def log_weights(self) -> Tensor:
        """log pi, (K,)."""
        with no_autocast(self.weight_logits):
            return self.weight_logits.log_softmax(-1)

    def parameters_in_compute_dtype(self) -> _Parameters:
        """means, loadings, noise_variance, log_weights as the kernels take them: float32 or float64."""
        means, loadings = functional.compute_dtype(self.means, self.loadings)
        noise_variance, log_weights = functional.compute_dtype(self.noise_variance, self.log_weights)
        return means, loadings, noise_variance, log_weights

    def woodbury(self) -> ops.Woodbury:
        """Stage 0 of these parameters, outside autograd; kept until a parameter changes (see `refresh`)."""
        return self._prepared()[1]

    factors = renamed_attribute("woodbury")

    def refresh(self) -> None:
        """Forgets the Woodbury terms. Needed only after a change that PyTorch does not count, as through
        `parameter.data`."""
        self._cache = None

    @door
    @torch.no_grad()
    def screen(self, x: Tensor | None = None, *, neighbors: bool | None = None) -> bool:
        """Turns certified screening on: from now, most components are ruled out by bounds instead of being computed.

        Results agree with the dense scan's to rounding (`mfa_kernels/ops/screen/README.md`), gradients too. It serves
        `forward`, `log_prob`, `encode`, `assign`, `reconstruct` and the gates of `steer`. While parameters stand
        still, what is prepared here is used; it takes about as long as the dense scan of a thousand tokens. When they
        have moved, as in training, a batch that is large enough to pay for it prepares it again, on the same
        coordinates; other batches, and all once too few components are ruled out, take the dense scan.

        Args:
            x: (..., D), a few hundred tokens like those to come: they decide how many coordinates the bounds use. None
                draws them from the mixture itself.
            neighbors: whether to list, for every component, those that can be active beside it: the work of a token
                then hardly grows with K, while parameters stand still. On a CPU; takes K^2 steps, one or two seconds
                at K = 4096, minutes at 32,768. None makes the lists from 1,024 to 4,096 components, where it can.

        Raises:
            ValueError: neighbors are asked for where the C++ kernels do not serve the mixture.

        Returns:
            Whether screening is on: False where the dense scan costs less on x (diffuse mixtures), for noise per
            component, and where neither the C++ kernels nor Triton serve the mixture. On a GPU, training steps take
            the dense scan.
        """
        from mfa_kernels.ops.screen import neighbors as lists
        from mfa_kernels.ops.screen import op as screening

        if neighbors is not None:
            neighbors = check_flag(neighbors, "neighbors")
        self._screen = self.evaluated = None
        (means, loadings, noise, log_weights), woodbury = self._prepared()
        if neighbors and not woodbury.is_cpp:
            raise ValueError(
                "neighbors must be None or False here: only the C++ kernels, on a CPU, have lists of neighbors"
            )
        chosen = evaluated = None
        if neighbors is None:
            neighbors = lists.LEAST_COMPONENTS <= self.n_components <= lists.AT_ONCE
        if screening.serves(woodbury):
            if x is None:
                x = self.sample(_SCREEN_TOKENS, torch.Generator(means.device).manual_seed(0))
            flat = self._flat(x)[0].to(means.dtype).contiguous()
            if flat.shape[0]:
                least = lists.FEATURES if neighbors else 16
                chosen = screening.choose(flat, means, loadings, noise, log_weights, woodbury, least)
            if chosen is not None:
                threshold = activity_threshold(self.n_components, means.dtype)
                constants = woodbury.constants(log_weights)
                if neighbors and isinstance(chosen, Screen):
                    chosen = screening.with_neighbors(chosen, means, loadings, noise, log_weights, woodbury)
                evaluated = screening.scan(flat, woodbury, constants, chosen, threshold, SLOTS).evaluated
        self._screen = woodbury, chosen, evaluated
        return chosen is not None

    @torch.no_grad()
    def screened(self) -> tuple[bool, AnyScreen | None]:
        """Whether screening was tried for the parameters as they are, and what it prepared."""
        if self._screen is None or self._screen[0] is not self._prepared()[1]:
            return False, None
        return True, self._screen[1]

    def _screen_for(self, parameters: _Parameters, woodbury: ops.Woodbury, x: Tensor) -> AnyScreen | None:
        """The screen of these parameters, prepared again if they have moved and that pays for so many tokens."""
        if self._screen is None:
            return None
        seen, screen, evaluated = self._screen
        if x.is_cuda and self._training_step():  # stage 0, in float64 there, would cost more than the scan saves
            return None
        tokens = x.shape[0]
        if seen is not woodbury and screen is not None and evaluated is not None:
            from mfa_kernels.ops.screen import op as screening

            shape = self.n_components, self.n_features, self.rank, screen.basis.shape[1]
            if not tokens or modelled_cost(evaluated, *shape, tokens) >= 1:
                return None
            screen = screening.refresh(screen, *parameters, woodbury)
            self._screen = woodbury, screen, evaluated
        return screen

    def _prepared(self) -> tuple[_Parameters, ops.Woodbury]:
        """Detached parameters in the compute dtype, and their factors."""
        sources = (self.means, self.loadings, self.log_noise, self.weight_logits, self.center)
        if torch.compiler.is_compiling():
            return self._factorize()
        if self._training_step() or any(t.is_inference() for t in sources):
            # Parameters are about to change, and not every optimiser counts its steps (fused ones do not).
            self.refresh()
            return self._factorize()
        key = (self.noise_floor, *(t._version for t in sources))
        if self._cache is None or self._cache[0] != key or any(a is not b for a, b in zip(self._cache[1], sources)):
            self._cache = (key, sources, *self._factorize())
        return self._cache[2:]

    def _training_step(self) -> bool:
        """Whether gradients to the parameters are wanted."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def _factorize(self) -> tuple[_Parameters, ops.Woodbury]:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # they may be used, and saved for a gradient, outside of it
                return self._factorize()
        with torch.no_grad():
            parameters = self.parameters_in_compute_dtype()
            return parameters, ops.factorize(*parameters[:3], self.center)

    def __getstate__(self) -> dict[str, Any]:
        derived = {"_cache": None, "_screen": None, "evaluated": None}  # neither copied nor pickled
        return {**super().__getstate__(), **derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.inference_mode(False), torch.no_grad():  # what was copied or unpickled in inference mode is of it
            for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
                if tensor.is_inference():
                    own = tensor.clone()
                    setattr(self, name, nn.Parameter(own, tensor.requires_grad) if name in self._parameters else own)

    @door
    def get_extra_state(self) -> Tensor:
        """The noise floor, a float64 number on the CPU: what `state_dict` has besides parameters and centre."""
        return torch.tensor(self.noise_floor, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Takes a noise floor over, of a state dict; ValueError or TypeError where it is none."""
        self.noise_floor = check_number(state, "noise_floor", 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # One of earlier versions has no floor, and is complete all the same.
        state_dict.setdefault(prefix + _EXTRA_STATE, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and centre by name, without gradients: what is in a file of weights, beside its config."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != _EXTRA_STATE}

    def _active(self, x: Tensor, slots: int = SLOTS) -> ops.ActivePairs:
        """Stage 1 on (N, D); differentiable when gradients are on."""
        return self._scan(x, slots)[0]

    def _scan(self, x: Tensor, slots: int) -> tuple[ops.ActivePairs, Tensor | None]:
        """Stage 1, and the bound (N,) on what a screen left out, where one was used."""
        detached, woodbury = self._prepared()
        parameters = self.parameters_in_compute_dtype() if self._training_step() else detached
        if not torch.compiler.is_compiling():
            self.evaluated = None
            screen = self._screen_for(detached, woodbury, x)
            if screen is not None:
                from mfa_kernels.ops.screen import differentiable

                screened = differentiable.log_prob(x, *parameters, woodbury, screen, slots)
                self.evaluated = screened.evaluated
                if x.shape[0]:
                    self._screen = woodbury, screen, screened.evaluated
                return screened.active, screened.dropped
        return ops.log_prob(x, *parameters, woodbury, slots, exact=self.precision != "fast"), None

    def _flat(self, x: Any) -> tuple[Tensor, torch.Size]:
        """Tokens (N, D) of x (..., D), and the shape before D."""
        checked = check_activations(x, self.n_features, self.means.device)
        return checked.reshape(-1, self.n_features), checked.shape[:-1]

    def forward(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood of x (..., D), in nats per token: a training loss.

        Of no tokens it is NaN, as `torch.mean` and `cross_entropy` have it, and its gradients are 0.
        """
        return -self.log_prob(x).mean()

    @overload
    def log_prob(self, x: Tensor, return_error_bound: Literal[False] = False) -> Tensor: ...
    @overload
    def log_prob(self, x: Tensor, return_error_bound: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def log_prob(self, x: Tensor, return_error_bound: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """log p(x) per token: (..., D) -> (...). NaN for a token that is not finite, or so far out that the dtype holds
        no density, and for that one alone.

        Args:
            x: (..., D).
            return_error_bound: whether to return a certificate too: (...) float64, in nats, a bound on how far log p(x)
                is from that of the parameters as they are, for rounding and for components that were left out
                (`mfa_kernels/ops/scan/README.md`). For precision "exact". It is a guarantee, not an estimate: it
                holds if every rounding were as large as can be and in one direction, and grows with the squared
                Mahalanobis distance under the noise; errors are typically some hundred times less. Two values of
                log p(x) that differ by more than the sum of their bounds are certain to differ.
        """
        flat, lead = self._flat(x)
        if return_error_bound:
            if self.precision != "exact":
                raise ValueError(f'return_error_bound needs precision "exact", the mixture has {self.precision!r}')
            from mfa_kernels.ops.scan.error_bound import error_bound

            active, dropped = self._scan(flat, SLOTS)
            (means, _, noise_variance, log_weights), woodbury = self._prepared()
            bound = error_bound(flat, means, noise_variance, log_weights, woodbury, active, dropped)
            return active.log_prob.reshape(lead), bound.reshape(lead)
        if self.precision == "reference":
            parameters = self.parameters_in_compute_dtype()
            with no_autocast(flat):
                return reference.log_prob(flat.to(parameters[0].dtype), *parameters).reshape(lead)
        return self._active(flat).log_prob.reshape(lead)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log p(x | k) for every component: (..., D) -> (..., K). Dense; the weights are not included."""
        flat, lead = self._flat(x)
        parameters = self.parameters_in_compute_dtype()[:3]
        if self.precision == "reference":
            with no_autocast(flat):
                out = reference.component_log_prob(flat.to(parameters[0].dtype), *parameters)
        else:
            out = ops.component_log_prob(flat, *parameters, self.woodbury())
        return out.reshape(*lead, self.n_components)

    def responsibilities(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """p(k | x), dense: (..., D) -> (..., K). softmax((log pi + log p(x|k)) / temperature), eq. 8."""
        if not torch.compiler.is_compiling():
            temperature = check_positive(temperature, "temperature")
        log_weights = self.parameters_in_compute_dtype()[3]
        return ((self.component_log_prob(x) + log_weights) / temperature).softmax(-1)

    def assign(self, x: Tensor) -> Tensor:
        """The most responsible component: (..., D) -> (...) int64; -1 for a token that is not finite."""
        flat, lead = self._flat(x)
        with torch.no_grad():
            return self._active(flat).components[:, 0].long().reshape(lead)

    def encode(self, x: Tensor, top_k: int | None = 8) -> Code:
        """The components that matter for each token, and the latents inside them.

        Args:
            x: (..., D).
            top_k: most components per token; None keeps every active one.

        Returns:
            A `Code` with C = min(top_k, K) slots, or as many as the most ambiguous token needs when top_k is None.
            Differentiable in x and the parameters.
        """
        return encoded(self, x, top_k)

    def _latents(self, x: Tensor, components: Tensor) -> Tensor:
        """E[z | x, k] for the held slots of components (N, C): (N, C, R), 0 elsewhere."""
        count, slots = components.shape
        tokens = torch.arange(count * slots, device=x.device) // slots
        parameters = self.parameters_in_compute_dtype()[:3]
        pairs = ops.latents(x, tokens, components.flatten(), *parameters, self.woodbury())
        return pairs.view(count, slots, self.rank)

    def decode(self, code: Code) -> Tensor:
        """sum_k r_k (mu_k + W_k z_k): (..., D); eq. 11-13 with the code's components."""
        code = checked_code(code, self.rank, self.means.device)
        means, loadings = functional.compute_dtype(self.means, self.loadings)
        components = code.components.flatten(0, -2) if code.components.dim() > 1 else code.components.unsqueeze(0)
        out = ops.decode(
            components.clamp(-2, MOST_COMPONENTS).int(),  # 2^32 shall not become 0
            code.responsibilities.reshape(components.shape).to(means.dtype),
            code.latents.reshape(*components.shape, self.rank).to(means.dtype),
            means,
            loadings,
        )
        return out.reshape(*code.components.shape[:-1], self.n_features)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[the noise-free x | x] = sum_k r_k (mu_k + W_k E[z | x, k]): (..., D) -> (..., D)."""
        flat, lead = self._flat(x)
        parts = [self.decode(self.encode(chunk, top_k=None)) for chunk in flat.split(_TOKENS_PER_CHUNK)]
        return (torch.cat(parts) if parts else flat).reshape(*lead, self.n_features)

    def posterior(self, x: Tensor, component: int | Tensor) -> tuple[Tensor, Tensor]:
        """p(z | x, k) = N(mean, covariance).

        Args:
            x: (..., D).
            component: an int, or an integer tensor that broadcasts to (...).

        Returns:
            mean (..., R) and covariance M_k^-1, (R, R) for an int, else (..., R, R).
        """
        flat, lead = self._flat(x)
        cholesky = self.woodbury().cholesky
        if isinstance(component, Tensor) or is_several(component):
            component = check_integers(component, "component")
            try:
                index = component.to(flat.device).expand(lead).reshape(-1).long()
            except (RuntimeError, NotImplementedError) as error:  # values that are not there, on the meta device
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
        except RuntimeError as error:  # so says the allocator of a CPU
            raise ValueError(f"n must be a number of draws that fit into memory, got {n}") from error
        components = torch.searchsorted(log_weights.exp().cumsum(0), uniform).clamp_max(self.n_components - 1)
        noise *= noise_variance.expand_as(means)[components].sqrt()
        ones = torch.ones(n, 1, dtype=means.dtype, device=means.device)
        return ops.decode(components.int().unsqueeze(-1), ones, z.unsqueeze(1), means, loadings) + noise

    @door
    @torch.no_grad()
    def rotate(self, method: str = "varimax", iterations: int = 50) -> MFA:
        """Rotates every component's loadings in place, W_k <- W_k Q_k with Q_k orthogonal: the density does not change.

        "varimax" makes each column load on few features, so that single latents can be read; "principal" orders
        the columns by the variance they explain.
        """
        from mfa_kernels.mixture import rotate_loadings

        check_choice(method, ("varimax", "principal"), "method")
        iterations = check_integer(iterations, "iterations", 1)
        rotated = (
            rotate_loadings.varimax(self.loadings, iterations)
            if method == "varimax"
            else rotate_loadings.principal(self.loadings)
        )
        self.loadings.copy_(rotated)
        return self

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | os.PathLike[str], **kwargs: Any) -> MFA:
        """Loads config.json and model.safetensors from a folder, or from a Hugging Face hub repository.

        See `mfa_kernels.mixture.saving.load_pretrained` for the keyword arguments.
        """
        from mfa_kernels.mixture import saving

        _check_options("from_pretrained", saving.load_pretrained, kwargs)
        return saving.load_pretrained(cls, folder_or_hub_id, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes config.json and model.safetensors, each to a temporary name and then renamed."""
        from mfa_kernels.mixture import saving

        _check_options("save_pretrained", saving.save_pretrained, kwargs)
        saving.save_pretrained(self, folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes to a Hugging Face hub repository."""
        from mfa_kernels.mixture import saving

        _check_options("push_to_hub", saving.push_to_hub, kwargs)
        return saving.push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def from_reference_checkpoint(cls, path: str | os.PathLike[str], **kwargs: Any) -> MFA:
        """Reads the paper's own .pt formats, without running code from the file."""
        from mfa_kernels.mixture import paper_format

        _check_options("from_reference_checkpoint", paper_format.load_reference, kwargs)
        return paper_format.load_reference(cls, path, **kwargs)

    def to_reference_checkpoint(self, path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the paper's own .pt format."""
        from mfa_kernels.mixture import paper_format

        _check_options("to_reference_checkpoint", paper_format.save_reference, kwargs)
        paper_format.save_reference(self, path, **kwargs)


def _check_options(method: str, function: Any, given: dict[str, Any]) -> None:
    """Raises for a keyword that the function behind a method does not take, by the name that was called."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            raise TypeError(f"MFA.{method}() takes the keywords {', '.join(known)}, got {name!r}")


def _variance(noise_variance: Any, centroids: Tensor, noise: str) -> Tensor:
    """A noise variance that is given beside centroids, positive, as a tensor that broadcasts to what `noise` has."""
    if not is_several(noise_variance):
        noise_variance = [check_positive(noise_variance, "noise_variance")]
    noise_variance = check_finite(check_floats(noise_variance, "noise_variance"), "noise_variance")
    variance = noise_variance.to(centroids.device, centroids.dtype)
    shape = centroids.shape[1:] if noise == "shared" else centroids.shape
    trailing = len(shape) >= variance.dim() and shape[len(shape) - variance.dim() :] == variance.shape
    if not trailing and variance.numel() != 1:
        raise ValueError(
            f"noise_variance must be a number or of shape {tuple(shape)}, as {noise} noise has it, got "
            f"{tuple(variance.shape)}"
        )
    if not (variance > 0).all():
        raise ValueError(f"noise_variance must be positive, got a minimum of {variance.min().item()}")
    return variance if trailing else variance.reshape(())
