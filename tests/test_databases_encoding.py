"""What reaches the encoder: prepared where it is read, the same numbers, in little memory."""

import numpy as np
import pytest
import torch
from memory_peak import at_most
from PIL import Image
from test_databases import Pooled, pictures

from retrodiff.databases import (
    ImageFolder,
    Images,
    Patchify,
    build_database,
    encode_images,
    encode_pictures,
)
from retrodiff.databases.build.encoding import Reader
from retrodiff.databases.sources.folders import Item, Source
from retrodiff.databases.sources.skipped import SkippedPictures
from retrodiff.encoders.preprocessing import openai, plain, rdm
from retrodiff.pictures.decoding import UnreadableImage, read_image


class Prepared(Pooled):
    """An encoder in two steps, as the shipped ones are."""

    def __init__(self, preprocessing):
        super().__init__()
        self.preprocessing = preprocessing

    @property
    def preparation(self):
        return self.preprocessing.apply

    def encode_image(self, images):
        return self.encode_prepared(self.preparation(images))

    def encode_prepared(self, prepared):
        return super().encode_image(prepared)


def photographs(folder, sizes):
    folder.mkdir()
    for i, (w, h) in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (h // 8, w // 8, 3), np.uint8)
        Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC).save(folder / f"{i}.png")


@pytest.mark.parametrize("preset", [rdm, openai, plain])
@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_prepared_where_they_are_read_are_the_same(tmp_path, preset, workers):
    sizes = [(64, 64), (800, 600), (600, 800), (1000, 400), (96, 72)]
    photographs(tmp_path / "p", sizes)
    encoder = Prepared(preset(32))
    source = ImageFolder(tmp_path / "p")
    database = build_database(tmp_path / "d", source, encoder, workers=workers, progress=False)
    floats = [read_image(tmp_path / f"p/{i}.png").float() / 127.5 - 1 for i in range(5)]
    expected = torch.cat([encoder.encode_image(image[None]) for image in floats])
    found = database.embeddings(torch.arange(5))
    assert torch.allclose(found, expected, 1e-3, 1e-3)  # stored in half precision
    assert torch.equal(encode_pictures(source, encoder, workers=workers), expected)
    assert torch.equal(encode_pictures(source, encoder, [3, 0], batch_size=1), expected[[3, 0]])
    assert torch.equal(encode_images(encoder, floats), expected)


def test_embeddings_of_some_pictures(tmp_path):
    photographs(tmp_path / "p", [(64, 64), (40, 40)])
    (tmp_path / "p/2.png").write_text("no picture")
    source = ImageFolder(tmp_path / "p")
    assert encode_pictures(source, Pooled(), []).shape == (0, 48)
    assert encode_pictures(source, Pooled(), [1, 0]).shape == (2, 48)
    with pytest.raises(UnreadableImage, match=r"2\.png: not an image"):
        encode_pictures(source, Pooled())
    with pytest.raises(ValueError, match="batch_size=0: give a whole number, at least 1"):
        encode_pictures(source, Pooled(), batch_size=0)


def test_a_spacer_is_refused_by_name(tmp_path):
    photographs(tmp_path / "p", [(64, 64)])
    Image.new("RGB", (1, 10_000)).save(tmp_path / "p/spacer.gif")
    encoder, source = Prepared(openai(224)), ImageFolder(tmp_path / "p")
    with at_most(300), pytest.warns(SkippedPictures, match=r"1 x 10000 pixels: one side is"):
        build_database(tmp_path / "d", source, encoder, progress=False)
    cut = Patchify(short_side=1200).over(source)
    with at_most(300), pytest.warns(SkippedPictures, match="is too narrow to be cut"):
        build_database(tmp_path / "e", cut, encoder, progress=False)


def test_memory_follows_the_picture_being_read(tmp_path):
    """16 pictures of 6 megapixels take 0.3 GB as bytes, 1.2 GB as floats."""
    (tmp_path / "p").mkdir()
    Image.new("RGB", (3000, 2000), "red").save(tmp_path / "p/0.jpg")
    for i in range(1, 16):
        (tmp_path / f"p/{i}.jpg").hardlink_to(tmp_path / "p/0.jpg")
    torch.nn.functional.interpolate(torch.zeros(1, 3, 64, 64), (32, 32))  # what torch loads once
    with at_most(160):
        encoder, source = Prepared(openai(32)), ImageFolder(tmp_path / "p")
        database = build_database(tmp_path / "d", source, encoder, thumbnails=32, progress=False)
    assert len(database) == 16
    with at_most(400):  # an encoder that takes pictures as they are gets fewer at a time
        assert len(build_database(tmp_path / "e", source, Pooled(), progress=False)) == 16


def test_a_large_picture_of_few_bytes(tmp_path):
    (tmp_path / "p").mkdir()
    Image.new("P", (5000, 5000)).save(tmp_path / "p/a.gif")
    assert (tmp_path / "p/a.gif").stat().st_size < 300_000
    with at_most(300):
        build_database(
            tmp_path / "d", ImageFolder(tmp_path / "p"), Prepared(openai(32)), thumbnails=64
        )


class Raises(Source):
    """A source of someone's own."""

    def __len__(self):
        return 4

    def name(self, i):
        return f"p{i}"

    def read(self, i):
        if i == 2:
            raise OSError("the disk\nis away")
        return [Item(pictures(4)[i], {"number": i})]

    def describe(self):
        return {"kind": "own"}


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_source_raises_costs_one_picture(tmp_path, workers):
    with pytest.warns(SkippedPictures, match=r"1 skipped: p2 \(OSError: the disk is away\)"):
        database = build_database(
            tmp_path / "d", Raises(), Pooled(), workers=workers, progress=False
        )
    assert database.column("number").tolist() == [0, 1, 3]


def test_numbers_are_checked_where_they_enter(tmp_path):
    source = Images(pictures(3))
    for wrong in ({"batch_size": 0}, {"shard_rows": 0}, {"thumbnails": 0}, {"workers": -1}):
        [(name, value)] = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}: give a whole number"):
            build_database(tmp_path / "d", source, Pooled(), progress=False, **wrong)
    numbers = {"batch_size": np.int64(2), "shard_rows": np.int32(2), "thumbnails": np.int64(8)}
    database = build_database(tmp_path / "d", source, Pooled(), progress=False, **numbers)
    assert database.manifest.settings == {"batch_size": 2, "shard_rows": 2, "thumbnails": 8}
    for wrong in ({"size": 0}, {"n": 0}, {"stride": 0}, {"size": 1.5}, {"seed": "a"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*: give a whole number"):
            Patchify(**wrong)
    patchify = Patchify(size=np.int64(4), n=np.int32(2))
    assert len(build_database(tmp_path / "p", patchify.over(source), Pooled(), progress=False)) == 6


def test_small_pictures_wait_as_bytes():
    reader = Reader(Images(pictures(2)), Prepared(plain(64)))
    [row] = reader(0)  # pyright: ignore
    assert row.pixels.dtype == torch.uint8
    assert not row.prepared


def test_thumbnails_of_a_quality(tmp_path):
    """WebP files, smaller than PNG, of nearly the same pixels; the encoder sees the pictures."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (48, 48), mode="bilinear") * 2 - 1
    options = {"thumbnails": 48, "progress": False}
    plain = build_database(tmp_path / "a", Images(images), Pooled(), **options)
    small = build_database(
        tmp_path / "b", Images(images), Pooled(), thumbnail_quality=80, **options
    )
    assert torch.equal(plain.embeddings(torch.arange(6)), small.embeddings(torch.arange(6)))
    sizes = [next(d.path.glob("thumbnails-*")).stat().st_size for d in (plain, small)]
    assert sizes[1] < sizes[0] / 3
    difference = small.image(2) - images[2]
    assert difference.square().mean().sqrt() < 0.1
    assert small.manifest.settings["thumbnail_quality"] == 80
    with pytest.raises(FileExistsError):
        build_database(tmp_path / "b", Images(images), Pooled(), **options)


def test_a_quality_that_means_nothing(tmp_path):
    images = Images(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="give thumbnails=SIDE"):
        build_database(tmp_path / "a", images, Pooled(), thumbnail_quality=80)
    with pytest.raises(ValueError, match="thumbnail_quality=101"):
        build_database(tmp_path / "a", images, Pooled(), thumbnails=8, thumbnail_quality=101)
    assert not (tmp_path / "a").exists()
