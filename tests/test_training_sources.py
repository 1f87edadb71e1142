"""Training images read from sources when they are asked for, and augmented."""

import io
import os
import pickle
import tarfile
import warnings
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from trainings import run, same, weights

from retrodiff.databases import Patchify, build_database, open_database, open_source
from retrodiff.encoders import TimmEncoder
from retrodiff.interfaces import Randomness
from retrodiff.pictures.decoding import UnreadableImage
from retrodiff.retrieval import ExcludeSelf, NearestNeighbors
from retrodiff.training import FolderImages, Mirrored, Moved, SourceImages, TrainingSet
from retrodiff.training.source_images import CHUNK

N, SIZE = 70, 16
QUIET = {"progress": False}


def png(i):
    draw = np.random.default_rng(i)
    small = draw.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((30 + i % 7, 24), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    assert N > CHUNK
    folder = tmp_path_factory.mktemp("photos")
    for i in range(N):
        (folder / f"{i:03}.png").write_bytes(png(i))
    return folder


@pytest.fixture(scope="module")
def eyes():
    torch.manual_seed(0)
    return TimmEncoder("test_resnet", pretrained=False, image_size=32)


@pytest.fixture(scope="module")
def library(photos, eyes, tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "d.rdb"
    build_database(path, open_source(photos), eyes, progress=False)
    return open_database(path)


@pytest.fixture(scope="module")
def squares(photos):
    return FolderImages(photos, SIZE, **QUIET).bytes


def write(kind, photos, path):
    files = sorted(photos.iterdir())
    if kind == "tars":
        with tarfile.open(path / "a.tar", "w") as tar:
            for file in files:
                tar.add(file, file.name)
                text = f"a picture {file.stem}".encode()
                about = tarfile.TarInfo(f"{file.stem}.txt")
                about.size = len(text)
                tar.addfile(about, io.BytesIO(text))
    elif kind == "zips":
        with zipfile.ZipFile(path / "a.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
    else:
        table = pa.table({"image": [f.read_bytes() for f in files], "n": list(range(N))})
        pq.write_table(table, path / "a.parquet", row_group_size=20)
    return path


@pytest.mark.parametrize("kind", ["tars", "zips", "parquet"])
def test_pictures_of_every_kind_of_source(kind, photos, squares, tmp_path):
    path = write(kind, photos, tmp_path)
    with pytest.warns(UserWarning, match=f"pictures in {kind} are slow .* cache=FOLDER.*53.8 kB"):
        images = SourceImages(path, SIZE, workers=1, **QUIET)
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images[rows], squares[rows])
    if kind == "tars":
        assert images.column("caption")[3] == "a picture 003"
    if kind == "parquet":
        assert images.column("n") == list(range(N))
        with pytest.raises(ValueError, match=r"no picture has a 'caption'; what is known .* n"):
            images.column("caption")


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_gives_what_folder_images_gives(photos, squares, tmp_path, cached):
    images = SourceImages(photos, SIZE, cache=tmp_path if cached else None, **QUIET)
    assert len(images) == N
    assert torch.equal(images[torch.arange(N)], squares)
    assert images.name(3) == "003.png"
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again[torch.tensor([5, 2])], squares[[5, 2]])
    assert again.digest() == images.digest()


@pytest.mark.parametrize("workers", [0, 2])
def test_embeddings_are_those_of_a_build(photos, eyes, library, workers):
    images = SourceImages(photos, SIZE, workers=workers, **QUIET)
    data = TrainingSet.of(
        images, eyes, library, ExcludeSelf(NearestNeighbors()), 3, batch_size=16, **QUIET
    )
    plain = TrainingSet.of(
        FolderImages(photos, SIZE, **QUIET),
        eyes,
        library,
        ExcludeSelf(NearestNeighbors()),
        3,
        batch_size=16,
        **QUIET,
    )
    assert torch.equal(data.embeddings, plain.embeddings)
    assert torch.equal(data.table, plain.table)
    some = images.embed(eyes, torch.tensor([9, 2]))
    torch.testing.assert_close(some, data.embeddings[[9, 2]])


def training_set(images, eyes, library):
    return TrainingSet.of(images, eyes, library, ExcludeSelf(NearestNeighbors()), 3, **QUIET)


@pytest.mark.parametrize("cached", [False, True])
def test_batches_are_the_same_for_any_number_of_workers(photos, eyes, library, tmp_path, cached):
    plain = training_set(FolderImages(photos, SIZE, **QUIET), eyes, library)
    images = SourceImages(photos, SIZE, cache=tmp_path if cached else None, **QUIET)
    data = training_set(images, eyes, library)
    for made in (data, data.augmented(Moved(2, 0.8), Mirrored())):
        expected = list(plain.augmented(*made.augment).batches(0, 5, batch_size=8, seed=1))
        for workers in (0, 2):
            found = list(made.batches(0, 5, batch_size=8, seed=1, workers=workers))
            for (x, q, f), (y, r, g) in zip(expected, found, strict=True):
                assert torch.equal(x, y)
                assert q == r
                assert f == g


def test_unreadable_pictures_are_left_out_by_name(photos, tmp_path):
    for i in (0, 1, 2):
        (tmp_path / f"{i:03}.png").write_bytes((photos / f"{i:03}.png").read_bytes())
    (tmp_path / "001.png").write_bytes(b"no picture")
    for cache in (None, tmp_path.with_name("kept")):
        with pytest.warns(UserWarning, match=r"1 skipped.*001\.png"):
            images = SourceImages(tmp_path, SIZE, cache=cache, **QUIET)
        assert images.numbers.tolist() == [0, 2]
        assert images.name(1) == "002.png"
    for file in tmp_path.iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="holds no readable image"):
        SourceImages(tmp_path, SIZE, **QUIET)


def test_patches_are_refused(photos):
    patches = Patchify(size=8, n=2).over(open_source(photos))
    with pytest.raises(ValueError, match=r"000\.png gives 2 images, but a training image is one"):
        SourceImages(patches, SIZE, **QUIET)


def test_one_picture_is_a_set_and_too_few_for_neighbors_without_itself(photos, eyes, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.png").write_bytes(png(0))
    build_database(tmp_path / "d", open_source(tmp_path / "p"), eyes, progress=False)
    images = SourceImages(tmp_path / "p", SIZE, **QUIET)
    database = open_database(tmp_path / "d")
    with pytest.raises(ValueError, match="k=3 neighbors were asked for, but after exclusion only"):
        training_set(images, eyes, database)
    with pytest.raises(ValueError, match="k=3 is more than the database's 1 rows"):
        TrainingSet.of(images, eyes, database, NearestNeighbors(), 3, **QUIET)


# --- files that change ---------------------------------------------------------------------------


@pytest.fixture
def own(photos, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["gone", "other", "broken"])
def test_a_file_that_changes_while_training_is_named(own, eyes, library, change, workers):
    data = training_set(SourceImages(own, SIZE, **QUIET), eyes, library)
    batches = data.batches(0, 40, batch_size=8, seed=1, workers=workers)
    next(batches)
    file = own / "007.png"
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(png(99) if change == "other" else b"no picture")
    words = "could be read when .* put it back" if change == "gone" else "has changed since"
    with pytest.raises(UnreadableImage, match=rf"007\.png {words}") as raised:
        list(batches)
    assert "\n" not in str(raised.value)


def test_an_archive_that_changes_while_training_is_named(photos, tmp_path):
    path = write("zips", photos, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = SourceImages(path, SIZE, **QUIET)
    images[torch.arange(3)]
    os.utime(path / "a.zip", (1, 1))
    with pytest.raises(UnreadableImage, match=r"a\.zip has changed since"):
        images[torch.arange(3)]


def test_kept_squares_need_no_files_and_refuse_others(own, squares, tmp_path):
    kept = tmp_path / "kept"
    images = SourceImages(own, SIZE, cache=kept, **QUIET)
    first = images.digest()
    (own / "007.png").unlink()
    assert torch.equal(images[torch.tensor([7])], squares[7:8])
    with pytest.raises(ValueError, match=r"images\.safetensors was made with source="):
        SourceImages(own, SIZE, cache=kept, **QUIET)
    (own / "007.png").write_bytes(png(7))
    os.utime(own / "007.png", (1, 1))
    with pytest.raises(ValueError, match=r"images\.safetensors was made with state="):
        SourceImages(own, SIZE, cache=kept, **QUIET)
    with pytest.raises(ValueError, match=r"images\.safetensors was made with source="):
        SourceImages(own, 2 * SIZE, cache=kept, **QUIET)
    assert SourceImages(own, SIZE, cache=tmp_path / "again", **QUIET).digest() == first


def test_what_was_begun_is_continued(own, squares, tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    real, read = type(open_source(own)).read, []

    def reading(self, i):
        read.append(i)
        if len(read) == CHUNK + 3:
            raise KeyboardInterrupt
        return real(self, i)

    monkeypatch.setattr("retrodiff.databases.sources.folders.ImageFolder.read", reading)
    with pytest.raises(KeyboardInterrupt):
        SourceImages(own, SIZE, cache=kept, **QUIET)
    read.clear()
    images = SourceImages(own, SIZE, cache=kept, **QUIET)
    assert read == list(range(CHUNK, N))
    assert torch.equal(images[torch.arange(N)], squares)


def test_the_digest_sees_names_sizes_and_some_pictures(own):
    before = SourceImages(own, SIZE, **QUIET).digest()
    assert SourceImages(own, SIZE, **QUIET).digest() == before
    os.utime(own / "003.png", (1, 1))
    assert SourceImages(own, SIZE, **QUIET).digest() == before  # a copy of the folder will do
    assert SourceImages(own, 2 * SIZE, **QUIET).digest() != before
    (own / "003.png").rename(own / "003b.png")
    assert SourceImages(own, SIZE, **QUIET).digest() != before


# --- augmentation --------------------------------------------------------------------------------


def drawn(n, seed=0):
    return Randomness.of(seed, range(n), "augment")


def test_mirror_images():
    images = torch.rand(400, 3, 5, 5) * 2 - 1
    found = Mirrored(0.25)(images, drawn(400))
    mirrored = (found == images.flip(-1)).flatten(1).all(1)
    assert bool(((found == images).flatten(1).all(1) | mirrored).all())
    assert 0.17 < float(mirrored.float().mean()) < 0.33


def test_shifts_are_whole_pixels_in_all_directions_on_the_background():
    image = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = Moved(2)(image.expand(500, -1, -1, -1), drawn(500))
    padded = torch.nn.functional.pad(image - 1, (2, 2, 2, 2)) + 1
    shifts = {}
    for one in found:
        for down in range(5):
            for right in range(5):
                window = padded[0, :, down : down + 7, right : right + 9]
                if torch.allclose(one, window, atol=1e-6):
                    shifts[down, right] = shifts.get((down, right), 0) + 1
    assert len(shifts) == 25
    assert sum(shifts.values()) == 500
    assert max(shifts.values()) < 45  # of 20 expected


def test_scales_shrink_around_the_center_and_never_enlarge():
    image = torch.ones(1, 1, 32, 32)
    image[..., 8:24, 8:24] = -1  # a black square of 16 x 16
    found = Moved(0, 0.5)(image.expand(300, -1, -1, -1), drawn(300))
    area = (1 - found).sum((1, 2, 3)) / 2
    side = area.sqrt()
    assert 7.9 < float(side.min()) < 8.5
    assert 15.5 < float(side.max()) < 16.1
    torch.testing.assert_close(found, found.flip(-1), rtol=0, atol=1e-5)
    assert float(found[..., :4, :].min()) > 0.999  # white stays white


def test_black_backgrounds():
    image = torch.full((50, 1, 8, 8), -1.0)
    torch.testing.assert_close(Moved(3, 0.7, background=-1)(image, drawn(50)), image)


@pytest.mark.parametrize("augment", [Mirrored(), Moved(2), Moved(1, 0.7)], ids=repr)
def test_an_image_does_not_depend_on_its_batch(augment):
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = augment(images, drawn(24))
    parts = [
        augment(images[i : i + 5], Randomness.of(0, range(i, min(i + 5, 24)), "augment"))
        for i in range(0, 24, 5)
    ]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mirrored(2), "probability=2"),
        (lambda: Moved(-1), "shift=-1"),
        (lambda: Moved(1, 0), "smallest=0"),
        (lambda: Moved(1, 1.2), "smallest=1.2"),
        (lambda: Moved(1, background=255), "background=255"),
    ],
)
def test_wrong_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_latents_and_other_shapes_are_refused(photos, eyes, library):
    data = training_set(FolderImages(photos, SIZE, **QUIET), eyes, library)
    latents = TrainingSet(torch.zeros(N, 8, 4, 4), data.embeddings, data.table, library)
    with pytest.raises(ValueError, match="are latents of 8 channels"):
        next(latents.augmented(Mirrored()).batches(0, 1, batch_size=2, seed=0))

    def cut(images, generator):
        return images[..., :4]

    with pytest.raises(ValueError, match="keep the shape"):
        next(data.augmented(cut).batches(0, 1, batch_size=2, seed=0))


def test_a_training_is_not_continued_with_another_augmentation(recipe, database, tmp_path):
    from trainings import small_data

    data = small_data(database)
    moved = data.augmented(Moved(1))
    run(recipe, moved, steps=1, checkpoint=tmp_path / "state")
    with pytest.raises(ValueError, match=r"augment \[.*Moved\(shift=1.*but this one has.*shift=2"):
        run(recipe, data.augmented(Moved(2)), checkpoint=tmp_path / "state", resume=True)
    again = run(recipe, moved, steps=2, checkpoint=tmp_path / "state", resume=True)
    assert same(weights(again.model), weights(run(recipe, moved, steps=2).model))
