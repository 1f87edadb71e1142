"""Every metric against a formula in float64 or scikit-learn, and what it refuses."""

from __future__ import annotations

import builtins

import evaluation_formulas as formulas
import numpy as np
import pytest
import torch

from retrodiff.evaluation import (
    authenticity,
    class_accuracy,
    clip_score,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
    vendi,
)


@pytest.fixture(scope="module", autouse=True)
def _fidelity():
    pytest.importorskip("torch_fidelity", reason="no torch-fidelity")


@pytest.fixture(scope="module")
def features():
    """Two clouds that overlap in part, (400, 16) and (300, 16)."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator)
    a = torch.randn(400, 16, generator=generator) @ mix
    b = torch.randn(300, 16, generator=generator) @ mix * 1.1 + 0.7
    return a, b


def test_frechet_distance_is_the_formula_and_that_of_scipy(features):
    from scipy.linalg import sqrtm

    a, b = (part.double() for part in features)
    value = frechet_distance(a, b).value
    assert value == pytest.approx(formulas.frechet(a, b), rel=1e-8)
    covariances = [np.cov(part.numpy(), rowvar=False) for part in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    mean = (a.mean(0) - b.mean(0)).square().sum().item()
    formula = mean + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert value == pytest.approx(formula, rel=1e-8)
    assert frechet_distance(a, a).value == pytest.approx(0, abs=1e-9)
    assert "biased upward" in frechet_distance(a, b).note


def test_kernel_distance_is_the_formula(features):
    a, b = (part[:300] for part in features)
    whole = kernel_distance(a, b, size=300)
    assert whole.spread is None
    assert whole.value == pytest.approx(formulas.kernel(a, b), rel=1e-8)
    some = kernel_distance(a, b, size=100, subsets=200)
    assert abs(some.value - whole.value) < 4 * some.spread / 200**0.5 + 1e-12
    assert some.value == kernel_distance(a, b, size=100, subsets=200).value
    assert some.value != kernel_distance(a, b, size=100, subsets=200, seed=1).value


def test_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor(
        [
            kernel_distance(*torch.randn(2, 40, 4, generator=generator), size=40).value
            for _ in range(200)
        ]
    )
    assert abs(values.mean()) < 4 * values.std() / 200**0.5


def test_precision_and_recall_are_those_of_scikit_learn(features):
    a, b = (part.double() for part in features)
    precision, recall = precision_recall(a, b)
    assert precision.value == pytest.approx(formulas.covered(a, b), rel=1e-4)
    assert recall.value == pytest.approx(formulas.covered(b, a), rel=1e-4)
    assert precision.value != recall.value


def test_density_coverage_and_authenticity_by_their_formulas(features):
    density, coverage = density_coverage(*features)
    assert (density.value, coverage.value) == pytest.approx(formulas.balls(*features), rel=1e-9)
    assert authenticity(*features).value == pytest.approx(formulas.authentic(*features), rel=1e-9)


def test_mind_by_its_formula():
    """A pure shift s moves every projection by s.w: the mean over directions is 3 |s|^2."""
    a, b = torch.randn(2, 2000, 8, generator=torch.Generator().manual_seed(2))
    value = mind(a, b, directions=50, seed=3).value
    assert value == pytest.approx(formulas.sliced(a, b, 50, 3), rel=1e-9)
    shift = torch.full((8,), 0.5)
    score = mind(a + shift, a, directions=4000)
    assert score.value == pytest.approx(3 * shift.square().sum().item(), rel=0.05)
    assert mind(a, a).value == 0
    assert mind(a[:1500], a[:1000] * 2).value > 10 * mind(a[:1500], a[500:]).value


def test_vendi_counts_different_images():
    eye = torch.eye(6)
    assert vendi(eye).value == pytest.approx(6)
    assert vendi(eye.repeat(5, 1)).value == pytest.approx(6)
    assert vendi(torch.ones(10, 3)).value == pytest.approx(1)
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    assert vendi(x).value == pytest.approx(formulas.entropy_of_kernel(x), rel=1e-9)


def test_inception_score_by_its_formula_and_of_known_distributions():
    logits = torch.randn(60, 7, generator=torch.Generator().manual_seed(4))
    assert inception_score(logits).value == pytest.approx(formulas.inception(logits), rel=1e-9)
    assert inception_score(torch.eye(5).repeat(3, 1) * 200).value == pytest.approx(5)
    assert inception_score(torch.zeros(8, 4)).value == pytest.approx(1)
    assert inception_score(logits, splits=3).spread > 0
    with pytest.raises(ValueError, match="at least 70 are needed"):
        inception_score(logits, splits=70)


def test_clip_score_and_its_chance_value():
    images = torch.tensor([[1.0, 0], [0, 2], [0, 3]])
    prompts = torch.tensor([[3.0, 0], [0, 1], [0, 1]])
    score = clip_score(images, prompts)
    assert score.value == pytest.approx(100)
    assert score.note.startswith("0 with the prompts")
    assert clip_score(images, -prompts).value == 0
    one = clip_score(images, prompts[:1].expand(3, -1))
    assert one.note == ""
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        clip_score(images, prompts[:2])


def test_class_accuracy_by_the_nearest_mean():
    generator = torch.Generator().manual_seed(5)
    centers = 10 * torch.randn(4, 12, generator=generator)
    rows = torch.arange(4).repeat(20)
    real = centers[rows] + torch.randn(80, 12, generator=generator)
    names = [f"class {i}" for i in rows]
    asked = [names[i] for i in range(40)]
    made = centers[rows[:40]].clone()
    made[:10] = centers[(rows[:10] + 1) % 4]
    score = class_accuracy(made, asked, real, names)
    assert score.value == pytest.approx(0.75)
    assert score.note == "100.0% of the reference images; chance 25.0%"
    noise = torch.randn(80, 12, generator=generator)
    # Left out of its own mean, a random image is right by chance: with it, far more often.
    assert float(class_accuracy(noise, names, noise, names).note.split("%")[0]) < 45
    with pytest.raises(ValueError, match="class 9 has fewer than two"):
        class_accuracy(made, ["class 9"] * 40, real, names)
    with pytest.raises(ValueError, match="one class only"):
        class_accuracy(made, ["a"] * 40, real, ["a"] * 80)


def test_refusals(features):
    few = torch.randn(10, 16)
    with pytest.raises(ValueError, match="needs more than 16 images on both sides, got 10"):
        frechet_distance(few, few)
    with pytest.raises(ValueError, match=r"width 16, reference ones 8"):
        kernel_distance(few, torch.randn(10, 8))
    with pytest.raises(ValueError, match="not all finite"):
        vendi(torch.full((4, 3), float("nan")))
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(few[:2], few)
    with pytest.raises(ValueError, match=r"must be \(n, d\)"):
        mind(few[0], few)


def test_without_torch_fidelity(features, monkeypatch):
    given = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torch_fidelity"):
            raise ImportError(name)
        return given(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("importlib.import_module", lambda name: missing(name))
    with pytest.raises(ImportError, match=r"pip install \"retrodiff\[eval\]\""):
        kernel_distance(*features)
