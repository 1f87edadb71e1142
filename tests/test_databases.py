"""Databases: built, opened, searched, filtered, shown, changed; memory and disk give the same."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from retrodiff.databases import (
    ArrayDatabase,
    ImageFolder,
    Images,
    Patchify,
    Union,
    append_to_database,
    build_database,
    captions_of,
    contact_sheet,
    delete_rows,
    open_database,
)
from retrodiff.disk.locks import write_lock
from retrodiff.indexes import Annoy, Exact
from retrodiff.interfaces import Database, Encoder, Fingerprint, Query
from retrodiff.retrieval import NearestNeighbors, Uniform
from retrodiff.testing import check_proposal, check_retriever


class Pooled(Encoder):
    """Mean colors of a 4 x 4 grid, raw."""

    def __init__(self, weights: str = "w", scale: float = 10):
        self.weights, self.scale = weights, scale

    @property
    def dim(self):
        return 48

    @property
    def fingerprint(self):
        return Fingerprint(encoder="pooled", weights=self.weights, preprocessing="none", dim=48)

    def encode_image(self, images):
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1), 4)
        return self.scale * pooled.flatten(1)


def pictures(n: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)


RECORDS = [
    {"file": f"f{i}.png", "label": "cat dog bird".split()[i % 3], "year": i} for i in range(50)
]


@pytest.fixture
def images() -> Images:
    return Images(pictures(50), RECORDS)


@pytest.fixture
def database(tmp_path, images):
    return build_database(
        tmp_path / "d.rdb",
        images,
        Pooled(),
        shard_rows=16,
        batch_size=5,
        thumbnails=8,
        progress=False,
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    for i, image in enumerate(pictures(12, 20)):
        file = root / ("sea" if i % 2 else "hills") / f"p{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return root


# --- what is stored is what was put in -----------------------------------------------------------


def test_disk_and_memory_are_the_same_database(database, images):
    embeddings = Pooled().encode_image(images.images / 127.5 - 1)
    memory = ArrayDatabase(embeddings, Pooled().fingerprint, RECORDS, images=images.images)
    again = open_database(database.path)
    assert isinstance(again, Database)
    assert len(again) == len(memory) == 50
    rows = torch.tensor([[49, 0], [16, 15]])
    assert torch.equal(again.embeddings(rows), embeddings.half().float()[rows])
    assert torch.equal(memory.embeddings(rows), again.embeddings(rows))
    assert again.records(rows[0]) == memory.records(rows[0]) == [RECORDS[49], RECORDS[0]]
    assert again.columns == memory.columns == ("file", "label", "year")
    assert again.labels.tolist() == memory.labels.tolist() == [r["label"] for r in RECORDS]
    query = Query(torch.randn(7, 48))
    mine, theirs = again.search(query, 6), memory.search(query, 6)
    assert torch.equal(mine.indices, theirs.indices)
    assert torch.equal(mine.similarity, theirs.similarity)
    assert torch.equal(mine.embeddings, theirs.embeddings)
    assert torch.equal(again.image(17), memory.image(17))
    assert torch.equal(again.image(17), images.images[17] / 127.5 - 1)


def test_rows_hash_is_one_for_disk_and_memory(tmp_path):
    images = pictures(20)
    disk = build_database(tmp_path / "a", Images(images), Pooled(), progress=False)
    memory = ArrayDatabase(Pooled().encode_image(images / 127.5 - 1), Pooled().fingerprint)
    assert disk.fingerprint == memory.fingerprint
    swapped = ArrayDatabase(memory.embeddings(torch.arange(19, -1, -1)), Pooled().fingerprint)
    assert swapped.fingerprint.rows != memory.fingerprint.rows
    assert swapped.fingerprint.disagreement(memory.fingerprint) is None


def test_search_is_cosine_on_stored_values(database):
    query = torch.randn(4, 3, 48)
    found = database.search(Query(query), 5)
    assert found.indices.shape == found.similarity.shape == (4, 3, 5)
    assert found.embeddings.shape == (4, 3, 5, 48)
    stored = database.embeddings(torch.arange(50)).double()
    cosine = torch.nn.functional.cosine_similarity(query.double()[:, :, None], stored, dim=-1)
    expected = cosine.topk(5)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.similarity.double(), expected.values)


def test_no_query_finds_nothing(database):
    for part in (database, database.subset([3, 1, 2]), Union(database, database)):
        found = part.search(Query(torch.empty(0, 48)), 3)
        assert found.indices.shape == (0, 3)
        assert found.embeddings.shape == (0, 3, 48)


def test_patches_keep_their_coordinates(folder, tmp_path):
    step = Patchify(size=8, short_side=16, n=3, seed=4)
    database = build_database(
        tmp_path / "p.rdb", step.over(ImageFolder(folder)), Pooled(), progress=False
    )
    assert len(database) == 36
    for row in (0, 13, 35):
        record = database.records(torch.tensor([row]))[0]
        x1, y1, x2, y2 = record["box"]
        assert (x2 - x1, y2 - y1) == (8, 8)
        assert record["resized"] == [16, 16]
        # Cut again from the file, it is the picture that was encoded.
        again = Pooled().encode_image(database.image(row)[None])[0]
        torch.testing.assert_close(
            again, database.embeddings(torch.tensor([row]))[0], atol=4e-3, rtol=1e-3
        )


def test_patches_of_a_picture_depend_on_its_number_only():
    step = Patchify(size=5, n=4, seed=1)
    boxes = [step.boxes(20, 30, i) for i in range(20)]
    assert boxes == [step.boxes(20, 30, i) for i in range(20)]
    flat = [box for four in boxes for box in four]
    assert len(set(flat)) > 60
    assert all(0 <= x1 and x2 <= 30 and 0 <= y1 and y2 <= 20 for x1, y1, x2, y2 in flat)
    assert step.boxes(20, 30, 0) != Patchify(size=5, n=4, seed=2).boxes(20, 30, 0)


def test_grid_of_patches_covers_the_picture():
    image = pictures(1, 12)[0]
    patches, boxes, whole = Patchify(size=4).patches(image)
    assert (len(patches), whole) == (9, (0, 0, 12, 12))
    back = torch.zeros_like(image)
    for patch, (x1, y1, x2, y2) in zip(patches, boxes, strict=True):
        back[:, y1:y2, x1:x2] = patch
    assert torch.equal(back, image)
    assert len(Patchify(size=4, stride=2).patches(image)[1]) == 25
    assert Patchify(size=16).patches(image)[2] == (0, 0, 16, 16)


def test_patchify_refuses():
    with pytest.raises(ValueError, match="n=2 asks for random patches, stride=3 for a grid"):
        Patchify(n=2, stride=3)
    with pytest.raises(ValueError, match="no patch would fit"):
        Patchify(size=256, short_side=100)


def test_folder_labels_and_numeric_order(folder):
    source = ImageFolder(folder, {"license": "CC0"})
    assert source.files[:3] == ["hills/p0.png", "hills/p2.png", "hills/p4.png"]
    assert source.files[5] == "hills/p10.png"
    assert source.read(0)[0].record == {"file": "hills/p0.png", "label": "hills", "license": "CC0"}


def test_images_of_many_sizes_in_one_batch(tmp_path):
    sizes = [(6, 9), (8, 8), (6, 9), (30, 20), (8, 8)]
    images = [torch.rand(3, h, w) * 2 - 1 for h, w in sizes]
    database = build_database(tmp_path / "m", Images(images), Pooled(), progress=False)
    alone = torch.cat([Pooled().encode_image(image[None]) for image in images])
    torch.testing.assert_close(database.embeddings(torch.arange(5)), alone.half().float())


def test_worker_processes_give_the_same_bytes(folder, tmp_path):
    source = Patchify(size=6, n=2).over(ImageFolder(folder))
    options = {"shard_rows": 7, "thumbnails": 6, "progress": False}
    build_database(tmp_path / "a", source, Pooled(), **options)
    build_database(tmp_path / "b", source, Pooled(), workers=1, **options)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def unhashed(value: dict) -> dict:
    """A file's JSON that may be edited: without the hash of itself."""
    return {name: entry for name, entry in value.items() if name != "sha256"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "keeps"),
    [
        ("label == 'dog'", lambda r: r["label"] == "dog"),
        (
            "label in ['dog', 'cat'] and year >= 20",
            lambda r: r["label"] != "bird" and r["year"] >= 20,
        ),
        ("not (year < 10 or year > 30)", lambda r: 10 <= r["year"] <= 30),
        ("10 <= year < 20", lambda r: 10 <= r["year"] < 20),
        ("label not in ('dog',)", lambda r: r["label"] != "dog"),
        ("year > -1 and label is not None", lambda r: True),
        ('label == "it\'s"', lambda r: False),
    ],
)
def test_where(database, condition, keeps):
    expected = [i for i, record in enumerate(RECORDS) if keeps(record)]
    chosen = database.where(condition)
    assert chosen.rows.tolist() == expected
    if expected:
        query = Query(database.embeddings(torch.tensor([expected[-1]])))
        found = chosen.search(query, 1)
        assert found.indices.item() == len(expected) - 1
        assert chosen.records(found.indices[0]) == [RECORDS[expected[-1]]]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("color == 'red'", "unknown column 'color'; columns: file, label, year"),
        ("__import__('os').system('true')", "unknown column '__import__'"),
        ("label.upper() == 'DOG'", "cannot use"),
        ("year + 1 > 3", "cannot use"),
        ("1 == 1", "cannot use"),
        ("year >", "cannot read the filter"),
        ("label in year", "cannot use"),
        ("lambda: 1", "cannot use"),
        ("year > None", "cannot use"),
        ("year == 'x'", r"does not fit its columns \(year is int64\)"),
        ("label > 3", r"does not fit its columns \(label is string\)"),
        ("label in [1, 2]", r"does not fit its columns \(label is string\)"),
        ("label", r"does not fit its columns \(label is string\)"),
        ("year == 99999999999999999999", "more than 64 bits"),
        ("year == 1\0", "cannot read the filter"),
        ("(" * 500 + "year > 3" + ")" * 500, "cannot read the filter"),
        ("not " * 3000 + "year > 3", "filter"),
        (" or ".join(["year == 3"] * 3000), "more than 500 comparisons"),
        ("", "cannot read the filter"),
    ],
)
def test_where_refuses(database, condition, message):
    everywhere = [database, database.subset([3, 1]), Union(database, database.subset([2]))]
    for part in everywhere:
        with pytest.raises(ValueError, match=message) as caught:
            part.where(condition)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_where_does_not_care_for_escapes(database):
    assert len(database.where(r"label == '\d'")) == 0


def test_where_on_a_part_and_on_a_union(database):
    some = database.subset([40, 3, 17, 4])
    chosen = some.where("year < 20").where("label != 'dog'")
    assert chosen.column("year").tolist() == [3, 17]
    other = ArrayDatabase(
        database.embeddings(torch.arange(3)), Pooled().fingerprint, [{"place": p} for p in "abc"]
    )
    both = Union(some, other)
    assert both.where("year == 17 or place == 'b'").rows.tolist() == [2, 5]
    assert both.where("place is None").rows.tolist() == [0, 1, 2, 3]
    assert [r.get("place") for r in both.where("year is None").records(torch.arange(3))] == [*"abc"]


def test_where_on_a_union_with_deleted_rows(database):
    other = ArrayDatabase(
        database.embeddings(torch.arange(3)), Pooled().fingerprint, [{"place": p} for p in "abc"]
    )
    fewer = delete_rows(database.path, [0, 20, 49])
    both = Union(fewer, other)
    assert both.where("place == 'c'").rows.tolist() == [49]
    assert both.where("year == 21").records(torch.tensor([0])) == [RECORDS[21]]


def test_subset_numbers_anew_and_keeps_origin(database):
    chosen = database.subset([40, 3, 17])
    assert isinstance(chosen, Database)
    assert [r["year"] for r in chosen.records(torch.tensor([2, 0]))] == [17, 40]
    assert chosen.column("year").tolist() == [40, 3, 17]
    assert torch.equal(chosen.image(1), database.image(3))
    assert chosen.fingerprint.rows != database.fingerprint.rows
    assert chosen.fingerprint.rows != database.subset([3, 40, 17]).fingerprint.rows
    assert chosen.subset([2]).records(torch.tensor([0]))[0]["year"] == 17
    query = Query(torch.randn(5, 48))
    found, whole = chosen.search(query, 3), database.search(query, 50)
    for mine, all_rows in zip(found.indices, whole.indices.tolist(), strict=True):
        order = [i for i in all_rows if i in (40, 3, 17)]
        assert [int(chosen.rows[i]) for i in mine] == order
    with pytest.raises(ValueError, match="k=4 is more than the database's 3 rows"):
        chosen.search(query, 4)


@pytest.fixture
def pair() -> list[ArrayDatabase]:
    g = torch.Generator().manual_seed(3)
    mark = Pooled().fingerprint
    return [ArrayDatabase(torch.randn(n, 48, generator=g), mark) for n in (30, 20)]


def test_union_finds_what_one_database_of_all_rows_finds(pair):
    together = torch.cat([d.embeddings(torch.arange(len(d))) for d in pair])
    whole, union = ArrayDatabase(together, Pooled().fingerprint), Union(*pair)
    query = Query(torch.randn(9, 48))
    for k in (1, 7, 50):
        assert torch.equal(union.search(query, k).indices, whole.search(query, k).indices)
    assert torch.equal(union.embeddings(torch.tensor([[49, 0]])), together[None, [49, 0]])


@pytest.mark.parametrize(
    ("weights", "k", "shares"),
    [
        ([3, 1], 4, [3, 1]),
        ([0.3, 0.1], 8, [6, 2]),
        ([1, 1], 5, [3, 2]),
        ([1, 1000], 3, [0, 3]),
        ([1, 1000], 25, [5, 20]),  # all rows of the second, the rest from the first
        ([1, 1], 50, [30, 20]),
    ],
)
def test_weighted_union_gives_each_database_its_share(pair, weights, k, shares):
    union = Union(*pair, weights=weights)
    query = Query(torch.randn(6, 48))
    found = union.search(query, k)
    assert [int(n) for n in torch.bincount((found.indices[0] >= 30).long(), minlength=2)] == shares
    # Of each database its nearest; all together sorted by their cosines.
    parts = [
        d.search(query, n).indices + start
        for d, n, start in zip(pair, shares, (0, 30), strict=True)
        if n
    ]
    for row, expected in zip(found.indices, torch.cat(parts, 1), strict=True):
        assert sorted(row.tolist()) == sorted(expected.tolist())
    cosine = torch.cosine_similarity(query.embedding.unsqueeze(1), found.embeddings, dim=-1)
    torch.testing.assert_close(found.similarity, cosine)
    assert bool((found.similarity.diff(dim=1) <= 0).all())


def test_weighted_union_is_monotone_in_k_and_true_to_its_weights(pair):
    union = Union(*pair, weights=[5, 2.5])
    query = Query(torch.randn(3, 48))
    before: list[set[int]] = [set()] * 3
    for k in range(1, 51):
        now = [set(row) for row in union.search(query, k).indices.tolist()]
        assert all(a < b for a, b in zip(before, now, strict=True))
        before = now
        if k <= 30:
            assert abs(union.shares(k)[0] - k * 2 / 3) < 1
    check_retriever(NearestNeighbors(), Union(*pair, weights=[2, 1]))


def test_weights_do_not_touch_a_proposal(pair):
    check_proposal(Uniform(), Union(*pair, weights=[1, 9]))


def test_union_refuses(pair, database):
    mark = Pooled().fingerprint
    rows = torch.randn(4, 48)
    for other, message in (
        (ArrayDatabase(torch.randn(4, 7), replace(mark, dim=7)), "dim=48 against dim=7"),
        (ArrayDatabase(rows, replace(mark, encoder="clip")), "encoder='pooled' against"),
        (ArrayDatabase(rows, replace(mark, weights="x")), "weights='w' against weights='x'"),
        (ArrayDatabase(rows, replace(mark, scale="unit")), "scale='raw' against scale='unit'"),
    ):
        with pytest.raises(ValueError, match=f"databases 0 and 2 of the union disagree: {message}"):
            Union(*pair, other)
    with pytest.raises(ValueError, match="2 databases, but 1 weights"):
        Union(*pair, weights=[1])
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="each must be positive"):
            Union(*pair, weights=[1, bad])
    with pytest.raises(ValueError, match="at least one"):
        Union()


# --- change --------------------------------------------------------------------------------------


def test_delete(database):
    query = Query(torch.randn(20, 48))
    before = database.search(query, 50)
    after = delete_rows(database.path, database.where("label == 'dog' or year == 0").rows)
    gone = {i for i, r in enumerate(RECORDS) if r["label"] == "dog" or r["year"] == 0}
    left = [i for i in range(50) if i not in gone]
    assert len(after) == len(left)
    assert [r["year"] for r in after.records(torch.arange(len(left)))] == left
    assert after.column("year").tolist() == left
    assert torch.equal(
        after.embeddings(torch.arange(len(left))), database.embeddings(torch.tensor(left))
    )
    assert torch.equal(after.image(3), database.image(left[3]))
    found = after.search(query, 5)
    for mine, rows in zip(found.indices.tolist(), before.indices.tolist(), strict=True):
        assert [left[i] for i in mine] == [r for r in rows if r not in gone][:5]
    assert after.fingerprint.rows != database.fingerprint.rows
    # The one who had it open sees what was there then; a second deletion counts from now.
    assert len(database) == 50
    assert torch.equal(database.search(query, 50).indices, before.indices)
    fewer = delete_rows(database.path, [0, len(left) - 1])
    assert fewer.column("year").tolist() == left[1:-1]
    assert fewer.verify() == []
    assert fewer.where("year > 40").column("year").tolist() == [y for y in left[1:-1] if y > 40]
    with pytest.raises(ValueError, match="every row"):
        delete_rows(database.path, range(len(fewer)))
    with pytest.raises(IndexError, match="a database of"):
        delete_rows(database.path, [50])


def test_deleted_rows_are_not_found_by_an_approximate_index(database):
    recipe = Annoy(trees=10, components=8, rerank=40)
    searched = database.build_index(recipe, progress=False)
    assert searched.recall.value > 0.9
    rows = database.search(Query(database.embeddings(torch.tensor([5]))), 10).indices[0]
    delete_rows(database.path, rows)
    again = open_database(database.path, recipe)
    query = Query(torch.randn(9, 48))
    exact = open_database(database.path).search(query, 30)
    assert torch.equal(again.search(query, 30).indices, exact.indices)


def test_append(database, folder, tmp_path):
    more = Patchify(size=8).over(ImageFolder(folder))
    longer = append_to_database(database.path, more, Pooled(), progress=False)
    assert len(longer) == 50 + 12 * 4
    assert longer.records(torch.tensor([49]))[0]["year"] == 49
    record = longer.records(torch.tensor([50]))[0]
    assert record["file"] == "hills/p0.png"
    assert longer.column("year")[49:51].tolist()[0] == 49
    assert set(longer.columns) == {"file", "label", "year", "box", "resized"}
    assert longer.where("year is None").rows.tolist() == list(range(50, 98))
    assert longer.image(50).shape == (3, 8, 8)
    assert longer.verify() == []
    assert len(database) == 50
    with pytest.raises(ValueError, match="weights='x' against weights='w'"):
        append_to_database(database.path, more, Pooled("x"), progress=False)
    # The fingerprint is the one of the same rows in memory, in the same shards.
    assert longer.fingerprint.rows != database.fingerprint.rows


# --- index ---------------------------------------------------------------------------------------


def test_index_is_saved_beside_the_rows_and_reopened(database, monkeypatch):
    recipe = Annoy(trees=10, components=8)
    built = open_database(database.path, recipe)
    assert "rerank" in (database.path / "indexes/annoy/index.json").read_text()
    monkeypatch.setattr(Annoy, "build", None)
    for again in (open_database(database.path, recipe), open_database(database.path, "annoy")):
        assert (again.recipe, again.recall) == (recipe, built.recall)
        query = Query(torch.randn(3, 48))
        assert torch.equal(again.search(query, 4).indices, database.search(query, 4).indices)
    assert open_database(database.path).recipe == Exact()
    assert open_database(database.path, Exact()).recipe == Exact()


def test_index_of_other_rows_is_refused(database, images):
    open_database(database.path, Annoy(trees=5, components=8))
    append_to_database(database.path, images, Pooled(), progress=False)
    with pytest.raises(ValueError, match="build the index again"):
        open_database(database.path, "annoy")
    assert len(open_database(database.path, Annoy(trees=5, components=8))) == 100
    with pytest.raises(FileNotFoundError, match="has no index 'usearch'"):
        open_database(database.path, "usearch")


def test_index_of_another_database_is_refused(database, tmp_path):
    other = build_database(
        tmp_path / "other", Images(pictures(50, seed=5)), Pooled(), progress=False
    )
    other.build_index(Annoy(trees=5, components=8), progress=False)
    shutil.copytree(other.path / "indexes", database.path / "indexes")
    with pytest.raises(ValueError, match=r"built from rows \w+, the database has rows \w+: build"):
        open_database(database.path, "annoy")
    assert database.saved_indexes() == {}


def test_options_of_an_exact_index_are_kept(database):
    recipe = Exact(block=16)
    assert open_database(database.path, recipe).recipe == recipe


def test_an_index_is_not_written_where_others_write(database):
    recipe = Annoy(trees=5, components=8)
    with write_lock(database.path):
        with pytest.raises(BlockingIOError, match="being written by another process: wait") as one:
            database.build_index(recipe, progress=False)
        assert "\n" not in str(one.value)
        in_memory = database.build_index(recipe, progress=False, save=False)
        assert in_memory.recipe == recipe
        assert len(open_database(database.path)) == 50  # readers are not disturbed
    assert not list(database.path.glob("indexes/*"))
    database.build_index(recipe, progress=False)


def test_a_read_only_folder_can_be_read_and_says_how_to_index_it(database, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in [database.path, *database.path.rglob("*")]}
    again = open_database(database.path)
    again.search(Query(torch.randn(2, 48)), 3)
    again.records(torch.tensor([3]))
    again.where("year > 3").image(0)
    assert again.verify() == []
    assert {p: p.stat().st_mtime_ns for p in [database.path, *database.path.rglob("*")]} == before

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    recipe = Annoy(trees=5, components=8)
    monkeypatch.setattr(Annoy, "build", None)  # refused before the work
    with pytest.raises(PermissionError, match=r"Permission denied\): keep .*\(save=False\)") as one:
        again.build_index(recipe, progress=False)
    assert "\n" not in str(one.value)
    assert str(database.path) in str(one.value)
    monkeypatch.undo()
    assert again.build_index(recipe, progress=False, save=False).recipe == recipe


def test_large_databases_take_a_saved_index_only_with_enough_recall(database, monkeypatch):
    from retrodiff.databases import opening

    monkeypatch.setattr(opening, "EXACT_ROWS", 10)
    database.build_index(Annoy(trees=10, components=48), progress=False)
    assert open_database(database.path).recipe.name == "annoy"
    about = database.path / "indexes/annoy/index.json"
    value = json.loads(about.read_text())
    value["recall"]["value"] = 0.9
    about.write_text(json.dumps(unhashed(value)))
    assert open_database(database.path).recipe == Exact()


def test_a_large_database_opens_without_the_library_of_its_index(database, monkeypatch):
    from retrodiff.databases import opening

    monkeypatch.setattr(opening, "EXACT_ROWS", 10)
    database.build_index(Annoy(trees=10, components=48), progress=False)

    def missing(*_):
        raise ValueError("annoy is not installed: pip install annoy")

    monkeypatch.setattr(Annoy, "load", missing)
    with pytest.warns(UserWarning, match=r"searched exactly, .*: annoy is not installed") as caught:
        opened = open_database(database.path)
    assert caught[0].filename == __file__
    assert opened.recipe == Exact()
    assert opened.search(Query(torch.randn(2, 48)), 3).indices.shape == (2, 3)
    with pytest.raises(ValueError, match="annoy is not installed"):
        open_database(database.path, "annoy")
    # Nothing below searches, so that nothing below warns.
    append_to_database(database.path, Images(pictures(2)), Pooled(), progress=False)
    delete_rows(database.path, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: "{", "is not a description of an index"),
        (lambda v: [], "is not a description of an index"),
        (lambda v: v | {"format": 99}, "newer format than 1: upgrade"),
        (lambda v: v | {"recipe": {"name": "future"}}, "unknown index 'future': upgrade"),
        (lambda v: v | {"recipe": 3}, "is damaged"),
        (lambda v: v | {"recipe": v["recipe"] | {"leaves": 3}}, "does not fit annoy .*leaves"),
        (lambda v: v | {"recall": {"value": "much"}}, "is damaged"),
        (lambda v: {k: v[k] for k in v if k != "rows"}, "is damaged"),
    ],
)
def test_a_broken_index_is_one_line(database, change, message, monkeypatch):
    from retrodiff.databases import opening

    database.build_index(Annoy(trees=5, components=8), progress=False)
    about = database.path / "indexes/annoy/index.json"
    value = change(unhashed(json.loads(about.read_text())))
    about.write_text(value if isinstance(value, str) else json.dumps(value))
    for ask in (
        lambda: open_database(database.path, "annoy"),
        lambda: open_database(database.path).saved_indexes(),
    ):
        with pytest.raises(ValueError, match=message) as one:
            ask()
        assert "\n" not in str(one.value)
    monkeypatch.setattr(opening, "EXACT_ROWS", 10)
    with pytest.warns(UserWarning, match=message):
        assert open_database(database.path).recipe == Exact()
    database.build_index(Annoy(trees=5, components=8), progress=False)
    assert open_database(database.path, "annoy").recipe == Annoy(trees=5, components=8)


# --- refusals ------------------------------------------------------------------------------------


def test_widths_and_k(database):
    with pytest.raises(ValueError, match=r"query.dim=7 does not match database.dim=48.*pooled"):
        database.search(Query(torch.randn(2, 7)), 3)
    with pytest.raises(ValueError, match="k=51 is more than the database's 50 rows"):
        database.search(Query(torch.randn(2, 48)), 51)
    with pytest.raises(ValueError, match="k=0: ask for at least one"):
        Union(database, database, weights=[1, 1]).search(Query(torch.randn(2, 48)), 0)
    with pytest.raises(ValueError, match="unknown column 'color'; columns: file, label, year"):
        database.column("color")
    with pytest.raises(IndexError, match="50 rows"):
        database.embeddings(torch.tensor([50]))
    with pytest.raises(IndexError, match="50 rows"):
        database.records(torch.tensor([-1]))


def test_array_database_refuses():
    mark = Pooled().fingerprint
    with pytest.raises(ValueError, match=r"fingerprint\.dim=48 does not match"):
        ArrayDatabase(torch.zeros(3, 7), mark)
    with pytest.raises(ValueError, match="3 embeddings, but 2 records"):
        ArrayDatabase(torch.zeros(3, 48), mark, [{}, {}])
    bad = torch.zeros(3, 48)
    bad[1, 5] = torch.nan
    with pytest.raises(ValueError, match="row 1 by pooled holds NaN"):
        ArrayDatabase(bad, mark)
    with pytest.raises(ValueError, match="more than 65504"):
        ArrayDatabase(torch.full((1, 48), 1e6), mark)
    with pytest.raises(ValueError, match="thumbnails=SIZE"):
        ArrayDatabase(torch.zeros(3, 48), mark).image(0)


def test_not_a_database(tmp_path, database):
    with pytest.raises(FileNotFoundError, match="is not a database"):
        open_database(tmp_path)
    manifest = database.path / "manifest.json"
    value = unhashed(json.loads(manifest.read_text()))
    manifest.write_text(json.dumps({**value, "format": 99}))
    with pytest.raises(ValueError, match="upgrade retrodiff"):
        open_database(database.path)
    for text in ("{", "[]", "{}", '{"format": "new"}', "\udcff"):
        manifest.write_text(text, "utf-8", "surrogateescape")
        with pytest.raises(ValueError, match="not a database manifest"):
            open_database(database.path)
    for key in ("shards", "fingerprint"):
        manifest.write_text(json.dumps({k: v for k, v in value.items() if k != key}))
        with pytest.raises(ValueError, match=f"damaged database manifest.*{key}"):
            open_database(database.path)


def test_damage_is_found(database):
    vectors = database.path / "vectors-000001.safetensors"
    good = vectors.read_bytes()
    assert database.verify() == []
    vectors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert open_database(database.path).verify() == [
        "vectors-000001.safetensors has changed since it was written"
    ]
    vectors.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="restore it, or build again"):
        open_database(database.path)
    vectors.unlink()
    with pytest.raises(FileNotFoundError, match=r"vectors-000001.*is missing"):
        open_database(database.path)


def test_files_that_moved(folder, tmp_path):
    database = build_database(tmp_path / "d", ImageFolder(folder), Pooled(), progress=False)
    shown = database.image(3)
    os.rename(folder, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="root="):
        database.image(3)
    moved = open_database(tmp_path / "d", root=tmp_path / "elsewhere")
    assert torch.equal(moved.image(3), shown)


def test_contact_sheet(database):
    found = database.search(Query(database.embeddings(torch.tensor([4, 9]))), 3)
    records = tuple(tuple(database.records(row)) for row in found.indices)
    with pytest.raises(ValueError, match=r"no records: .*database\.records"):
        captions_of(found)
    captions = captions_of(replace(found, records=records))
    assert captions[0][0] == "1.000\nf4.png"
    titled = tuple(tuple({"title": "a red apple on a table"} for _ in row) for row in records)
    first = captions_of(replace(found, records=titled), side=60)[0][0]
    assert first == "1.000\na red app…"  # its beginning; of a file the end is kept
    shown = [[database.image(i) for i in row] for row in found.indices.tolist()]
    sheet = np.asarray(contact_sheet([database.image(4), "a prompt"], shown, captions, side=64))
    # The query and its nearest neighbor are the same picture, side by side.
    cell = sheet[6 : 6 + 64, 6 : 6 + 64]
    assert (cell == sheet[6 : 6 + 64, 12 + 70 : 12 + 70 + 64]).all()
    assert cell.std() > 30


def test_an_index_is_tried_first_and_saved_then(folder, tmp_path):
    database = build_database(tmp_path / "d.rdb", ImageFolder(folder), Pooled(), progress=False)
    tried = database.build_index(Annoy(trees=5, components=4), k=2, save=False)
    assert database.saved_indexes() == {}
    saved = tried.save_index()
    assert list(database.saved_indexes()) == ["annoy"]
    query = Query(torch.randn(3, 48))
    assert torch.equal(saved.search(query, 2).indices, tried.search(query, 2).indices)
    assert database.save_index() is database  # exact search needs no file
