"""A mixture in the loss of a language model, as the Trainer of transformers and autocast train it."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import MFA
from mfa_kernels.models import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER, WEIGHT, RATE = 2, 0.05, 0.02
trainer_of_transformers = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="needs accelerate: the extra real"
)


def rows() -> list[dict[str, Tensor]]:
    _, tokenizer = load_language_model()
    text = "def close(self):\n    return self.file.close()\n\nclass Reader:\n    def __init__(self, file):\n" * 8
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return [{"input_ids": window, "labels": window} for window in ids[: len(ids) // 16 * 16].view(-1, 16)[:4]]


def model_with_a_mixture() -> nn.Module:
    """The small language model; a mixture of what leaves its layer is a part of it, and trained with it."""
    model, _ = load_language_model()
    with torch.no_grad():
        hidden = hidden_of(model, torch.stack([row["input_ids"] for row in rows()]))[0].flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    model.regions = MFA.from_centroids(hidden[5::12], rank=3, noise_variance=hidden.var(0), generator=generator)
    return model.train()


def hidden_of(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    outputs = model(input_ids=ids, labels=ids, output_hidden_states=True)
    return outputs.hidden_states[LAYER + 1][:, 1:], outputs


def loss_of(model: Any, ids: Tensor) -> Tensor:
    hidden, outputs = hidden_of(model, ids)
    return outputs.loss + WEIGHT * model.regions(hidden) / model.regions.n_features


def by_hand(model: nn.Module, steps: int, low: bool = False) -> list[float]:
    ids = torch.stack([row["input_ids"] for row in rows()])
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = loss_of(model, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(model: nn.Module, folder: Path, steps: int, resume: bool = False, **options: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    losses: list[float] = []

    class WithRegions(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **given: Any) -> Any:
            loss = loss_of(model, inputs["input_ids"])
            losses.append(loss.item())
            return (loss, None) if return_outputs else loss

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    WithRegions(model=model, args=arguments, train_dataset=rows()).train(resume_from_checkpoint=resume)
    return losses


def assert_same(found: nn.Module, expected: nn.Module, **within: float) -> None:
    values = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, values[name], msg=lambda text, name=name: f"{name}: {text}", **within)


def test_under_autocast_the_mixture_is_not_rounded():
    """The language model multiplies in bfloat16; the mixture takes its activations, and computes as it always does."""
    model = model_with_a_mixture()
    ids = torch.stack([row["input_ids"] for row in rows()])
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = hidden_of(model, ids)
        hidden.retain_grad()
        loss = model.regions(hidden)
    assert loss.dtype == torch.float32
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.regions.named_parameters()}
    model.zero_grad()
    leaf = hidden.detach().requires_grad_()
    expected = model.regions(leaf)
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(hidden.grad, leaf.grad)
    for name, p in model.regions.named_parameters():
        assert torch.equal(found[name], p.grad)


def test_a_step_goes_down():
    losses = by_hand(model_with_a_mixture(), 4)
    assert all(later < before for before, later in pairwise(losses)), losses


@pytest.mark.more
@trainer_of_transformers
@pytest.mark.parametrize("low", [False, True])
def test_the_trainer_takes_the_steps_of_a_loop(low: bool, tmp_path: Path) -> None:
    one, other = model_with_a_mixture(), model_with_a_mixture()
    losses = trained(one, tmp_path, 3, bf16=low, save_strategy="no")
    assert losses == pytest.approx(by_hand(other, 3, low), rel=1e-5)
    assert_same(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_with_recomputed_activations():
    """Where a block computes its activations again in the backward pass, gradients are those it had without."""
    one, other = model_with_a_mixture(), model_with_a_mixture()
    enable = getattr(other, "activation_checkpointing_enable", None) or other.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert by_hand(one, 2) == pytest.approx(by_hand(other, 2), rel=1e-6)
    assert_same(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.more
@trainer_of_transformers
def test_a_run_of_the_trainer_resumes_with_its_mixture(tmp_path: Path) -> None:
    """Four steps at once are two, a checkpoint, and two: means, loadings, noise, its floor, and the centre."""
    straight, cut, resumed = (model_with_a_mixture() for _ in range(3))
    for model in (straight, cut):
        model.regions.noise_floor = 0.25
    trained(straight, tmp_path / "straight", 4, save_strategy="no")
    trained(cut, tmp_path / "cut", 2, save_steps=2)
    trained(resumed, tmp_path / "cut", 4, resume=True, save_steps=2)
    assert resumed.regions.noise_floor == 0.25
    assert torch.equal(resumed.regions.center, straight.regions.center)
    assert_same(resumed, straight, rtol=0, atol=0)
