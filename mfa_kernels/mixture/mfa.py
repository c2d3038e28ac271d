"""The mixture of factor analyzers as a torch.nn.Module: its parameters and constructors."""

from __future__ import annotations

import inspect
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common import checks
from mfa_kernels.common.arrays import is_several
from mfa_kernels.common.modes import door
from mfa_kernels.mixture import functional
from mfa_kernels.mixture.base import EXTRA_STATE, check_whole
from mfa_kernels.mixture.local import LocalMixture

NOISES = ("shared", "per_component")


class MFA(LocalMixture):
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
        noise_floor: see above. The density depends on it, so `state_dict` holds it too, as PyTorch's extra state: a
            mixture of the same shape, dtype and precision loads a dict to the same bits. Loading a dict without it (of
            an earlier version, or from a file of weights) leaves the mixture its own.
        evaluated: after a call that was screened (see `screen`), components per token whose logit was computed, int32;
            -1 where the token took the dense scan. None otherwise.
    """

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
        n_components = checks.check_integer(n_components, "n_components", 1, checks.MOST_COMPONENTS)
        n_features = checks.check_integer(n_features, "n_features", 1, checks.MOST_COMPONENTS)
        rank = checks.check_integer(rank, "rank")
        if rank > n_features:
            raise ValueError(f"rank must be at most n_features = {n_features}, got {rank}")
        self.n_components, self.n_features, self.rank = n_components, n_features, rank
        self.noise = checks.check_choice(noise, NOISES, "noise")
        self.precision = checks.check_choice(precision, functional.PRECISIONS, "precision")
        self.noise_floor = checks.check_number(noise_floor, "noise_floor", 0)
        device = device if device is None else checks.check_device(device)
        dtype = dtype if dtype is None else checks.check_dtype(dtype)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.means = nn.Parameter(torch.empty(n_components, n_features, **where))
        self.loadings = nn.Parameter(torch.empty(n_components, n_features, rank, **where))
        noise_shape = (n_features,) if noise == "shared" else (n_components, n_features)
        self.log_noise = nn.Parameter(torch.empty(noise_shape, **where))
        self.weight_logits = nn.Parameter(torch.empty(n_components, **where))
        self.register_buffer("center", torch.zeros(n_features, **where))
        self.extra: dict[str, Any] = {}  # kept in config.json: model, layer, whatever the user wants to remember
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Standard normal means, loadings of unit expected column norm, noise variance 1, equal weights."""
        checks.check_generator(generator)
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
        tensors = {name: checks.check_floats(value, name).detach() for name, value in given.items()}
        device, dtype = tensors["means"].device, tensors["means"].dtype
        for name, tensor in tensors.items():
            dtype = torch.promote_types(dtype, tensor.dtype)
            if tensor.is_meta and device.type != "meta":
                raise ValueError(f"{name} must hold values, got a tensor on the meta device")
        means, loadings, noise_variance, weights = (t.to(device=device, dtype=dtype) for t in tensors.values())
        checks.check_parameters(means, loadings, noise_variance, weights, "weights")
        for name, tensor in (("means", means), ("loadings", loadings), ("noise_variance", noise_variance)):
            checks.check_finite(tensor, name)
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
        """Returns the paper's start: means at centroids (K, D) or the result of `kmeans`, random loadings, equal
        weights."""
        centroids, generator = checks.check_centroids(centroids), checks.check_generator(generator)
        checks.check_finite(centroids, "centroids")
        variance = _variance(noise_variance, centroids, checks.check_choice(noise, NOISES, "noise"))
        components, features = centroids.shape
        like: dict[str, Any] = {"device": centroids.device, "dtype": centroids.dtype}
        mfa = cls._blank(components, features, rank, noise, precision=precision, **like)
        mfa.reset_parameters(generator)
        with torch.no_grad():
            mfa.means.copy_(centroids)
            mfa.log_noise.copy_(variance.log())
            mfa.center.copy_(centroids.mean(0))
        return mfa

    @door
    def get_extra_state(self) -> Tensor:
        """The noise floor, a float64 number on the CPU: what `state_dict` has besides parameters and centre."""
        return torch.tensor(self.noise_floor, dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Sets the noise floor from a state dict; TypeError or ValueError where it is not a number >= 0."""
        self.noise_floor = checks.check_number(state, "noise_floor", 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # State dicts of earlier versions have no noise floor: with the default, strict loading accepts them.
        state_dict.setdefault(prefix + EXTRA_STATE, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)

    @door
    @torch.no_grad()
    def rotate(self, method: str = "varimax", iterations: int = 50) -> MFA:
        """Rotates every component's loadings in place, W_k <- W_k Q_k with Q_k orthogonal: the density does not change.

        "varimax" makes each column load on few features, so that single latents can be read; "principal" orders
        the columns by the variance they explain.
        """
        from mfa_kernels.mixture import rotate_loadings

        check_whole(self)
        checks.check_choice(method, ("varimax", "principal"), "method")
        iterations = checks.check_integer(iterations, "iterations", 1)
        loadings, of = self.loadings, rotate_loadings
        loadings.copy_(of.varimax(loadings, iterations) if method == "varimax" else of.principal(loadings))
        return self

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | os.PathLike[str], **kwargs: Any) -> MFA:
        """Loads a mixture from a folder, or from a Hugging Face hub repository: ours, or one of the paper's own files.

        See `mfa_kernels.mixture.loading.load` for the keyword arguments, such as `layer` where there are several.
        """
        from mfa_kernels.mixture import loading

        return _with_options(loading.load, "from_pretrained", kwargs)(cls, folder_or_hub_id)

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes config.json and model.safetensors, each to a temporary name and then renamed."""
        from mfa_kernels.mixture import saving

        _with_options(saving.save_pretrained, "save_pretrained", kwargs)(self, folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes to a Hugging Face hub repository."""
        from mfa_kernels.mixture import saving

        return _with_options(saving.push_to_hub, "push_to_hub", kwargs)(self, repo_id)

    @classmethod
    def from_reference_checkpoint(cls, path: str | os.PathLike[str], **kwargs: Any) -> MFA:
        """Reads the paper's own .pt formats, without running code from the file."""
        from mfa_kernels.mixture import paper_format

        return _with_options(paper_format.load_reference, "from_reference_checkpoint", kwargs)(cls, path)

    def to_reference_checkpoint(self, path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes the paper's own .pt format."""
        from mfa_kernels.mixture import paper_format

        _with_options(paper_format.save_reference, "to_reference_checkpoint", kwargs)(self, path)


def _with_options(function: Any, method: str, given: dict[str, Any]) -> Any:
    """Returns `function` with these keywords bound; TypeError, naming the method, for one that it does not take."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            raise TypeError(f"MFA.{method}() takes the keywords {', '.join(known)}, got {name!r}")
    return partial(function, **given)


def _variance(noise_variance: Any, centroids: Tensor, noise: str) -> Tensor:
    """Returns a positive noise variance as a tensor that broadcasts to the shape of `noise`: (D,) or (K, D)."""
    if not is_several(noise_variance):
        noise_variance = [checks.check_positive(noise_variance, "noise_variance")]
    noise_variance = checks.check_finite(checks.check_floats(noise_variance, "noise_variance"), "noise_variance")
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
