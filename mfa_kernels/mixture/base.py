"""The base class of mixtures: likelihood, assignment, encoding and decoding of tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mfa_kernels import ops
from mfa_kernels.common.arrays import is_spread
from mfa_kernels.common.checks import MOST_COMPONENTS, check_component, check_integer
from mfa_kernels.common.moved import RenamedAttribute
from mfa_kernels.common.precision import no_autocast
from mfa_kernels.common.processes import ALONE, Processes
from mfa_kernels.mixture import functional
from mfa_kernels.mixture.codes import Code, checked_code, code_of, every_active_pair
from mfa_kernels.ops.scan.types import SLOTS
from mfa_kernels.ops.woodbury.types import Parameters

if TYPE_CHECKING:
    from typing_extensions import Self

    from mfa_kernels.mixture.fit_report import FitReport

EXTRA_STATE = "_extra_state"  # PyTorch's key for `get_extra_state` in a state dict: here the noise floor
_TOKENS_PER_CHUNK = 4096  # `reconstruct` must not hold N x K x R latents where every component is active


def check_whole(mfa: Mixture) -> None:
    """RuntimeError where FSDP has spread the parameters, as it does outside of the module's own call."""
    if is_spread(mfa.means):
        raise RuntimeError(
            "the parameters of the mixture are spread over processes (DTensors, as fully_shard makes them). Call the "
            'mixture itself, or, before a method of it, register_fsdp_forward_method(mfa, "log_prob"); to save, load '
            "get_model_state_dict(mfa, options=StateDictOptions(full_state_dict=True)) into a mixture of one process"
        )


class Mixture(nn.Module):
    """The methods that an `MFA` and a `ShardedMFA` have in common.

    Attributes:
        n_components: K.
        n_features: D.
        rank: R.
        noise: "shared" or "per_component".
        noise_floor: added to the noise variance.
        precision: "exact", "fast" or "reference".
        means, loadings, log_noise, noise_variance, weight_logits, log_weights: of the components that this process
            holds: all K in an `MFA`, a part in a `ShardedMFA`.
        center: (D,), subtracted from x and means inside the kernels; changes no result, saves digits.
        processes: the processes that the components are spread over.
        first_component: number of the first component that this process holds.
        fit_report: the `FitReport` of the fit that made the mixture; it is saved and loaded with the mixture.
        extra: what JSON can hold, kept in config.json: the language model, the layer, notes.
    """

    n_components: int
    n_features: int
    rank: int
    noise: str
    noise_floor: float
    precision: str
    means: Tensor
    loadings: Tensor
    log_noise: Tensor
    weight_logits: Tensor
    center: Tensor
    extra: dict[str, Any]
    fit_report: FitReport | None = None
    processes: Processes = ALONE
    first_component: int = 0

    ranks, start = RenamedAttribute("processes"), RenamedAttribute("first_component")

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As that of any module, whose `empty_like` imports PyTorch's compiler for tensors on the meta device: seconds
        of the first mixture that is loaded or fitted."""
        return self._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device), recurse)

    @property
    def noise_variance(self) -> Tensor:
        """Psi, (D,) or (K, D)."""
        with no_autocast(self.log_noise):  # autocast on a GPU would return float32 for a mixture in half precision
            return self.log_noise.exp() + self.noise_floor

    @property
    def log_weights(self) -> Tensor:
        """log pi, (K,)."""
        with no_autocast(self.weight_logits):
            return self.weight_logits.log_softmax(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Returns parameters and centre by name, without gradients: what a file of weights holds beside its config."""
        check_whole(self)
        return {name: tensor for name, tensor in self.state_dict().items() if name != EXTRA_STATE}

    def parameters_in_compute_dtype(self) -> Parameters:
        """Returns means, loadings, noise_variance, log_weights as the kernels take them: float32 or float64."""
        check_whole(self)
        means, loadings = functional.compute_dtype(self.means, self.loadings)
        noise_variance, log_weights = functional.compute_dtype(self.noise_variance, self.log_weights)
        return Parameters(means, loadings, noise_variance, log_weights)

    def prepared(self) -> tuple[Parameters, ops.Woodbury]:
        """Returns the parameters held here, detached and in the compute dtype, and their Woodbury terms."""
        with torch.no_grad():
            return self.parameters_in_compute_dtype(), self.woodbury()

    def woodbury(self) -> ops.Woodbury:
        """Returns the Woodbury terms of the components held here, outside autograd."""
        raise NotImplementedError

    def active_pairs(self, x: Tensor, slots: int = SLOTS) -> ops.ActivePairs:
        """Returns log p(x) and the active pairs of x (N, D) among all components; differentiable.

        Args:
            x: (N, D), any float dtype.
            slots: S, the most active components kept per token.
        """
        raise NotImplementedError

    def flattened(self, x: Any) -> tuple[Tensor, torch.Size]:
        """Returns tokens (N, D) of x (..., D), checked, and the shape before D."""
        return functional.flattened(x, self.n_features, self.means.device)

    def forward(self, x: Tensor) -> Tensor:
        """Mean negative log-likelihood of x (..., D), in nats per token: a training loss.

        Without tokens the loss is NaN, as `torch.mean` gives, and gradients are 0.
        """
        return -self.log_prob(x).mean()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) per token: (..., D) -> (...). NaN for a token that is not finite, and for that one alone."""
        flat, lead = self.flattened(x)
        return self._log_density(flat).reshape(lead)

    def _log_density(self, x: Tensor) -> Tensor:
        """log p(x) of x (N, D), (N,)."""
        return self.active_pairs(x).log_prob

    @torch.no_grad()
    def assign(self, x: Tensor) -> Tensor:
        """The most responsible component: (..., D) -> (...) int64; -1 for a token that is not finite."""
        flat, lead = self.flattened(x)
        return self._owner(flat).long().reshape(lead)

    def _owner(self, x: Tensor) -> Tensor:
        """The most responsible component of each token of x (N, D), (N,)."""
        return self.active_pairs(x).components[:, 0]

    def encode(self, x: Tensor, top_k: int | None = 8) -> Code:
        """The components that matter for each token, and the latents inside them.

        Args:
            x: (..., D).
            top_k: most components per token; None keeps every active one.

        Returns:
            A `Code` with C = min(top_k, K) slots, or as many as the most ambiguous token needs when top_k is None.
            Differentiable in x and the parameters.
        """
        top_k = None if top_k is None else check_integer(top_k, "top_k", 1)
        flat, lead = self.flattened(x)
        scan = partial(self.active_pairs, flat)
        if top_k is None:
            active = every_active_pair(scan, self.n_components)
            kept = max(1, int(active.counts.clamp_max(active.logits.shape[1]).max())) if len(flat) else 1
        else:
            active = scan(min(self.n_components, max(top_k, SLOTS)))
            kept = min(top_k, self.n_components)
        return code_of(active, self._latents(flat, active.components[:, :kept]), lead)

    def code(self, x: Tensor, top_k: int | None = 8) -> Code:
        """The same as `encode`: the name that every `Decomposition` has for it."""
        return self.encode(x, top_k)

    def decode(self, code: Code) -> Tensor:
        """sum_k r_k (mu_k + W_k z_k): (..., D); eq. 11-13 with the code's components."""
        code = checked_code(code, self.rank, self.means.device)
        means, loadings = functional.compute_dtype(self.means, self.loadings)
        components = code.components.flatten(0, -2) if code.components.dim() > 1 else code.components.unsqueeze(0)
        own = ops.decode(
            self._own(components.clamp(-2, MOST_COMPONENTS)),  # int32 would turn 2^32 into component 0
            self._shared(code.responsibilities.reshape(components.shape).to(means.dtype)),
            self._shared(code.latents.reshape(*components.shape, self.rank).to(means.dtype)),
            means,
            loadings,
        )
        return self._summed(own).reshape(*code.components.shape[:-1], self.n_features)

    def reconstruct(self, x: Tensor) -> Tensor:
        """E[the noise-free x | x] = sum_k r_k (mu_k + W_k E[z | x, k]): (..., D) -> (..., D)."""
        flat, lead = self.flattened(x)
        parts = [self.decode(self.encode(chunk, top_k=None)) for chunk in flat.split(_TOKENS_PER_CHUNK)]
        return (torch.cat(parts) if parts else flat).reshape(*lead, self.n_features)

    def directions(self, k: int) -> Tensor:
        """The local directions of component k, the columns of W_k: (R, D)."""
        own = check_component(k, self.n_components) - self.first_component
        held = 0 <= own < len(self.loadings)
        return self._summed(self.loadings[own].mT if held else self.loadings.new_zeros(self.rank, self.n_features))

    def _latents(self, x: Tensor, components: Tensor) -> Tensor:
        """E[z | x, k] of x (N, D) for components (N, C): (N, C, R), 0 in an empty slot."""
        count, slots = components.shape
        tokens = torch.arange(count * slots, device=x.device) // slots
        parameters = self.parameters_in_compute_dtype()[:3]
        pairs = ops.latents(self._shared(x), tokens, self._own(components).flatten(), *parameters, self.woodbury())
        return self._summed(pairs).view(count, slots, self.rank)

    # A `ShardedMFA` overrides these three; here one process holds all components.

    def _own(self, components: Tensor) -> Tensor:
        """Numbers among the components held here, int32; -1 for a component that another process holds."""
        return components.int()

    def _shared(self, tensor: Tensor) -> Tensor:
        """Returns a tensor that all processes hold; where they share the components, its gradient is summed over
        them."""
        return tensor

    def _summed(self, own: Tensor) -> Tensor:
        """The sum over the processes of what each has found for its components."""
        return own
