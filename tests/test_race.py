from __future__ import annotations

import pytest

from bench import curves, race
from bench.vmfa import VMFA
from mfa_kernels import MFA
from tests.fitting.planted import draw, nll, planted

pytestmark = pytest.mark.usefixtures("one_thread")

TRUE = planted(8, 12, 2, spread=4.0)
ROWS, TEST = draw(TRUE, 1500), draw(TRUE, 1000, seed=2)


def test_the_peer_comes_near_the_truth():
    model = VMFA(ROWS, 16, 2)
    for _ in range(40):
        model.step()
    found = MFA.from_parameters(model.means + model.origin, model.loadings, model.noise, model.log_weights.exp())
    assert nll(found, TEST) < nll(TRUE, TEST) + 1.0


def test_the_peer_keeps_distinct_candidates_that_are_good():
    model = VMFA(ROWS, 16, 2)
    for _ in range(20):
        model.step()
    found = MFA.from_parameters(model.means + model.origin, model.loadings, model.noise, model.log_weights.exp())
    model._e_step(model._search_space())
    assert (model.kept[:, 0] == found.assign(ROWS)).float().mean() > 0.95
    assert not (model.kept[:, 0] == model.kept[:, 1]).any()


def test_who_is_ahead():
    own = [{"seconds": 2.0, "nll": 10.0}, {"seconds": 5.0, "nll": 8.0}]
    assert race._below(own, [{"seconds": 3.0, "nll": 10.0}, {"seconds": 6.0, "nll": 9.0}])
    assert not race._below(own, [{"seconds": 1.0, "nll": 20.0}]), "it was there first"
    assert not race._below(own, [{"seconds": 4.0, "nll": 9.0}])
    settings = {"components": 8, "rank": 2, "rows": 4000, "held_out": 9, "processor": "any", "threads": 1}
    reports = [{"settings": settings, "runs": {name: own}} for name in ("ours", "other")]
    (merged,) = race.merged(reports)
    assert list(merged["runs"]) == ["ours", "other"]
    assert "| other | 2.0 | 10.0 | 5.0 | 8.0 | 5.0 | 1/1 |" in race.table(merged)
    earlier = {"ours": own, "other": [{"seconds": 1.0, "nll": 10.0}]}
    assert "from then on: no: other" in race.table({**merged, "runs": earlier})
    assert "from then on" not in race.table({**merged, "runs": {"ours": own}})
    later = {"ours": own, "other": [{"seconds": 3.0, "nll": 10.0}]}
    assert "from then on: yes" in race.table({**merged, "runs": later})
    figure = race.figure([merged, {**merged, "settings": {**settings, "components": 99}}])
    assert figure.count("<svg ") == 3
    assert f'x="{curves._WIDTH}"' in figure
