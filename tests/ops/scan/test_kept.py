"""Every logit of crowded tokens, kept from the forward pass for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mfa_kernels import ops
from mfa_kernels.ops.scan import op
from tests.helpers.mixtures import Mixture, drawn

pytestmark = pytest.mark.usefixtures("needs_cpp")


def kept(m: Mixture, x: Tensor, center: Tensor | None = None) -> Tensor:
    woodbury = m.woodbury(center)
    return torch.ops.mfa_kernels.log_prob_keeping(x, *m, *woodbury.tensors(), 2, *woodbury.int8)[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_component", [False, True], ids=["shared", "per_component"])
@pytest.mark.parametrize("tokens", [1, 3, 100, 300, 1000])
def test_logits_that_are_kept_are_those_of_the_scan(tokens, per_component, dtype):
    m, x = drawn(tokens, 70, 50, 5, spread=0.05, per_component=per_component, dtype=dtype)
    if per_component:  # nearly alike, so that no token tells components apart
        m = m._replace(noise_variance=m.noise_variance[:1] * (1 + 0.01 * m.noise_variance))
    woodbury = m.woodbury()
    wanted = op.dense_logits(x, woodbury, woodbury.constants(m.log_weights))
    assert torch.equal(kept(m, x), wanted.t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_kept_where_few_tokens_are_crowded(dtype):
    m, x = drawn(1000, 70, 50, 5, spread=3.0, dtype=dtype)
    assert kept(m, x).shape == (0, 1000)


def test_a_backward_pass_uses_what_is_kept(monkeypatch):
    m, x = drawn(400, 70, 50, 5, spread=0.05)
    woodbury = m.woodbury()

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, *m)]
        ops.log_prob(*leaves, woodbury, 2).log_prob.sin().sum().backward()
        return [leaf.grad for leaf in leaves]

    def again(*given: Tensor) -> Tensor:
        raise AssertionError("the logits were computed again")

    with monkeypatch.context() as patch:
        patch.setattr(op, "dense_logits", again)
        found = gradients()
    keeping = torch.ops.mfa_kernels.log_prob_keeping
    monkeypatch.setattr(op, "_needs_gradients", lambda *tensors: False)
    for one, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().amax().item())
    active = keeping(x, *m, *woodbury.tensors(), 2)
    with pytest.raises(ValueError, match="log_prob_backward: kept must be float32 of shape"):
        torch.ops.mfa_kernels.log_prob_backward(
            active[0], active[2], x, *m, *woodbury.tensors(), *active[:4], [True] * 5, active[4][:, :-1]
        )


def test_compiled_programs_take_the_operator_that_keeps_nothing():
    m, x = drawn(300, 20, 30, 3, spread=0.05)
    woodbury, seen = m.woodbury(), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x.requires_grad_()
    torch.compile(lambda x: ops.log_prob(x, *m, woodbury).log_prob, backend=backend, fullgraph=True)(x)
    assert "mfa_kernels.log_prob" in seen or "mfa_kernels.log_prob.default" in seen
    assert not any("keeping" in name for name in seen)
