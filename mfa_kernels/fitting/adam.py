"""Adam on the negative log-likelihood, in units that do not depend on the scale of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mfa_kernels.fitting.row_weights import Weighed
from mfa_kernels.fitting.run import Run, Settings, shuffled, standard_deviation
from mfa_kernels.mixture.mfa import MFA

SCHEDULES = ("cosine", "constant")
_WARMUP = 50  # steps, or a tenth of them where there are fewer than 500
_CLIP = 3.0  # times the running mean of the gradient's norm
_MOST_BAD_STEPS = 10  # in a row


class StandardizedAdam:
    """Adam whose means and loadings are in units of a standard deviation per dimension.

    Adam moves every coordinate by about its learning rate: one rate fits activations only when their dimensions have
    one scale, and those of language models differ by orders of magnitude. What is stepped is the means less the
    mixture's centre, and the loadings, divided by `scale`; log-noise and weight logits have no unit.

    Args:
        mfa: the mixture.
        scale: (D,).
        lr: of the first step.
    """

    def __init__(self, mfa: MFA, scale: Tensor, lr: float) -> None:
        self.scaled = (
            (mfa.means, mfa.center, scale),
            (mfa.loadings, torch.zeros_like(scale).unsqueeze(-1), scale.unsqueeze(-1)),
        )
        self.parameters = [torch.empty_like(p).requires_grad_() for p, _, _ in self.scaled]
        self.all = [*self.parameters, mfa.log_noise, mfa.weight_logits]
        # Fused: the others make several passes over the parameters.
        self.adam = torch.optim.Adam(self.all, lr=lr, fused=True)
        self.typical: float | None = None  # norm of the gradient
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Takes over the mixture's parameters, after a change of them."""
        for own, (parameter, offset, scale) in zip(self.parameters, self.scaled):
            own.copy_((parameter - offset) / scale)

    def state(self) -> dict[str, Tensor]:
        """The tensors that the next steps depend on besides the mixture and `typical`, by name."""
        out = {"scale": self.scaled[0][2]}
        for i, parameter in enumerate(self.all):
            out[f"{i}.parameter"] = parameter.detach()
            out |= {f"{i}.{name}": value for name, value in self.adam.state[parameter].items()}
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self.scaled[0][2].copy_(state["scale"])  # that of the loadings is a view of it
        for i, parameter in enumerate(self.all):
            parameter.copy_(state[f"{i}.parameter"])
            if f"{i}.step" in state:  # there is none before the first step
                self.adam.state[parameter] = {
                    name: state[f"{i}.{name}"].to(parameter.device, copy=True)
                    for name in ("step", "exp_avg", "exp_avg_sq")
                }

    @torch.no_grad()
    def step(self, lr: float) -> bool:
        """One step along the gradients in the mixture; False, and no step, where one of them is not finite."""
        for own, (parameter, _, scale) in zip(self.parameters, self.scaled):
            assert parameter.grad is not None
            own.grad = parameter.grad.mul_(scale)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.all if p.grad is not None])
        size = float(norm)
        if not math.isfinite(size):
            return False
        # A batch with an outlier would otherwise slow down the components it touches for a thousand steps.
        limit = _CLIP * (self.typical or size)
        torch.nn.utils.clip_grads_with_norm_(self.all, limit, norm)
        self.typical = size if self.typical is None else 0.95 * self.typical + 0.05 * min(size, limit)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        for own, (parameter, offset, scale) in zip(self.parameters, self.scaled):
            torch.addcmul(offset, own, scale, out=parameter)
        return True


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """The rate of step `step` of `steps`: a linear warm-up, then constant, or a half cosine down to 0."""
    warmup = min(_WARMUP, steps // 10)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Training(Run):
    """Training by Adam, the paper's procedure; see `Run` for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adam = StandardizedAdam(self.mfa, standard_deviation(self.mfa), self.settings.lr)
        self.bad_steps = 0
        self.epoch = self.batch = 0  # passes done, and batches done in this pass
        self.order = self.generator.get_state()  # that its order is drawn from

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        tensors |= {f"adam.{name}": tensor for name, tensor in self.adam.state().items()}
        tensors["order"] = self.order
        own = {"bad_steps": self.bad_steps, "epoch": self.epoch, "batch": self.batch, "typical": self.adam.typical}
        return tensors, values | own

    def _like(self) -> dict[str, Tensor]:
        like = super()._like() | {f"adam.{name}": tensor for name, tensor in self.adam.state().items()}
        for i, parameter in enumerate(self.adam.all):
            like |= {f"adam.{i}.exp_avg": parameter, f"adam.{i}.exp_avg_sq": parameter}
            like[f"adam.{i}.step"] = torch.zeros(())
        return like | {"order": self.order}

    def _load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        super()._load(tensors, values)
        self.adam.load({n.removeprefix("adam."): tensor for n, tensor in tensors.items() if n.startswith("adam.")})
        self.generator.set_state(tensors["order"])
        self.adam.typical, self.bad_steps = values["typical"], values["bad_steps"]
        self.epoch, self.batch = values["epoch"], values["batch"]

    def run(self) -> None:
        """Raises RuntimeError after ten steps in a row without a finite loss and gradient."""
        settings = self.settings
        per_epoch = -(-len(self.rows) // settings.batch_size)
        steps, step = per_epoch * settings.epochs, per_epoch * self.epoch + self.batch
        every = settings.eval_every or per_epoch
        with self._bar("fit", steps, step, "step") as bar:
            if not self.report.history:
                self._evaluate(0, 0, bar)
            for epoch in range(self.epoch, settings.epochs):
                self.epoch, self.order = epoch, self.generator.get_state()
                indices = islice(shuffled(self.rows, settings.batch_size, self.generator), self.batch, None)
                for batch in self._read(indices):
                    self._step(batch, learning_rate(step, steps, settings), count_skipped=epoch + self.first_epoch == 0)
                    step += 1
                    self.batch += 1
                    bar.update()
                    if step % every == 0 or step == steps:
                        self._evaluate(step, epoch + 1, bar)
                        if self._out_of_patience(finished=step == steps):
                            return
                    self._save_if_due()
                self.batch = 0

    def _parameters_changed(self) -> None:
        self.adam.read()

    def _loss(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """The mean negative log-likelihood of some rows, by their weights."""
        if weights is None:
            return self.mfa(x) if len(x) else self.mfa.means.new_zeros(())
        return -(self.mfa.log_prob(x) * (weights / weights.sum()).to(self.mfa.means)).sum()

    def _backward(self, loss: Tensor, share: float) -> None:
        """Leaves the gradient of the mean over the rows of all processes, of which this one's loss has a `share`.

        What a batch weighs is compared with what as many rows weigh on average: batches of heavy rows count for more,
        and the gradients of all batches add up to that of all rows.
        """
        if share:
            (loss * share).backward()
        gradients = []
        for parameter in self.mfa.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.processes.sum_(*gradients)

    def _step(self, batch: Weighed, lr: float, count_skipped: bool) -> None:
        batch = self._finite(batch, count_skipped)
        x, mass = batch.rows, batch.mass
        self.mfa.zero_grad()
        loss = self._loss(x, batch.weights)
        value, rows = float(loss.detach()), len(x)
        if self.processes.count > 1:
            total, every, count = self.processes.totals(value * mass, mass, len(x))
            value, rows = total / (every or 1), int(count)
        if not rows:
            return
        if math.isfinite(value):
            self._backward(loss, mass / (rows * self.mean_weight))
            if self.adam.step(lr):
                self.losses.append(value)
                self.tokens += len(x)
                self.bad_steps = 0
                return
        self.report.skipped_steps += 1
        self.bad_steps += 1
        if self.bad_steps >= _MOST_BAD_STEPS:
            raise RuntimeError(
                f"fit: {self.bad_steps} steps in a row had a loss or gradient that is not finite (the last loss: "
                f"{value}); try a smaller lr than {self.settings.lr}, or look at the scale of the activations"
            )
