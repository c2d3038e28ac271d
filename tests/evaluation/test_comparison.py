"""Methods are compared on the same pairs; what is known of some of them holds."""

from __future__ import annotations

import json

import pytest
import torch

from mfa_kernels import MFA, kmeans
from mfa_kernels.evaluation.comparison import METHODS, Baselines, compare, described, table, write_results
from mfa_kernels.evaluation.localization import localize
from mfa_kernels.evaluation.tasks import Pair, prepare
from tests.helpers.language import make_model, make_tokenizer, words

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def compared():
    """All methods on a small model at the last token of its last layer, where the source's activation is its answer."""
    model, tokenizer = make_model("llama").eval(), make_tokenizer(bos=True)
    prompts = [words(a, a + b, 3 * a) for a in range(20) for b in (1, 2)]
    with torch.no_grad():
        said = [
            " " + tokenizer.decode([int(model(**tokenizer(p, return_tensors="pt")).logits[0, -1].argmax())])
            for p in prompts
        ]
    pairs = [
        Pair(prompts[i], prompts[j], said[j], said[i] != said[j], said[i], said[j], held_out=(i + j) % 3 == 0)
        for i in range(40)
        for j in range(0, 40, 4)
    ]
    task = prepare(model, tokenizer, pairs, **QUIET)
    site = task.site(model, -1)
    x = torch.cat([site.base, site.source])
    mfa = MFA.from_centroids(x[:400:50], 2, noise_variance=0.05 * x.var(0)).requires_grad_(False)
    baselines = Baselines(mfa, x, kmeans(x, 8, progress=False), epochs=1, **QUIET)
    return site, task, baselines, compare(site, task, baselines, seeds=2, das=3, epochs=2, **QUIET)


def test_every_method_is_judged_on_the_same_pairs(compared):
    _, task, _, found = compared
    assert [one.method for one in found] == list(METHODS)
    judged = task.held_out.nonzero()[:, 0]
    for one in found:
        assert len(one.runs) == 2
        assert all(torch.equal(run.judged, judged) for run in one.runs)
        assert one.iia == pytest.approx(sum(run.iia for run in one.runs) / 2)
        assert 0 <= one.low <= one.iia <= one.high <= 1
        share = float(task.changes[judged].double().mean())
        assert one.iia == pytest.approx(share * one.cause + (1 - share) * one.isolation)


def test_what_is_known(compared):
    *_, found = compared
    of = {one.method: one for one in found}
    assert (of["full vector"].iia, of["full vector"].low, of["full vector"].high) == (1, 1, 1)
    assert of["random"].iia < 1
    assert of["random"].runs[0].right.tolist() != of["random"].runs[1].right.tolist(), "other directions"
    assert of["DAS"].runs[0].directions.shape == (16, 3)
    assert (of["neurons"].masked, of["PCA"].masked) == (16, 16)
    assert (of["K-means"].masked, of["centroids"].masked) == (8, 8)
    assert (of["regions"].masked, of["columns"].masked) == (16, 24)
    assert of["SAE"].masked == 8 * 3 // 2, "as many floats stored as in the mixture"
    assert of["centroids"].same_region == of["regions"].same_region > 0
    assert of["neurons"].same_region is None
    assert of["PCA"].whole == of["neurons"].whole == 1, "all features of them are the activation"
    assert of["random"].whole is of["DAS"].whole is of["full vector"].whole is None
    assert 0 <= of["centroids"].whole <= of["regions"].whole <= 1
    assert of["regions"].whole == of["columns"].whole


def test_baselines_are_fitted_once(compared):
    site, _, baselines, _ = compared
    one, other = (baselines.featurizer("SAE", 3, seed) for seed in (0, 1))
    assert one is other
    active = float((baselines.mfa.code(site.base, top_k=None).components >= 0).double().sum(-1).mean())
    assert int((one.encode(site.base) > 0).sum(1).max()) <= round(3 * active)


def test_codes_of_an_autoencoder_are_computed_once(compared, monkeypatch):
    site, task, baselines, _ = compared
    features, calls = baselines.featurizer("SAE", 3, 0), []
    encode = features.encode
    monkeypatch.setattr(features, "encode", lambda x: calls.append(len(x)) or encode(x))
    localize(site.logits, task.labels, site.base, site.source, features, epochs=2, **QUIET)
    assert [n for n in calls if n > 1] == [400, 400], "and one pair is tried before"


def test_tables(compared, tmp_path):
    _, task, _, found = compared
    lines = table(found).splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert lines[2].startswith("| full vector | 1.000 | 1.000 to 1.000 |")
    path = tmp_path / "found.json"
    write_results(path, found, task, 3)
    content = json.loads(path.read_text())
    assert (content["pairs"], content["layer"], content["accuracy"]) == (400, 3, 1.0)
    assert content["results"] == described(found)


def test_what_does_not_fit_is_named(compared):
    site, task, baselines, _ = compared
    with pytest.raises(ValueError, match="methods must be"):
        compare(site, task, baselines, ["guessing"])
    with pytest.raises(ValueError, match="activations must be given for PCA"):
        compare(site, task, Baselines(baselines.mfa), ["PCA"], **QUIET)
    with pytest.raises(ValueError, match="clusters must be given for K-means"):
        compare(site, task, Baselines(baselines.mfa, site.base), ["K-means"], **QUIET)
    with pytest.raises(ValueError, match="activations have 3 features, but the mixture has 16"):
        Baselines(baselines.mfa, torch.randn(20, 3))
    with pytest.raises(ValueError, match="das must be"):
        compare(site, task, baselines, das=17)
    with pytest.raises(ValueError, match=r"held_out must be a share, or bool \(400,\)"):
        localize(site.logits, task.labels, site.base, site.source, das=1, held_out=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="held_out must leave pairs to train on"):
        localize(site.logits, task.labels, site.base, site.source, das=1, held_out=torch.ones(400, dtype=torch.bool))
