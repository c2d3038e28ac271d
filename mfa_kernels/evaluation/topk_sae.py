"""A small TopK sparse autoencoder (arXiv 2406.04093): a baseline with as many active floats as a mixture.

Tokens are scaled to one norm before they are encoded, so that the few with a huge one do not rule the loss, and
features are scaled back: x is about m + W f. Latents that have not been active for a while learn from what the others
leave (the auxiliary loss of the paper), so that few die.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfa_kernels.common.checks import check_activations, check_device, check_floats, check_integer, check_positive
from mfa_kernels.common.progress import progress_bar
from mfa_kernels.data.source import as_source

_DEAD = 100_000  # tokens without being active, after which a latent learns from what is left
_AUXILIARY = 1 / 32


class TopKSAE(nn.Module):
    """A dictionary of F features, k of them active for a token.

    Args:
        n_features: D.
        n_latents: F.
        k: active latents.
        generator: of the directions to start from.

    Attributes:
        mean: of activations, (D,).
    """

    mean: Tensor

    def __init__(self, n_features: int, n_latents: int, k: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.n_features, self.n_latents = (
            check_integer(n_features, "n_features", 1),
            check_integer(n_latents, "n_latents", 1),
        )
        self.k = check_integer(k, "k", 1, n_latents)
        directions = nn.functional.normalize(torch.randn(n_latents, n_features, generator=generator), dim=1)
        self.decoder, self.encoder = nn.Parameter(directions), nn.Parameter(directions.clone())
        self.bias = nn.Parameter(torch.zeros(n_latents))
        self.register_buffer("mean", torch.zeros(n_features))

    def encode(self, x: Tensor) -> Tensor:
        """Returns features (N, F) of activations (N, D), k of them above 0 at most."""
        y, scale = self._scaled(check_activations(x, self.n_features, self.mean.device))
        values, places = self._before(y).topk(self.k, -1)
        return torch.zeros(len(y), self.n_latents).to(y).scatter(1, places, values.relu() * scale)

    def decode(self, features: Tensor) -> Tensor:
        """Returns activations (N, D) of features (N, F)."""
        return self.mean + check_floats(features, "features").to(self.mean) @ self.decoder

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of norm sqrt(D) around the mean, and what their norms were over that."""
        y = x.to(self.mean) - self.mean
        scale = y.norm(dim=1, keepdim=True).clamp_min(1e-12) / self.n_features**0.5
        return y / scale, scale

    def _before(self, y: Tensor) -> Tensor:
        return torch.addmm(self.bias, y, self.encoder.mT)

    @classmethod
    def fit(
        cls,
        activations: Any,
        n_latents: int,
        k: int,
        *,
        epochs: int = 4,
        batch_size: int = 1024,
        lr: float = 1e-3,
        seed: int = 0,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> TopKSAE:
        """Trains one.

        Args:
            activations: anything `mfa_kernels.fit` takes, (N, D).
            n_latents: F.
            k: active latents of a token.
            epochs: passes.
            batch_size: tokens per step.
            lr: of Adam; falls to 0 over the last fifth of the steps.
            seed: of the start and of the order.
            device: to train on, where the autoencoder stays.
            progress: show a bar when it takes more than two seconds.

        Returns:
            The autoencoder, without gradients.

        Raises:
            ValueError: the activations that a step would be made of are not finite, or an argument does not fit.
        """
        source = as_source(activations)
        generator = torch.Generator().manual_seed(check_integer(seed, "seed"))
        device = check_device(device)
        sae = cls(source.n_features, n_latents, k, generator).to(device)
        batch_size, lr = check_integer(batch_size, "batch_size", 1), check_positive(lr, "lr")
        some = source.rows(torch.randperm(len(source), generator=generator)[:65_536].sort().values).float()
        sae.mean.copy_(some.mean(0))
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))
        steps = check_integer(epochs, "epochs") * (len(source) // batch_size or 1)
        idle = torch.zeros(n_latents, dtype=torch.int64, device=device)
        with progress_bar(total=steps, desc="TopK SAE", unit=" steps", delay=2, progress=progress) as bar:
            step = 0
            for _ in range(epochs):
                for numbers in torch.randperm(len(source), generator=generator).split(batch_size)[: steps // epochs]:
                    for group in optimizer.param_groups:
                        group["lr"] = lr * min(1.0, 5 * (steps - step) / steps)
                    loss = sae._loss(source.rows(numbers.sort().values).to(device).float(), idle)
                    if not bool(loss.isfinite()):
                        raise ValueError("activations must be finite, and some rows are not: leave them out")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    with torch.no_grad():
                        sae.decoder.copy_(nn.functional.normalize(sae.decoder, dim=1))
                    step += 1
                    bar.update(1)
        return sae.requires_grad_(False)

    def _loss(self, x: Tensor, idle: Tensor) -> Tensor:
        """The mean squared error of tokens that are scaled; counts for how many tokens each latent was idle."""
        y, _ = self._scaled(x)
        before = self._before(y)
        values, places = before.topk(self.k, -1)
        left = y - _sum(values.relu(), places, self.decoder)
        loss = left.square().mean()
        idle += len(x)
        idle[places[values > 0].unique()] = 0
        dead = (idle > _DEAD).nonzero()[:, 0]
        if len(dead):
            own, where = before[:, dead].topk(min(len(dead), self.n_features // 2), -1)
            rest = left.detach() - _sum(own.relu(), dead[where], self.decoder)
            loss = loss + _AUXILIARY * rest.square().mean()
        return loss


def _sum(values: Tensor, places: Tensor, directions: Tensor) -> Tensor:
    """sum_c v_c w_c of the directions at some places (N, C): (N, D)."""
    found: Tensor = nn.functional.embedding_bag(places, directions, per_sample_weights=values, mode="sum")
    return found
