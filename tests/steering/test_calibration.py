"""`alpha_for_kl`: the KL it promises, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfa_kernels import steer
from mfa_kernels.steering import Add, Offset, Toward, alpha_for_kl
from tests.steering.tiny import LAYER, WIDTH, causal_lm, count_hooks, fitting_mixture, prompts

Z = torch.tensor([1.0, -2.0, 0.5])
V = torch.linspace(-1, 1, WIDTH)


@torch.no_grad()
def next_token(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits[:, -1].double().log_softmax(-1)


def divergence(steered: Tensor, unsteered: Tensor) -> float:
    return float(F.kl_div(unsteered, steered, log_target=True, reduction="batchmean"))


SPECS: dict[str, Any] = {
    "alpha": None,
    "interpolation": lambda alpha: Toward(3, alpha),
    "vector": lambda alpha: Add(V, alpha),
    "inside": lambda alpha: [Toward(3, alpha), Offset(3, alpha * Z)],
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kl", [0.02, 0.2])
def test_the_kl_found_is_the_kl_wanted(name: str, kl: float) -> None:
    model, inputs, spec = causal_lm(), prompts(3, padded=True), SPECS[name]
    unsteered = next_token(model, inputs)
    with steer(model, fitting_mixture(), LAYER, 3, 0.1) as handle:
        before, stats = next_token(model, inputs), handle.stats()
        alpha = alpha_for_kl(model, inputs, handle, kl, spec=spec, most=1.0 if spec is None else 8.0)
        assert handle.stats() == stats
        assert torch.equal(next_token(model, inputs), before)
        handle.update(**({"alpha": alpha} if spec is None else {"interventions": spec(alpha)}))
        assert divergence(next_token(model, inputs), unsteered) == pytest.approx(kl, rel=2e-3)


def test_other_handles_and_right_padding(model: Any, mfa: Any) -> None:
    inputs = prompts(2)
    right = {name: F.pad(value, (0, 3)) for name, value in inputs.items()}
    with steer(model, mfa, 0, 1, 0.5):
        unsteered = next_token(model, inputs)
        with steer(model, mfa, LAYER, 3, 0.1) as handle:
            alpha = alpha_for_kl(model, right, handle, 0.05)
            handle.update(alpha=alpha)
            assert divergence(next_token(model, inputs), unsteered) == pytest.approx(0.05, rel=2e-3)


def test_a_budget_out_of_reach_is_an_error_and_leaves_everything(model: Any, inputs: Any) -> None:
    with steer(model, fitting_mixture(), LAYER, 3, 0.25) as handle:
        before, hooks = next_token(model, inputs), count_hooks(model)
        with pytest.raises(ValueError, match=r"kl: at alpha = 1.0 it is [\d.]+ nats, less than 50.0"):
            alpha_for_kl(model, inputs, handle, 50.0)
        with pytest.raises(ValueError, match="must be positive"):
            alpha_for_kl(model, inputs, handle, 0.0)
        handle.update(positions="generated")
        with pytest.raises(ValueError, match="it is 0 nats"):
            alpha_for_kl(model, inputs, handle, 0.1)
        handle.update(positions="all")
        assert torch.equal(next_token(model, inputs), before)
        assert count_hooks(model) == hooks


def test_a_kl_that_jumps_is_an_error(model: Any, inputs: Any) -> None:
    with (
        steer(model, fitting_mixture(), LAYER, interventions=[]) as handle,
        pytest.raises(ValueError, match="kl jumps over 0.05"),
    ):
        alpha_for_kl(model, inputs, handle, 0.05, spec=lambda alpha: Toward(3, 1.0 if alpha > 0.3 else 0.0))


def test_a_model_in_training_is_refused(model: Any) -> None:
    """Of all modules one is enough: its dropout would be taken for an effect of steering."""
    with steer(model, fitting_mixture(), LAYER, 3, 0.1) as handle:
        model.get_submodule("model.layers.2").train()
        with pytest.raises(ValueError, match=r"model is in training mode.*call model.eval\(\)"):
            alpha_for_kl(model, prompts(2), handle, 0.05)
        model.eval()
        assert alpha_for_kl(model, prompts(2), handle, 0.05) > 0


@pytest.mark.parametrize("masked", [False, True])
def test_of_an_encoder_decoder_it_is_the_token_that_the_decoder_comes_to(masked: bool) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=64, d_model=WIDTH, encoder_attention_heads=4, decoder_attention_heads=4, init_std=0.2, **sizes
        )
        model = BartForConditionalGeneration(config).eval()
    inputs, decoder = prompts(2, 7, padded=True), torch.tensor([[2, 3, 4, 5], [2, 6, 7, 8]])
    given = {**inputs, "decoder_input_ids": decoder}
    if masked:  # on the right: the token that counts is the last but one
        given["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0]] * 2)

    def last() -> Tensor:
        with torch.no_grad():
            return model(**given).logits[:, 2 if masked else 3].double().log_softmax(-1)

    unsteered = last()
    with steer(model, fitting_mixture(), 1, 3, 0.1) as handle:
        handle.update(alpha=alpha_for_kl(model, given, handle, 0.05))
        assert divergence(last(), unsteered) == pytest.approx(0.05, rel=2e-3)
        with pytest.raises(ValueError, match="inputs must hold decoder_input_ids, .*got input_ids, attention_mask"):
            alpha_for_kl(model, inputs, handle, 0.05)


def test_wrong_calls_are_named(model: Any, mfa: Any) -> None:
    with steer(model, mfa, LAYER, 1, 0.5) as handle:
        with pytest.raises(TypeError, match="spec must be callable, got 3"):
            alpha_for_kl(model, {"input_ids": prompts()}, handle, 0.1, spec=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
            alpha_for_kl(3, {"input_ids": prompts()}, handle, 0.1)  # type: ignore[arg-type]
        assert not handle.is_removed
    assert handle.is_removed
    with pytest.raises(ValueError, match="handle must steer, got one that was removed: call steer again"):
        alpha_for_kl(model, {"input_ids": prompts()}, handle, 0.1)
