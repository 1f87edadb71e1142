"""Training data: pictures embedded as a build embeds them, copies named, pairs, bad images."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import run, same, small_data, weights

from retrodiff.databases import ArrayDatabase, ImageFolder, build_database, open_database
from retrodiff.encoders import TimmEncoder
from retrodiff.interfaces import Query
from retrodiff.pictures.converting import PixelRange
from retrodiff.retrieval import (
    ExcludeDuplicates,
    ExcludeGroup,
    ExcludeSelf,
    NearestNeighbors,
    RandomOfTop,
    neighbor_table,
)
from retrodiff.training import FolderImages, Pairing, TrainingSet, own_rows
from retrodiff.training.images import LOOKED_AT, as_images, digest, pixels


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of many sizes: a square of 32 pixels shows much less than the whole."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for i in range(24):
        small = draw.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        side = 40 + 3 * i
        Image.fromarray(small).resize((side * 3 // 2, side), Image.Resampling.BICUBIC).save(
            folder / f"{i:02}.png"
        )
    return folder


@pytest.fixture(scope="module")
def eyes():
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", pretrained=False, image_size=64)


@pytest.fixture(scope="module")
def library(photos, eyes, tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "d.rdb"
    build_database(path, ImageFolder(photos), eyes, progress=False)
    return open_database(path)


def of(images, encoder, database, retriever=None, k=3, **options):
    retriever = retriever or NearestNeighbors()
    return TrainingSet.of(images, encoder, database, retriever, k, progress=False, **options)


def test_training_pictures_are_embedded_as_a_build_embeds_them(photos, eyes, library):
    images = FolderImages(photos, 32, progress=False)
    with pytest.warns(UserWarning, match="24 of 24 training images are rows of the database"):
        data = of(images, eyes, library)
    assert data.table[:, 0].tolist() == list(range(24))  # each picture finds itself first
    stored = library.embeddings(torch.arange(24))
    torch.testing.assert_close(data.embeddings, stored.float(), rtol=2e-3, atol=2e-3)
    square = eyes.encode_image(images[torch.arange(24)])
    rounding = float((stored - data.embeddings).norm())
    assert float((square - data.embeddings).norm()) > 10 * rounding
    assert images[torch.tensor([0])].shape == (1, 3, 32, 32)


def test_pictures_that_are_rows_themselves_are_left_out(photos, eyes, library):
    images = FolderImages(photos, 32, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = of(images, eyes, library, ExcludeSelf(NearestNeighbors()))
    assert not bool((data.table == torch.arange(24)[:, None]).any())


def test_ids_are_found_for_every_retriever_that_needs_them(photos, eyes, library):
    images = FolderImages(photos, 32, progress=False)
    for retriever in (
        ExcludeGroup(NearestNeighbors(), "file"),
        RandomOfTop(ExcludeSelf(NearestNeighbors()), 8),
    ):
        data = of(images, eyes, library, retriever)
        assert not bool((data.table == torch.arange(24)[:, None]).any())


def test_only_rows_of_the_same_picture_are_an_images_own(eyes, library):
    rows = library.embeddings(torch.arange(24)).float()
    assert own_rows(rows, library).tolist() == list(range(24))
    near = torch.nn.functional.normalize(rows, dim=1) + 0.01 * torch.randn(
        rows.shape, generator=torch.Generator().manual_seed(0)
    )
    assert own_rows(near, library).tolist() == [-1] * 24


def test_excluding_what_is_not_there_is_said(encoder, database):
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.warns(UserWarning, match="none of them was found in the database"):
        of(images, encoder, database, ExcludeSelf(NearestNeighbors()))


def test_copies_in_the_database_are_named_even_where_own_rows_are_excluded(encoder):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    embeddings = encoder.encode_image(images)
    twice = ArrayDatabase(embeddings.repeat(2, 1), encoder.fingerprint)
    with pytest.warns(UserWarning, match="6 of 6 training images .* ExcludeDuplicates"):
        of(images, encoder, twice, ExcludeSelf(NearestNeighbors()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(images, encoder, twice, ExcludeDuplicates(NearestNeighbors(), 0.9999))


def test_some_copies_are_counted(encoder, database):
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mixed = torch.cat([database.embeddings(torch.arange(40)), encoder.encode_image(images[:3])])
    with pytest.warns(UserWarning, match="3 of 8 training images are rows of the database") as w:
        of(images, encoder, ArrayDatabase(mixed, encoder.fingerprint))
    assert len(w) == 1
    assert "ExcludeSelf (--exclude-self)" in str(w[0].message)


def test_broken_and_narrow_pictures_are_skipped_by_name(photos, eyes, library, tmp_path):
    for name in ("03.png", "11.png"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    (tmp_path / "05 broken.png").write_bytes(b"no picture")
    Image.new("RGB", (1000, 2)).save(tmp_path / "07 spacer.png")
    with pytest.warns(UserWarning, match="2 skipped") as warned:
        images = FolderImages(tmp_path, 32, progress=False)
    assert all(name in str(warned[0].message) for name in ("05 broken", "07 spacer"))
    with pytest.warns(UserWarning, match="2 of 2"):
        assert of(images, eyes, library).table[:, 0].tolist() == [3, 11]


def test_the_digest_of_a_folder_sees_every_file(photos, tmp_path):
    for file in photos.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = FolderImages(tmp_path, 32, progress=False).digest()
    assert FolderImages(tmp_path, 32, progress=False).digest() == before
    assert FolderImages(tmp_path, 16, progress=False).digest() != before
    (tmp_path / "13.png").write_bytes((photos / "14.png").read_bytes())
    assert FolderImages(tmp_path, 32, progress=False).digest() != before


@pytest.mark.parametrize("size", [0, -3, 2.5, "32", None])
def test_sizes_are_checked(photos, size):
    with pytest.raises(ValueError, match="size="):
        FolderImages(photos, size, progress=False)


# --- images of other kinds -----------------------------------------------------------------------

GRAY = (np.arange(5 * 64, dtype=np.int64).reshape(5, 1, 8, 8) * 7) % 256


@pytest.mark.parametrize(
    "images",
    [
        torch.from_numpy(GRAY.astype(np.uint8)),
        torch.from_numpy(GRAY),
        torch.from_numpy(GRAY / 127.5 - 1),
        (GRAY / 127.5 - 1).astype(np.float32),
        [torch.from_numpy(one.astype(np.uint8)) for one in GRAY],
        [Image.fromarray(one[0].astype(np.uint8)) for one in GRAY],
    ],
    ids=["uint8", "int64", "float64", "numpy", "list", "PIL"],
)
def test_the_same_pictures_give_the_same_data(images, encoder, database):
    data = of(images, encoder, database)
    batch, query, _ = data.batch(torch.arange(5))
    expected = torch.from_numpy(GRAY / 127.5 - 1).float()
    torch.testing.assert_close(batch.mean(1, keepdim=True), expected, rtol=0, atol=1e-5)
    assert batch.dtype == query.embedding.dtype == torch.float32


class Lazy:
    """Images of the user's own class."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        return self.images[rows]


def broken(value):
    images = torch.zeros(9, 1, 8, 8)
    images[6, 0, 2, 2] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (broken(torch.nan), "training image 6 is not finite"),
        (broken(torch.inf), "training image 6 is not finite"),
        (broken(255.0), "expected -1 to 1"),
        (Lazy(broken(torch.nan)), "training image 6 is not finite"),
        (Lazy(broken(255.0)), "training image 6 has values up to 255"),
        (Lazy(torch.zeros(9, 1, 8, 8).long()), "training images are torch.int64"),
        (Lazy(torch.zeros(9, 8, 8)), r"9 training images have shape \(9, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), "there are no training images"),
        (Lazy(torch.zeros(0, 1, 8, 8)), "there are no training images"),
        ([], "is empty"),
        (torch.zeros(3, 8), r"shape \(3, 8\)"),
        (7, "int holds no training images"),
    ],
)
def test_bad_images_are_one_line(images, message, encoder, database):
    with pytest.raises(ValueError, match=message) as refused:
        of(images, encoder, database)
    assert "\n" not in str(refused.value)


def test_floats_of_zero_to_one_are_warned_about(encoder, database):
    with pytest.warns(PixelRange, match="images \\* 2 - 1"):
        of(torch.rand(4, 1, 8, 8), encoder, database)


def test_latents_may_have_any_values():
    latents = torch.randn(3, 4, 8, 8) * 5
    assert torch.equal(pixels(as_images(latents), torch.arange(3)), latents)


def test_an_embedding_that_is_not_finite_names_the_image(encoder, database):
    class Broken(type(encoder)):
        def encode_image(self, images):
            found = super().encode_image(images)
            return torch.where(images.flatten(1)[:, :1] == -1, torch.nan, found)

    images = torch.zeros(9, 1, 8, 8)
    images[4] = -1
    with pytest.raises(ValueError, match="training image 4 has an embedding that is not finite"):
        of(images, Broken(), database, batch_size=3)


def test_an_encoder_that_the_database_was_not_built_with_is_refused(database):
    from parts import HashingEncoder

    with pytest.raises(ValueError, match="encoder and database disagree"):
        of(torch.zeros(3, 1, 8, 8), HashingEncoder(seed=4), database)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": torch.zeros(5, 7)}, "7 wide, but the database's dim=8"),
        ({"embeddings": torch.zeros(5, 2, 8)}, r"embeddings have shape \(5, 2, 8\)"),
        ({"table": torch.zeros(5)}, r"neighbors \(5,\)"),
        ({"table": torch.zeros(5, 2)}, "neighbors are torch.float32"),
        ({"pairing": Pairing([0], [5])}, "names image 5, but there are 5 training images"),
    ],
)
def test_parts_that_do_not_fit(change, message, database):
    parts = {
        "images": torch.zeros(5, 1, 8, 8),
        "embeddings": torch.zeros(5, 8),
        "table": torch.zeros(5, 2).long(),
        "database": database,
    }
    with pytest.raises(ValueError, match=message):
        TrainingSet(**{**parts, **change})


def test_a_digest_of_the_users_own_images_looks_at_some():
    images = torch.zeros(3 * LOOKED_AT, 1, 2, 2)
    other = images.clone()
    other[-1] = 1
    assert digest(Lazy(images)) == digest(Lazy(images.clone()))
    assert digest(Lazy(images)) != digest(Lazy(other))
    assert digest(images) != digest(other)


# --- pairs ---------------------------------------------------------------------------------------


def test_a_pair_has_the_condition_of_one_image_and_the_pixels_of_another(database, encoder):
    data = small_data(database, encoder, n=6)
    paired = data.paired(Pairing(condition=[0, 0, 5], target=[1, 2, 4]))
    assert len(paired) == 3
    batch, query, neighbors = paired.batch(torch.tensor([2, 0]))
    assert torch.equal(batch, data.images[[4, 1]])
    assert torch.equal(query.embedding, data.embeddings[[5, 0]])
    assert torch.equal(neighbors.indices, data.table[[5, 0]].long())
    rows = torch.cat([paired.rows_at(step, 3, seed=0) for step in range(2)])
    assert sorted(rows.tolist()) == [0, 0, 1, 1, 2, 2]


def test_instance_conditioning_pairs_each_image_with_its_neighborhood(encoder, recipe):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 8, 8, generator=generator) * 2 - 1
    embeddings = encoder.encode_image(images)
    instances = ArrayDatabase(embeddings, encoder.fingerprint)
    query = Query(embeddings, ids=torch.arange(20))
    table = neighbor_table(query, instances, 4, ExcludeSelf(NearestNeighbors()))
    data = TrainingSet(images, embeddings, table, instances).paired(Pairing.from_table(table))
    assert len(data) == 80
    assert data.pairing.condition[:5].tolist() == [0, 0, 0, 0, 1]
    assert data.pairing.target[:4].tolist() == table[0].tolist()
    first, again = (run(recipe.database(instances), data, steps=3) for _ in range(2))
    assert same(weights(first.model), weights(again.model))


def test_a_training_is_not_continued_with_other_pairs(recipe, database, encoder, tmp_path):
    data = small_data(database, encoder)
    pairs = Pairing([0, 1, 2], [3, 4, 5])
    run(recipe, data.paired(pairs), steps=2, checkpoint=tmp_path / "state")
    for other in (data, data.paired(Pairing([0, 1, 2], [3, 4, 6]))):
        with pytest.raises(ValueError, match="other pairs of images"):
            run(recipe, other, checkpoint=tmp_path / "state", resume=True)


@pytest.mark.parametrize(
    ("condition", "target", "message"),
    [
        ([0, 1], [0], "2 conditions and 1 targets"),
        ([], [], "has no pairs|whole numbers"),
        ([0.5], [1], "whole numbers"),
        ([[0]], [[1]], r"shape \(1, 1\)"),
        ([True], [1], "whole numbers"),
    ],
)
def test_bad_pairs(condition, target, message):
    with pytest.raises(ValueError, match=message):
        Pairing(condition, target)


def test_negative_rows_are_no_images(database, encoder):
    with pytest.raises(ValueError, match="target of the pairing names image -1"):
        small_data(database, encoder).paired(Pairing([0], [-1]))
