"""Modules are found under the names that they had, which say once where they are now."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch

from mfa_kernels import MFA
from mfa_kernels.common import moved
from mfa_kernels.mixture.fit_report import FitReport
from mfa_kernels.mixture.sharded import ShardedMFA

USED = {
    "arrays": "as_tensor", "checkpoint": "save_pretrained", "checks": "check_integer", "cli": "main", "code": "Code",
    "codes": "write_codes", "demo": "run", "doctor": "report", "files": "atomic_path", "fit_report": "FitReport",
    "fitting.loop": "fit", "fitting.many": "fit_many", "fitting.reservoir": "reservoir",
    "fitting.screening": "Screening", "fitting.sharded": "fit_sharded", "fitting.source": "as_source",
    "fitting.start": "start_from_clusters", "mfa": "MFA", "modes": "door", "places": "check_place",
    "ranks": "Processes", "reference_checkpoint": "load_reference", "rotation": "varimax", "sharded": "ShardedMFA",
    "steering.budget": "alpha_for_kl", "steering.evidence": "Reader", "steering.functions": "SteeringFunction",
    "steering.live": "stream", "steering.paper": "MFASteerer", "tuning": "main",
}  # fmt: skip


def test_all_of_them_are_tested():
    assert USED.keys() == moved.MOVED.keys()


@pytest.mark.parametrize(("old", "name"), USED.items())
def test_a_module_is_found_under_its_name_of_before(old, name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"mfa_kernels.{old}", raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = getattr(import_module(f"mfa_kernels.{old}"), name)
        import_module(f"mfa_kernels.{old}")
    new = f"mfa_kernels.{moved.MOVED[old]}"
    assert found is getattr(import_module(new), name)
    assert name in dir(import_module(f"mfa_kernels.{old}"))
    assert [str(w.message) for w in told] == [f"mfa_kernels.{old} is {new} now"]


def test_the_command_line_under_its_name_of_before():
    for module in ("mfa_kernels", "mfa_kernels.cli", "mfa_kernels.commands.cli"):
        out = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
        assert out.stdout.startswith("mfa_kernels ")


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("ops", "Active", "ActivePairs"),
        ("ops", "Factors", "Woodbury"),
        ("steering", "Function", "SteeringFunction"),
        ("common.processes", "Ranks", "Processes"),
    ],
)
def test_a_name_of_before_in_a_module(module, old, new):
    found = import_module(f"mfa_kernels.{module}")
    with pytest.warns(FutureWarning, match=f"mfa_kernels.{module}.{old} is {new} now"):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="has no attribute 'Another'"):
        found.Another  # noqa: B018


def test_a_method_of_before():
    mfa = MFA(2, 3, 1)
    with torch.no_grad(), pytest.warns(FutureWarning, match="this attribute is woodbury now"):
        assert mfa.factors() is mfa.woodbury()


@pytest.mark.parametrize("make", [lambda mfa: mfa, ShardedMFA], ids=["MFA", "ShardedMFA"])
@pytest.mark.parametrize(("old", "new"), [("ranks", "processes"), ("start", "first_component")])
def test_an_attribute_of_before(old, new, make):
    mfa = make(MFA(2, 3, 1))
    with pytest.warns(FutureWarning, match=f"this attribute is {new} now"):
        assert getattr(mfa, old) is getattr(mfa, new)


def test_an_object_may_have_an_attribute_by_an_old_name():
    class Own(MFA):
        start = "its own"

    assert Own(2, 3, 1).start == "its own"
    mfa = MFA(2, 3, 1)
    mfa.ranks = "its own"
    assert mfa.ranks == "its own"


def test_a_mixture_that_was_pickled_under_the_old_names():
    mfa = MFA(2, 3, 1)
    mfa.fit_report = FitReport(method="em")
    pickled = pickle.dumps(mfa, 2)
    for old in ("mfa", "fit_report"):
        new = moved.MOVED[old].encode()
        assert b"cmfa_kernels." + new in pickled
        pickled = pickled.replace(b"cmfa_kernels." + new, b"cmfa_kernels." + old.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        again = pickle.loads(pickled)
    assert again.fit_report == mfa.fit_report
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), mfa.parameters()))
