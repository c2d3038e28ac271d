"""Steering through the hooks of other frameworks: the packages themselves where installed, else their calls alone.

    pip install ".[test,interop]" && python -m pytest -rs tests/steering/test_function_hook.py

`-rs` says what was skipped, and a warning says so without it. Run with nnsight 0.8.1, TransformerLens 4.3.0 (its bridge
to Hugging Face models) and 2.16.1 (its own transformer, which 4 no longer has).
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfa_kernels import steer
from mfa_kernels.steering import Offset, Reconstruct, Responsibility, SteeringFunction, Toward, intervene
from tests.steering.tiny import LAYER, WIDTH, Z, causal_lm, fitting_mixture, prompts, tokens

SPECS: dict[str, dict[str, Any]] = {
    "fixed": {"interventions": [Toward(2, 0.6), Offset(2, Z)]},
    "gate": {"interventions": [Reconstruct(0.7)], "gate": Responsibility(0, 0.1), "norm": "keep"},
    "rows": {"rows": [Toward(1, 0.5), None]},
}


def installed(name: str) -> Any:
    """A package, or the test is skipped, which a warning says."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        warnings.warn(f"steering through {name} is not tested here: {error}", stacklevel=2)
        pytest.skip(f'{error}; pip install "mfa_kernels[interop]"')


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_intervene_prepared(name: str, dtype: torch.dtype) -> None:
    mfa, fn = fitting_mixture(), SteeringFunction(fitting_mixture(), **SPECS[name])
    for x in (tokens(2, 5).to(dtype), tokens(4, 1).to(dtype), tokens(2, 0).to(dtype)):
        before = x.clone()
        # As TransformerLens calls a hook, and as nnsight writes into a proxy.
        assert torch.equal(fn(x, hook=object()), intervene(x, mfa, **SPECS[name]))
        assert torch.equal(x, before)
        x[:] = fn(x)
        assert torch.equal(x, intervene(before, mfa, **SPECS[name]))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 32\)"):
        fn(torch.zeros(2, 31))


def test_schedule_takes_the_step() -> None:
    fn, x = SteeringFunction(fitting_mixture(), Toward(2, lambda step: 0.1 * step)), tokens(1, 3)
    assert torch.equal(fn(x, step=0), x)
    torch.testing.assert_close(fn(x, step=4), intervene(x, fitting_mixture(), Toward(2, 0.4)))


@pytest.fixture
def steered() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A GPT-2, a prompt, and the logits that `steer` gives under each of SPECS."""
    model, ids = causal_lm("gpt2"), prompts()["input_ids"]
    logits = {}
    for name, spec in SPECS.items():
        with torch.no_grad(), steer(model, fitting_mixture(), LAYER, **spec):
            logits[name] = model(ids).logits
    return model, ids, logits


@pytest.mark.parametrize("name", SPECS)
def test_nnsight(name: str, steered: Any) -> None:
    nnsight = installed("nnsight")
    model, ids, expected = steered
    fn, traced = SteeringFunction(fitting_mixture(), **SPECS[name]), nnsight.NNsight(model)
    with torch.no_grad(), traced.trace(ids):
        out = traced.transformer.h[LAYER].output
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[:] = fn(hidden)
        logits = traced.output.logits.save()
    torch.testing.assert_close(logits, expected[name])


def test_steer_on_a_model_that_nnsight_holds(steered: Any) -> None:
    nnsight = installed("nnsight")
    model, ids, expected = steered
    nnsight.NNsight(model)
    with torch.no_grad(), steer(model, fitting_mixture(), LAYER, **SPECS["fixed"]):
        torch.testing.assert_close(model(ids).logits, expected["fixed"])


@pytest.mark.parametrize("name", SPECS)
def test_transformer_lens(name: str) -> None:
    """A hooked transformer with random weights: the hook's value is steered, and what follows sees it."""
    transformer_lens = installed("transformer_lens")
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        pytest.skip("not applicable: TransformerLens 4 wraps Hugging Face models, which the test below is about")
    config = transformer_lens.HookedTransformerConfig(
        n_layers=3, d_model=WIDTH, n_ctx=64, d_head=8, n_heads=4, d_vocab=64, act_fn="gelu", seed=0, device="cpu"
    )
    model, ids, mfa = HookedTransformer(config), prompts()["input_ids"], fitting_mixture()
    fn, seen = SteeringFunction(mfa, **SPECS[name]), {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value

    site, last = f"blocks.{LAYER}.hook_resid_post", "blocks.2.hook_resid_pre"
    with torch.no_grad():
        clean = model.run_with_cache(ids, names_filter=site)[1][site]
        logits = model.run_with_hooks(ids, fwd_hooks=[(site, fn), (last, keep)])
        with model.hooks([(site, fn)]):
            assert torch.equal(model(ids), logits)
        assert not torch.allclose(model(ids), logits)
    torch.testing.assert_close(seen[last], intervene(clean, mfa, **SPECS[name]))


@pytest.mark.parametrize("name", SPECS)
def test_transformer_bridge(name: str, steered: Any) -> None:
    bridge = installed("transformer_lens.model_bridge")
    model, ids, expected = steered
    wrapped = bridge.TransformerBridge.boot_transformers("gpt2", hf_model=model, tokenizer=_tokenizer())
    fn = SteeringFunction(fitting_mixture(), **SPECS[name])
    with torch.no_grad():
        logits = wrapped.run_with_hooks(ids, fwd_hooks=[(f"blocks.{LAYER}.hook_out", fn)])
    torch.testing.assert_close(logits, expected[name])


def _tokenizer() -> Any:
    from mfa_kernels.data import tiny_lm

    return tiny_lm.load()[1]
