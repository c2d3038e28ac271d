from __future__ import annotations

import pytest
import torch

from bench import scale
from tests.fitting.planted import draw, planted

pytestmark = pytest.mark.usefixtures("one_thread")

TRUE = planted(40, 12, 2, spread=6.0)


def test_a_row_is_a_centroid_and_a_residual_of_the_same_region():
    x = draw(TRUE, 2000)
    stream = scale.Stream(x.clone(), 64, 3000)
    rows = torch.cat(list(stream))
    assert rows.shape == (3000, 12)
    assert stream.made == 3000
    assert stream.seconds > 0
    assert len(rows.unique(dim=0)) > 2500, "next to no row comes twice"
    region_of_cluster = torch.zeros(64, dtype=torch.long)
    region_of_cluster[stream.cluster] = stream.region
    gap = rows.unsqueeze(1) - stream.centroids  # (n, clusters, D)
    found = 0
    for row, of_clusters in zip(rows[:50], gap[:50]):
        distance = torch.cdist(of_clusters, stream.residuals, compute_mode="donot_use_mm_for_euclid_dist")
        cluster, token = divmod(int(distance.argmin()), len(x))
        assert distance.min() < 1e-4, row
        found += int(region_of_cluster[cluster] == stream.region[token])
    assert found > 45


def test_what_is_told():
    curve = [{"tokens": 10 * i, "seconds": 1.0 + i, "held_out_nll": 5.0, "peak_gb": 1.0} for i in (1, 5, 10)]
    found = {
        "tokens": 100, "seconds": 13.0, "tokens_per_second": 7.7, "making_rows": 1.0, "stages": {"online": 10.0},
        "peak_gb": 1.25, "resident_before_gb": 0.5, "candidate_gap": 0.02, "held_out_nll": 5.0,
        "nll_of_documents": 6.0, "live": 8, "curve": curve,
    }  # fmt: skip
    settings = {"components": 8, "rank": 2, "features": 12, "processor": "any", "threads": 2}
    told = scale.told({"settings": settings, "found": found})
    assert "a token 100000.0 us once it runs" in told
    assert "1.25 GB at the peak" in told
