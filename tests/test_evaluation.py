"""Metrics against torch-fidelity, scikit-learn and formulas; copies that were planted are found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from retrodiff.cli import main
from retrodiff.encoders import TimmEncoder, save_encoder
from retrodiff.evaluation import (
    Report,
    authenticity,
    copying,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mind,
    precision_recall,
    vendi,
)
from retrodiff.evaluation.sets import ImageSet
from retrodiff.model.generated import to_picture


@pytest.fixture(scope="module")
def features():
    """Two clouds that overlap in part, (400, 16) and (300, 16)."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator)
    a = torch.randn(400, 16, generator=generator) @ mix
    b = torch.randn(300, 16, generator=generator) @ mix * 1.1 + 0.7
    return a, b


def test_frechet_distance_is_that_of_torch_fidelity_and_of_scipy(features):
    from scipy.linalg import sqrtm

    fidelity = pytest.importorskip("torch_fidelity.metric_fid", reason="no torch-fidelity")
    a, b = (part.double() for part in features)
    value = frechet_distance(a, b).value
    stats = [fidelity.fid_features_to_statistics(part) for part in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*stats, verbose=False)
    assert value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    covariances = [np.cov(part.numpy(), rowvar=False) for part in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    mean = (a.mean(0) - b.mean(0)).square().sum().item()
    formula = mean + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert value == pytest.approx(formula, rel=1e-8)
    assert frechet_distance(a, a).value == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_that_of_torch_fidelity(features):
    fidelity = pytest.importorskip("torch_fidelity.metric_kid", reason="no torch-fidelity")
    a, b = (part[:300].double() for part in features)
    theirs = fidelity.kid_features_to_metric(
        a, b, kid_subsets=1, kid_subset_size=300, kid_kernel="poly", verbose=False
    )
    mine = kernel_distance(a, b, size=300)
    assert mine.spread is None
    assert mine.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-8)
    some = kernel_distance(a, b, size=100, subsets=200)
    assert abs(some.value - mine.value) < 4 * some.spread / 200**0.5 + 1e-12


def test_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(1)
    values = [
        kernel_distance(*torch.randn(2, 40, 4, generator=generator), size=40).value
        for _ in range(200)
    ]
    values = torch.tensor(values)
    assert abs(values.mean()) < 4 * values.std() / 200**0.5


def test_precision_and_recall_are_those_of_torch_fidelity_and_of_scikit_learn(features):
    fidelity = pytest.importorskip("torch_fidelity.metric_prc", reason="no torch-fidelity")
    from sklearn.neighbors import NearestNeighbors

    a, b = (part.double() for part in features)
    precision, recall = precision_recall(a, b)
    theirs = fidelity.prc_features_to_metric(a, b, prc_neighborhood=3, verbose=False)
    assert precision.value == pytest.approx(theirs["precision"])
    assert recall.value == pytest.approx(theirs["recall"])

    def covered(points, centers):
        found = NearestNeighbors(n_neighbors=4).fit(centers.numpy()).kneighbors(centers.numpy())
        return (torch.cdist(points, centers) <= torch.from_numpy(found[0][:, 3])).any(1)

    assert precision.value == pytest.approx(covered(a, b).double().mean().item())
    assert recall.value == pytest.approx(covered(b, a).double().mean().item())


def test_density_and_coverage_by_their_formula(features):
    a, b = (part.double() for part in features)
    density, coverage = density_coverage(a, b, k=5)
    radius = torch.cdist(b, b).kthvalue(6, dim=1).values
    within = torch.cdist(a, b) <= radius
    assert density.value == pytest.approx(within.sum().item() / (5 * len(a)))
    assert coverage.value == pytest.approx(within.any(0).double().mean().item())


def test_mind_of_shifted_clouds_by_its_formula():
    """A pure shift s moves every projection by s.w: the mean over directions is 3 |s|^2."""
    a = torch.randn(2000, 8, generator=torch.Generator().manual_seed(2))
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
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(3)).double()
    units = x / x.norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(units @ units.T / 50).clamp_min(1e-30)
    assert vendi(x).value == pytest.approx(torch.exp(-(values * values.log()).sum()).item())


def test_inception_score_of_known_distributions():
    assert inception_score(torch.eye(5).repeat(3, 1)).value == pytest.approx(5)
    assert inception_score(torch.full((8, 4), 0.25)).value == pytest.approx(1)
    with pytest.raises(ValueError, match="summing to 1"):
        inception_score(torch.rand(4, 3) + 1)


@pytest.fixture(scope="module")
def worlds():
    """Training, held-out and fresh images of one distribution: 20 clusters in 32 dimensions."""
    generator = torch.Generator().manual_seed(4)
    centers = 3 * torch.randn(20, 32, generator=generator)

    def draw(n):
        rows = torch.randint(20, (n,), generator=generator)
        return centers[rows] + torch.randn(n, 32, generator=generator)

    return draw(600), draw(600), draw(600)


def test_planted_copies_are_found_and_held_out_images_are_not(worlds):
    training, held_out, fresh = worlds
    generator = torch.Generator().manual_seed(5)
    copies = training[:200] + 0.05 * torch.randn(200, 32, generator=generator)
    mixed = torch.cat([copies, fresh[:400]])
    report = copying(mixed, held_out, {"training": training})["training"]
    found = set(report.copies.tolist())
    assert len(found & set(range(200))) >= 0.95 * 200
    assert len(found - set(range(200))) <= 0.03 * 400
    assert report.null_rate <= 0.01
    assert report.excess == pytest.approx(1 / 3, abs=0.03)
    assert all(image == row for image, row, _ in report.worst(20))
    honest = copying(fresh, held_out, {"training": training})["training"]
    assert abs(honest.excess) <= 0.02
    assert authenticity(copies, training).value < 0.05
    assert authenticity(fresh, training).value > 0.4


def test_collapsed_copying_and_perfect_generators_are_told_apart(worlds):
    _, held_out, fresh = worlds
    collapsed = fresh[:1] + 0.1 * torch.randn(600, 32, generator=torch.Generator().manual_seed(6))
    assert precision_recall(collapsed, held_out)[1].value < 0.2
    assert precision_recall(fresh, held_out)[1].value > 0.7
    assert vendi(collapsed).value < 0.3 * vendi(fresh).value
    assert kernel_distance(collapsed, held_out).value > 20 * abs(
        kernel_distance(fresh, held_out).value
    )


def test_refusals():
    few = torch.randn(10, 16)
    with pytest.raises(ValueError, match="needs more than 16 images on both sides, got 10"):
        frechet_distance(few, few)
    with pytest.raises(ValueError, match=r"width 16, reference ones 8"):
        kernel_distance(few, torch.randn(10, 8))
    with pytest.raises(ValueError, match="not all finite"):
        vendi(torch.full((4, 3), float("nan")))
    with pytest.raises(ValueError, match="at least 100"):
        copying(few, few, {"training": few})
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(few[:2], few)
    assert "biased upward" in frechet_distance(torch.randn(40, 8), torch.randn(40, 8)).note


# --- on the command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pictures of colored discs: training, held out, and generated ones with planted copies."""
    root = tmp_path_factory.mktemp("evaluation")
    generator = torch.Generator().manual_seed(7)

    def disc():
        center, radius = torch.rand(2, generator=generator) * 40 + 12, 6 + 16 * torch.rand(1)
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        inside = (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2
        colors = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
        return torch.where(inside, colors[0], colors[1])

    for name, n in (("training", 110), ("held-out", 110), ("generated", 90)):
        (root / name).mkdir()
        for i in range(n):
            to_picture(disc()).save(root / name / f"{i:03d}.png")
    for i in range(30):
        shutil.copy(root / "training" / f"{i:03d}.png", root / "generated" / f"copy-{i:03d}.png")
    torch.manual_seed(0)
    save_encoder(TimmEncoder("test_resnet", image_size=32), root / "enc")
    return root


def test_a_folder_of_any_generator(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    command = "evaluate --images generated --reference held-out --training training --features enc"
    out = tmp_path / "report"
    assert main([*command.split(), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    for word in ("KID", "MIND", "precision", "coverage", "Vendi", "AuthPct", "No Fréchet"):
        assert word in told
    report = json.loads((out / "report.json").read_text())
    found = report["copying"]["training"]
    assert found["excess"] == pytest.approx(30 / 120, abs=0.05)
    assert {pair["file"] for pair in found["worst"]} <= {f"copy-{i:03d}.png" for i in range(30)}
    page = (out / "report.html").read_text()
    assert page.count("data:image/") > 60
    assert "http" not in page.replace("data:image", "")
    assert main([*command.split(), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_names_of_files_cannot_write_html(folders, tmp_path):
    images = ImageSet("<script>x</script>", torch.randn(3, 4), ("<b>", "b", "c"), (b"x",) * 3)
    page = Report(images, images, "<i>", [vendi(images.features)]).html()
    assert "<script>" not in page
    assert "<i>" not in page


def test_too_few_images_on_the_command_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    (tmp_path / "few").mkdir()
    shutil.copy("training/000.png", tmp_path / "few")
    command = f"evaluate --images {tmp_path}/few --reference held-out --features enc --out r"
    assert main(command.split()) == 2
    assert "1 generated and 110 reference images" in capsys.readouterr().err
