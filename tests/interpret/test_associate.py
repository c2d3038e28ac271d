"""Labels that regions or latents know are found, others are not, and chance is told from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mfa_kernels.interpret import associate
from mfa_kernels.mixture.codes import Code

N, R = 600, 3


@pytest.fixture(scope="module")
def code() -> Code:
    generator = torch.Generator().manual_seed(0)
    component = torch.randint(4, (N, 1), generator=generator)
    latents = torch.randn(N, 1, R, generator=generator)
    return Code(component, torch.ones(N, 1), latents, torch.zeros(N))


def test_a_label_that_is_the_region(code):
    found = associate(code, code.components[:, 0])
    assert found.nmi == pytest.approx(1)
    assert found.purity == 1
    assert found.p == pytest.approx(1 / 201)
    assert found.nmi_null < 0.02
    assert 0.25 < found.purity_null < 0.35
    assert found.latents == [], "inside a region it does not vary"


def test_by_hand():
    """Two regions of 4, classes 3 + 1 and 1 + 3."""
    code = Code(torch.tensor([[0]] * 4 + [[1]] * 4), torch.ones(8, 1), torch.zeros(8, 1, 0), torch.zeros(8))
    found = associate(code, ["a", "a", "a", "b", "b", "b", "b", "a"])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.nmi == pytest.approx(1 - entropy / math.log(2))
    assert found.purity == 0.75
    assert found.rows == 8


def test_a_label_that_nothing_knows(code):
    label = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
    found = associate(code, label)
    assert found.nmi < 0.02
    assert found.p > 0.05
    assert found.nmi == pytest.approx(found.nmi_null, abs=0.02)
    assert min(latent.p for latent in found.latents) > 0.01
    assert len(found.latents) == 4 * R


@pytest.mark.parametrize("kind", ["sign", "value", "three classes"])
def test_a_label_that_one_latent_knows(code, kind):
    """In region 2, along latent 1."""
    z = code.latents[:, 0, 1]
    label = torch.randn(N, generator=torch.Generator().manual_seed(2))
    here = code.components[:, 0] == 2
    if kind == "value":
        label = torch.where(here, -(z**3), label)
    elif kind == "sign":
        label = torch.where(here, z, label) > 0
    else:
        label = torch.bucketize(torch.where(here, z, label), torch.tensor([-0.5, 0.5]))
    found = associate(code, label)
    best = found.latents[0]
    assert (best.component, best.axis) == (2, 1)
    assert best.p == pytest.approx(1 / 201)
    assert best.rows == int(here.sum())
    expected = {"value": (-1.0, 1e-9), "sign": (0.87, 0.03), "three classes": (0.93, 0.05)}[kind]
    assert best.correlation == pytest.approx(expected[0], abs=expected[1])
    others = [latent for latent in found.latents if latent is not best]
    assert max(abs(latent.correlation) for latent in others) < 0.4
    assert (found.nmi is None) == (kind == "value")


def test_equal_values_share_a_rank(code):
    """A Spearman correlation by hand, with ties."""
    few = Code(
        torch.zeros(5, 1).long(), torch.ones(5, 1), torch.tensor([1.0, 2, 2, 3, 4]).view(5, 1, 1), torch.zeros(5)
    )
    (latent,) = associate(few, [1.0, 1.0, 2.0, 3.0, 3.0], min_rows=3).latents
    one, other = np.array([1, 2.5, 2.5, 4, 5]), np.array([1.5, 1.5, 3, 4.5, 4.5])
    assert latent.correlation == pytest.approx(np.corrcoef(one, other)[0, 1])


def test_rows_without_a_region_and_small_regions_do_not_count(code):
    components = code.components.clone()
    components[::2] = -1
    found = associate(Code(components, code.responsibilities, code.latents, code.dropped), np.arange(N) % 2 == 0)
    assert found.rows == N // 2
    assert associate(code, torch.rand(N), min_rows=400).latents == []


def test_the_same_seed_gives_the_same(code):
    label = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))
    assert associate(code, label) == associate(code, label.numpy())
    assert associate(code, label) == associate(code, [f"class {int(each)}" for each in label])


def test_labels_of_whole_texts_are_shuffled_as_wholes(code):
    """Thirty texts of twenty rows, each text in one region: row by row it looks far from chance, by texts as it is."""
    generator = torch.Generator().manual_seed(5)
    text = torch.arange(N) // 20
    component = torch.randint(4, (30,), generator=generator)[text].unsqueeze(1)
    own = Code(component, code.responsibilities, code.latents, code.dropped)
    label = torch.randint(2, (30,), generator=generator)[text]
    assert associate(own, label).p == pytest.approx(1 / 201)
    assert associate(own, label, groups=text).p > 0.05
    knows = associate(own, component[:, 0] % 2, groups=text)
    assert knows.p == pytest.approx(1 / 201)
    with pytest.raises(ValueError, match="groups must have one label each"):
        associate(own, torch.arange(N) % 2, groups=text)
    with pytest.raises(ValueError, match="groups must be one for each of 600 rows"):
        associate(own, label, groups=text[:7])


def test_texts_of_numpy(code):
    label = np.array(["a", "b", "c"])[np.arange(N) % 3]
    assert associate(code, label) == associate(code, list(label)) == associate(code, label.astype(object))


def test_many_classes_take_no_memory(code):
    """As tokens are; the correlation is then never below 0, in small regions too."""
    found = associate(code, torch.arange(N) // 2, n_permutations=3, min_rows=3)
    assert all(0 <= latent.correlation <= 1 for latent in found.latents)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([1, 2], ValueError, "labels must be one for each of the 600 rows of the code, got 2"),
        ("genre", TypeError, "labels must be a list"),
        (torch.full((N,), torch.nan), ValueError, "labels must be finite, got 600"),
        (3, TypeError, "labels must be a list"),
    ],
)
def test_what_is_no_label(code, labels, error, message):
    with pytest.raises(error, match=message):
        associate(code, labels)


def test_what_is_no_code():
    with pytest.raises(TypeError, match="code must be a Code"):
        associate(torch.zeros(3), [1, 2, 3])
