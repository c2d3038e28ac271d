"""An interchange of features as an intervention of pyvene, where it is installed: the logits are those of a `Site`."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.evaluation import MFAFeaturizer, Site
from tests.helpers.language import make_model

pv = pytest.importorskip("pyvene")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", ["centroids", "regions", "columns"])
def test_an_intervention(mode):
    model = make_model("llama").eval()
    generator = torch.Generator().manual_seed(0)
    base, source = ({"input_ids": torch.randint(3, 40, (6, 5), generator=generator)} for _ in range(2))
    site = Site(model, 1, base, source)
    x = torch.cat([site.base, site.source])
    mfa = MFA.from_centroids(x[:4], 2, noise_variance=0.05 * x.var(0)).requires_grad_(False)
    featurizer = MFAFeaturizer(mfa, mode)
    mask = torch.rand(featurizer.n_masked, generator=generator)
    featurize, inverse = featurizer.modules()

    class Interchange(pv.BasisAgnosticIntervention):
        def forward(self, base, source, subspaces=None):
            features, error = featurize(base)
            return inverse(featurizer.mixed(features, featurize(source)[0], mask), error)

    config = pv.IntervenableConfig([{"layer": 1, "component": "block_output", "intervention_type": Interchange}])
    intervenable = pv.IntervenableModel(config, model)
    with torch.no_grad():
        _, found = intervenable(base, [source], {"sources->base": 4})
        expected = site.logits(featurizer.interchange(site.base, site.source, mask), torch.arange(6))
    torch.testing.assert_close(found.logits[:, -1], expected, rtol=1e-4, atol=1e-5)
