"""The page of a region."""

from __future__ import annotations

import pytest
import torch

from mfa_kernels.explorer import Explorer, region
from mfa_kernels.interpret.lens import logit_lens
from mfa_kernels.interpret.neighbors import neighbors


def test_a_page_shows_rows_of_its_region(explorer: Explorer) -> None:
    k = explorer.owning[0]
    page = region.page(explorer, k)
    assert page["explanation"] == ("why" if k == 1 else "")
    assert page["contexts"]
    assert {context["component"] for context in page["contexts"]} == {k}
    assert sum(page["responsibilities"]["counts"]) == page["rows"]
    assert len(page["distances"]["edges"]) == len(page["distances"]["counts"]) + 1
    lengths = [latent["length"] for latent in page["latents"]]
    assert lengths == sorted(lengths, reverse=True)
    assert {latent["axis"] for latent in page["latents"]} == {0, 1}
    index, distance = neighbors(explorer.mfa, 7, components=[k])
    assert [near["component"] for near in page["neighbors"]] == index[0].tolist()
    assert [near["distance"] for near in page["neighbors"]] == pytest.approx(distance[0].tolist())
    assert k not in page["constellation"]


def test_every_region_has_a_page(explorer: Explorer) -> None:
    for k in range(explorer.mfa.n_components):
        assert region.page(explorer, k)["component"] == k


def test_orders_of_contexts(explorer: Explorer) -> None:
    k = max(explorer.owning, key=lambda j: int(explorer.assigned.counts[j]))
    far = region.contexts(explorer, k, "distance", 0, 1000)["contexts"]
    distances = [context["distance"] for context in far]
    assert distances == sorted(distances, reverse=True)
    near = region.contexts(explorer, k, "responsibility", 0, 1000)
    keys = [(-context["responsibility"], context["distance"]) for context in near["contexts"]]
    assert keys == sorted(keys)
    assert near["total"] == len(near["contexts"])
    assert sum(1 + context["folded"] for context in near["contexts"]) == int(explorer.assigned.counts[k])
    assert region.contexts(explorer, k, "responsibility", 1, 2)["contexts"] == near["contexts"][1:3]
    spread = region.contexts(explorer, k, "spread", 0, 1000)["contexts"]
    assert region.contexts(explorer, k, "spread", 0, 1000)["contexts"] == spread
    # The first of several near-copies differs between orders; how many there are does not.
    assert sorted(context["folded"] for context in spread) == sorted(context["folded"] for context in far)


def test_contexts_along_a_latent(explorer: Explorer) -> None:
    k = max(explorer.owning, key=lambda j: int(explorer.assigned.counts[j]))
    found = region.latent(explorer, k, 1)
    assert found["axis"] == 1
    values = [entry["value"] for entry in found["quantiles"]]
    assert values == sorted(values)
    assert explorer.assigned.latents is not None
    z = explorer.assigned.latents[explorer.assigned.rows(k), 1]
    assert values[0] == pytest.approx(float(z.min()))
    assert values[-1] == pytest.approx(float(z.max()))
    for entry in found["quantiles"]:
        for context in entry["contexts"]:
            assert context["score"] == pytest.approx(float(explorer.assigned.latents[context["row"], 1]))
    assert found["lens"] is not None


def test_the_lens_is_logit_lens(explorer: Explorer) -> None:
    expected = logit_lens(explorer.model, explorer.mfa, 2, top=10, tokenizer=explorer.tokenizer)
    found = region.lens(explorer, 2)
    assert [(t["token"], t["change"]) for t in found["raised"]] == [
        (t.token, pytest.approx(t.change)) for t in expected.top
    ]


def test_histograms() -> None:
    found = region.histogram(torch.tensor([0.0, 0.5, 1.0, torch.nan, 1.0]), 0.0, 1.0)
    assert sum(found["counts"]) == 4
    assert found["counts"][-1] == 2
    assert (found["edges"][0], found["edges"][-1]) == (0.0, 1.0)
    assert region.histogram(torch.empty(0)) == {"edges": [], "counts": []}
    assert sum(region.histogram(torch.ones(5))["counts"]) == 5  # all alike
