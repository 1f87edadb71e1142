"""Planted copies are found and held-out images are not; three bad generators are told apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from retrodiff.databases import Images
from retrodiff.encoders import TimmEncoder
from retrodiff.evaluation import (
    Report,
    authenticity,
    copying,
    density_coverage,
    kernel_distance,
    neighbor_echo,
    precision_recall,
    vendi,
)
from retrodiff.evaluation.copying import nearest, threshold_of
from retrodiff.evaluation.planted import KINDS, plant
from retrodiff.evaluation.report import copies_found
from retrodiff.evaluation.sets import ImageSet, fit, planted_copies, read_source
from retrodiff.evaluation.views import Views


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
    planted = {"training": {"noise": training[300:400] + 0.05}}
    report = copying(mixed, held_out, {"training": training}, planted=planted)["training"]
    found = set(report.copies.tolist())
    assert len(found & set(range(200))) >= 0.95 * 200
    assert len(found - set(range(200))) <= 0.03 * 400
    assert report.null_rate <= 0.01
    assert report.excess == pytest.approx(1 / 3, abs=0.03)
    assert report.sensitivity >= 0.95
    assert copies_found(report)
    assert all(image == row for image, row, _ in report.worst(20))
    excess, error = report.excess_similarity
    assert excess > 10 * error
    honest = copying(fresh, held_out, {"training": training})["training"]
    assert abs(honest.excess) <= 0.02
    assert not copies_found(honest)
    excess, error = honest.excess_similarity
    assert abs(excess) < 4 * error
    assert authenticity(copies, training).value < 0.05
    assert authenticity(fresh, training).value > 0.4


def test_copies_of_a_picture_that_is_there_many_times_are_found(worlds):
    """A margin over the source's own next images would be zero for them."""
    training, held_out, fresh = worlds
    repeated = torch.cat([training, training[:1].expand(50, -1)])
    copies = training[:1].expand(30, -1) + 0.01
    report = copying(torch.cat([copies, fresh[:300]]), held_out, {"training": repeated})
    assert set(range(30)) <= set(report["training"].copies.tolist())


def test_mirrored_copies_are_found_where_mirrored_features_are_given(worlds):
    training, held_out, fresh = worlds
    mirror = torch.randn(32, 32, generator=torch.Generator().manual_seed(6))
    copies = torch.linalg.solve(mirror, training[:50].T).T  # whose mirror images are the originals
    report = copying(copies, held_out, {"training": training})["training"]
    assert report.rate < 0.5
    mirrored = copies @ mirror.T, fresh[: len(held_out)]
    found = copying(copies, held_out, {"training": training}, mirrored=mirrored)["training"]
    assert found.rate > 0.95


def test_the_threshold_keeps_its_promise_on_new_images():
    generator = torch.Generator().manual_seed(7)
    rates = []
    for _ in range(300):
        null, fresh = torch.randn(2, 200, generator=generator)
        rates.append((fresh > threshold_of(null, 0.05)).double().mean())
    mean = torch.stack(rates).mean()
    assert 0.04 < mean < 0.052
    assert threshold_of(torch.arange(100.0), 0.01) == 99


def test_a_looser_threshold_where_real_images_are_near_duplicates(worlds):
    training, held_out, fresh = worlds
    twins = torch.cat([held_out[:550], training[:50] + 1e-4])
    copies = training[100:400] + 0.3 * torch.randn(300, 32, generator=torch.Generator())
    planted = {"training": {"noise": copies[:100]}}
    honest, copied = (
        copying(images, twins, {"training": training}, planted=planted)["training"]
        for images in (fresh, copies[100:])
    )
    assert copied.sensitivity < 0.2
    rate, null = copied.looser()
    assert rate > 0.9
    assert null < 0.2
    assert copies_found(copied)
    assert not copies_found(honest)


def test_neighbor_echo(worlds):
    database, held_out, fresh = worlds
    rows = [[i, i + 1, 599 - i] for i in range(100)]
    echoes = torch.stack([database[mine[i % 3]] for i, mine in enumerate(rows)]) + 0.02
    _, near = nearest(held_out, database)
    own = [[int(i)] for i in near]
    found = neighbor_echo(echoes, rows, held_out, own, database)
    assert found.rate > 0.95
    assert found.null_rate <= 0.01
    assert all(row == rows[image][image % 3] for image, row, _ in found.worst(10))
    none = neighbor_echo(fresh[:100], rows, held_out, own, database)
    assert none.rate <= 0.02
    some = neighbor_echo(echoes[:10], [[], *rows[1:10]], held_out, own, database)
    assert 0 not in some.copies.tolist()
    assert len(some.margin) == 9
    with pytest.raises(ValueError, match="nothing can be echoed"):
        neighbor_echo(echoes[:5], [[]] * 5, held_out, own, database)


def test_collapsed_copying_and_perfect_generators_are_told_apart(worlds):
    training, held_out, fresh = worlds
    noise = torch.randn(600, 32, generator=torch.Generator().manual_seed(6))
    collapsed = fresh[:1] + 0.1 * noise
    assert precision_recall(collapsed, held_out)[1].value < 0.2
    assert precision_recall(fresh, held_out)[1].value > 0.7
    assert vendi(collapsed).value < 0.3 * vendi(fresh).value
    assert kernel_distance(collapsed, held_out).value > 20 * abs(
        kernel_distance(fresh, held_out).value
    )
    half = held_out.split(300)
    real = [
        score.value for metric in (precision_recall, density_coverage) for score in metric(*half)
    ]
    told = {}
    for name, images in (
        ("perfect", fresh),
        ("collapsed", collapsed),
        ("copying", training + 0.05 * noise),
    ):
        scores = [*precision_recall(images, held_out), *density_coverage(images, held_out)]
        scores = [dataclasses.replace(s, real=r) for s, r in zip(scores, real, strict=True)]
        found = copying(images, held_out, {"training": training})
        pictures = ImageSet(name, images, tuple(map(str, range(600))), (b"",) * 600)
        report = Report(pictures, pictures, "none", scores, found)
        told[name] = [verdict for _, _, verdict in report.verdicts()]
    assert told == {
        "perfect": ["good", "good", "good"],
        "collapsed": ["good", "bad", "good"],
        "copying": ["good", "good", "bad"],
    }


def test_refusals():
    few = torch.randn(10, 16)
    with pytest.raises(ValueError, match=r"10 held-out images .*at least 100"):
        copying(few, few, {"training": few})
    with pytest.raises(ValueError, match="width 16 and 8 cannot be compared"):
        nearest(few, torch.randn(10, 8))


# --- pictures -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", image_size=32, preprocessing="plain")


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_changed_and_still_the_picture(kind):
    generator = torch.Generator().manual_seed(8)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), 48)[0] - 1
    copy = plant(image, kind, generator)
    assert copy.shape == image.shape
    assert not torch.equal(copy, image)
    other = torch.rand(3, 48, 48, generator=generator) * 2 - 1
    same = image.flip(-1) if kind == "mirror" else image
    assert (copy - same).abs().mean() < 0.5 * (other - same).abs().mean()


def test_views_are_features_details_and_those_of_the_mirror_image(encoder):
    images = torch.rand(5, 3, 40, 40, generator=torch.Generator().manual_seed(9)) * 2 - 1
    views = Views(encoder, mirrored=True)
    whole, detail, mirrored, logits = views.encode_image(images).split(views.widths, 1)
    assert torch.allclose(whole, encoder.encode_image(images), atol=1e-5)
    flipped = views.encode_image(images.flip(-1)).split(views.widths, 1)
    assert torch.allclose(flipped[1], mirrored, atol=1e-5)
    assert torch.allclose(flipped[2], detail, atol=1e-5)
    assert detail.shape[1] == 9 * encoder.network.feature_info[3]["num_chs"]
    assert logits.shape == (5, 0)


def test_encoders_without_maps_are_taken_as_they_are(encoder):
    from parts import HashingEncoder

    plain = HashingEncoder()
    views = Views(plain, mirrored=True)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    whole, detail, mirrored, _ = views.encode_image(images).split(views.widths, 1)
    assert torch.equal(whole, detail)
    assert torch.equal(mirrored, plain.encode_image(images.flip(-1)))
    assert "whole image" in views.detail


def test_a_source_is_read_with_records_sizes_and_pictures_to_look_at(encoder):
    images = [torch.rand(3, h, 20) * 2 - 1 for h in (20, 30, 20)]
    source = Images(images, [{"file": f"{i}.png", "license": "CC0"} for i in range(3)])
    found = read_source("three", source, Views(encoder), size=(16, 16), progress=False)
    assert found.files == ("0.png", "1.png", "2.png")
    assert found.sizes == {(20, 20), (30, 20)}
    assert found.licenses == ("CC0",) * 3
    assert found.image(1).shape == (3, 16, 16)
    assert found.mirrored is None
    planted = planted_copies(found, Views(encoder, mirrored=True), n=2)
    assert planted.keys() == KINDS.keys()
    assert planted["crop"].shape == (2, 2, found.details.shape[1])


def test_fit_cuts_around_the_middle():
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 200
    assert (fit(image, (10, 10)) == 200).all()
    assert fit(image, (30, 30)).shape == (3, 30, 30)
    assert fit(image, (10, 40)).shape == (3, 10, 40)
