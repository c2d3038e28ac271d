"""Operators are registered under the schemas that they have had, and refuse tensors of several devices."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels.ops.common import register
from mfa_kernels.ops.intervene import op as intervene  # noqa: F401  (registers an operator)
from mfa_kernels.ops.kmeans import op as kmeans  # noqa: F401
from mfa_kernels.ops.scan import candidates, top_scores  # noqa: F401
from mfa_kernels.ops.screen import differentiable  # noqa: F401
from mfa_kernels.ops.statistics import op as statistics  # noqa: F401
from tests.helpers.mixtures import mixture

NAMES = ("components", "responsibilities", "latents", "means", "loadings")

SCHEMAS = """
cluster_sums(Tensor x, Tensor center, Tensor owner, Tensor distance, Tensor? weights, Tensor(a!) sums, Tensor(b!)
  mass, Tensor(c!) inertia) -> ()
component_log_prob(Tensor x, Tensor means, Tensor loadings, Tensor noise_variance, Tensor rows, Tensor cholesky,
  Tensor log_det, Tensor scale, Tensor center) -> Tensor
component_log_prob_backward(Tensor grad, Tensor x, Tensor means, Tensor loadings, Tensor noise_variance, Tensor rows,
  Tensor cholesky, Tensor log_det, Tensor scale, Tensor center, bool[] needs) -> (Tensor grad_x, Tensor grad_means,
  Tensor grad_loadings, Tensor grad_noise)
decode(Tensor components, Tensor responsibilities, Tensor latents, Tensor means, Tensor loadings) -> Tensor
decode_backward(Tensor grad, Tensor components, Tensor responsibilities, Tensor latents, Tensor means, Tensor
  loadings, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)
factors(Tensor means, Tensor loadings, Tensor noise_variance) -> (Tensor rows, Tensor cholesky, Tensor log_det)
int8_rows(Tensor rows, Tensor cholesky, Tensor scale, Tensor center, bool per_component) -> (Tensor rows8, Tensor
  means8, Tensor starts8, Tensor terms8, Tensor scale8)
intervene(Tensor hidden, Tensor coefficients, Tensor shift, Tensor rules, Tensor thresholds, bool keeps_norm, Tensor?
  latents, bool spreads, Tensor? chosen, Tensor? passed, Tensor? log_prob, Tensor? components, Tensor? logits, Tensor?
  counts, Tensor? means, Tensor? loadings, Tensor? rows, Tensor? cholesky, Tensor? scale, bool per_component) ->
  (Tensor steered, Tensor tally)
latents(Tensor x, Tensor tokens, Tensor components, Tensor means, Tensor loadings, Tensor noise_variance, Tensor rows,
  Tensor cholesky, Tensor log_det, Tensor scale, Tensor center) -> Tensor
latents_backward(Tensor grad, Tensor latents, Tensor x, Tensor tokens, Tensor components, Tensor means, Tensor
  loadings, Tensor noise_variance, Tensor cholesky, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)
log_prob(Tensor x, Tensor means, Tensor loadings, Tensor noise_variance, Tensor log_weights, Tensor rows, Tensor
  cholesky, Tensor log_det, Tensor scale, Tensor center, int slots, bool exact=True, Tensor? rows16=None, Tensor?
  scales=None, Tensor? offsets=None, Tensor? squares=None, Tensor? bounds=None, Tensor? worst=None, Tensor?
  reference=None, Tensor? rows8=None, Tensor? means8=None, Tensor? starts8=None, Tensor? terms8=None, Tensor?
  scale8=None) -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts)
log_prob_backward(Tensor grad_log_prob, Tensor grad_logits, Tensor x, Tensor means, Tensor loadings, Tensor
  noise_variance, Tensor log_weights, Tensor rows, Tensor cholesky, Tensor log_det, Tensor scale, Tensor center,
  Tensor log_prob, Tensor components, Tensor logits, Tensor counts, bool[] needs, Tensor? kept=None) -> (Tensor
  grad_x, Tensor grad_means, Tensor grad_loadings, Tensor grad_noise, Tensor grad_log_weights)
log_prob_keeping(Tensor x, Tensor means, Tensor loadings, Tensor noise_variance, Tensor log_weights, Tensor rows,
  Tensor cholesky, Tensor log_det, Tensor scale, Tensor center, int slots, Tensor? rows8=None, Tensor? means8=None,
  Tensor? starts8=None, Tensor? terms8=None, Tensor? scale8=None) -> (Tensor log_prob, Tensor components, Tensor
  logits, Tensor counts, Tensor kept)
nearest(Tensor x, Tensor centroids, Tensor center, Tensor? basis=None) -> (Tensor owner, Tensor distance)
scan_candidates(Tensor x, Tensor candidates, Tensor rows, Tensor cholesky, Tensor scale, Tensor center, Tensor
  constants, bool per_component, int slots) -> (Tensor log_prob, Tensor components, Tensor logits, Tensor counts,
  Tensor of_candidates)
scan_rows(Tensor rows, Tensor cholesky, Tensor scale, Tensor center, bool per_component) -> (Tensor rows16, Tensor
  scales, Tensor offsets, Tensor squares, Tensor bounds, Tensor worst, Tensor reference)
screened_log_prob(Tensor x, Tensor means, Tensor loadings, Tensor noise_variance, Tensor log_weights, Tensor rows,
  Tensor cholesky, Tensor log_det, Tensor scale, Tensor center, Tensor screen_center, Tensor basis, Tensor bound_rows,
  Tensor starts, Tensor terms, float exact_slack, int slots) -> (Tensor log_prob, Tensor components, Tensor logits,
  Tensor counts, Tensor dropped, Tensor evaluated)
select_screened(Tensor x, Tensor rows, Tensor constants, Tensor scale, Tensor center, Tensor basis, Tensor bound_rows,
  Tensor starts, Tensor terms, float exact_slack, float threshold, int slots) -> (Tensor log_prob, Tensor components,
  Tensor logits, Tensor counts, Tensor dropped, Tensor evaluated)
statistics(Tensor x, Tensor components, Tensor weights, Tensor rows, Tensor cholesky, Tensor scale, Tensor center,
  bool per_component, Tensor(a!) mass, Tensor(b!) shift, Tensor(c!) latent, Tensor(d!) second, Tensor(e!) cross,
  Tensor(f!) squares) -> ()
top_scores(Tensor y, Tensor right, Tensor offsets, int count, Tensor? starts=None, Tensor? lists=None) -> Tensor
"""


def test_schemas_are_those_that_saved_programs_were_made_with():
    found = [str(getattr(torch.ops.mfa_kernels, name).default._schema) for name in register.KERNELS]
    assert sorted(found) == [f"mfa_kernels::{schema}" for schema in SCHEMAS.replace("\n  ", " ").split("\n") if schema]


@pytest.mark.parametrize("device", ["CPU", "CUDA", "XPU", "MPS", "Meta"])
def test_every_operator_of_a_mixture_is_there_on_every_device(device):
    """What has C++ kernels alone is never called elsewhere."""
    cpu_alone = {"log_prob_keeping", "select_screened", "screened_log_prob"}
    missing = {
        name
        for name in register.KERNELS
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mfa_kernels::{name}", device)
    }
    assert missing == (set() if device in ("CPU", "Meta") else cpu_alone)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch makes graphs of all or nothing")
def test_what_waits_for_the_device_stays_out_of_cuda_graphs():
    """What does not is captured: test_no_wait.py and the device tests hold that."""
    waits = {
        name
        for name in register.KERNELS
        if torch.Tag.cudagraph_unsafe in getattr(torch.ops.mfa_kernels, name).default.tags
    }
    assert waits == {"log_prob_backward", "component_log_prob_backward", "latents_backward"}


def test_one_device():
    fits = register.on_one_device("decode", lambda *tensors: "called", NAMES)
    tensors = [
        torch.zeros(1, 1).int(),
        torch.zeros(1, 1),
        torch.zeros(1, 1, 3),
        torch.zeros(9, 5),
        torch.zeros(9, 5, 3),
    ]
    assert fits(*tensors) == "called"
    with pytest.raises(ValueError, match="decode: means must be on the device of the other tensors, cpu, got meta"):
        fits(*tensors[:3], *(t.to("meta") for t in tensors[3:]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensors on two devices need a GPU")
def test_one_device_of_two():
    m = mixture(9, 21, 3)
    slots = torch.zeros(1, 1).int().cuda(), torch.zeros(1, 1).cuda(), torch.zeros(1, 1, 3).cuda()
    with pytest.raises(ValueError, match="decode: means must be on the device of the other tensors"):
        torch.ops.mfa_kernels.decode(*slots, *m[:2])
