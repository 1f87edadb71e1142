"""LanceDB tables as databases: the same rows and neighbors as ours, filters, refusals."""

from __future__ import annotations

import sys

import pytest
import torch

from retrodiff.databases import ArrayDatabase, Union
from retrodiff.databases.lance import LanceDatabase
from retrodiff.interfaces import Database, Fingerprint, Query
from retrodiff.retrieval import ExcludeGroup, NearestNeighbors, NeighborCounts, Uniform
from retrodiff.testing import check_database, check_proposal, check_retriever

lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed: retrodiff[lance]")

DIM, ROWS = 24, 500
MARK = Fingerprint(encoder="random", weights="w", preprocessing="none", dim=DIM)
RECORDS = [
    {"file": f"f{i}.png", "label": "cat dog bird".split()[i % 3], "year": i, "box": [i, 0, 9, 9]}
    for i in range(ROWS)
]


@pytest.fixture
def ours() -> ArrayDatabase:
    generator = torch.Generator().manual_seed(0)
    return ArrayDatabase(torch.randn(ROWS, DIM, generator=generator) * 7, MARK, RECORDS)


@pytest.fixture
def lance(tmp_path, ours) -> LanceDatabase:
    return LanceDatabase.create(tmp_path / "lance", "photos", ours)


def queries(n: int, seed: int = 1) -> Query:
    return Query(torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)))


def same(found, expected) -> None:
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.embeddings, expected.embeddings)
    torch.testing.assert_close(found.similarity, expected.similarity, atol=1e-6, rtol=0)


def test_contracts(lance):
    assert isinstance(lance, Database)
    check_database(lance)
    check_retriever(NearestNeighbors(), lance)
    check_proposal(Uniform(), lance)


def test_the_copy_is_the_same_database(tmp_path, ours, lance):
    rows = torch.arange(ROWS)
    for database in (lance, LanceDatabase.open(tmp_path / "lance", "photos")):
        assert len(database) == ROWS
        assert database.fingerprint == lance.fingerprint
        assert database.fingerprint.disagreement(ours.fingerprint) is None
        assert torch.equal(database.embeddings(rows), ours.embeddings(rows))
        some = torch.tensor([[7, 499], [7, 0]])
        assert torch.equal(database.embeddings(some), ours.embeddings(some))
        assert database.records(some.flatten()) == ours.records(some.flatten())
        assert database.columns == ours.columns
        assert database.table(["year", "file"]).equals(ours.table(["year", "file"]))
        assert database.labels.tolist() == ours.labels.tolist()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 20), (40, 20), (300, 5), (3, ROWS)])
def test_search_is_the_exact_one(ours, lance, n, k):
    same(lance.search(queries(n), k), ours.search(queries(n), k))


def test_search_of_regions_and_of_nothing(ours, lance):
    regions = Query(torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(4)))
    same(lance.search(regions, 4), ours.search(regions, 4))
    assert lance.search(Query(torch.empty(0, DIM)), 4).indices.shape == (0, 4)


def test_equally_near_rows_come_in_their_order(tmp_path):
    twins = ArrayDatabase(torch.ones(6, DIM), MARK)
    lance = LanceDatabase.create(tmp_path, "twins", twins)
    assert lance.search(Query(torch.ones(1, DIM)), 6).indices.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_where_is_sql(ours, lance):
    few = lance.where("label = 'dog' AND year > 100").where("year < 400 OR file = 'f499.png'")
    chosen = ours.where("label == 'dog' and year > 100 and (year < 400 or file == 'f499.png')")
    assert len(few) == len(chosen) > 90
    assert few.column("year").tolist() == chosen.column("year").tolist()
    same(few.search(queries(9), 12), chosen.search(queries(9), 12))
    assert few.records(torch.tensor([3, 3, 0])) == chosen.records(torch.tensor([3, 3, 0]))
    assert few.fingerprint.rows != lance.fingerprint.rows
    again = lance.where("year > 100 AND label = 'dog' AND (year < 400 OR year = 499)")
    assert few.fingerprint == again.fingerprint
    assert len(lance.where("year < 0")) == 0
    check_database(few)


def test_it_is_a_part_like_any_other(ours, lance):
    query = queries(5)
    subset = lance.subset([400, 3, 17])
    same(subset.search(query, 3), ours.subset([400, 3, 17]).search(query, 3))
    both, expected = Union(lance, ours.subset([5, 6])), Union(ours, ours.subset([5, 6]))
    same(both.search(query, 9), expected.search(query, 9))
    counts = NeighborCounts.fit(query, lance, 4)
    assert counts.rows.tolist() == NeighborCounts.fit(query, ours, 4).rows.tolist()
    with pytest.raises(ValueError, match="fitted on another database"):
        counts.support(lance.where("year > 3"))
    asked = Query(ours.embeddings(torch.tensor([3])), ids=torch.tensor([3]))
    found = ExcludeGroup(NearestNeighbors(), "label").retrieve(asked, lance, 4)
    assert all(record["label"] != "cat" for record in lance.records(found.indices[0]))


def test_a_reader_keeps_its_version(tmp_path, ours, lance):
    table = lancedb.connect(tmp_path / "lance").open_table("photos")
    table.delete("year < 100")
    assert len(lance) == ROWS
    same(lance.search(queries(3), 9), ours.search(queries(3), 9))
    newer = LanceDatabase.open(tmp_path / "lance", "photos")
    assert newer.fingerprint != lance.fingerprint
    same(newer.search(queries(3), 9), ours.where("year >= 100").search(queries(3), 9))
    old = LanceDatabase.open(tmp_path / "lance", "photos", version=1)
    assert old.fingerprint == lance.fingerprint


def test_a_table_of_someone_else(tmp_path, ours):
    import pyarrow as pa

    def rows(numbers: range) -> pa.Table:
        values = pa.array(ours.embeddings(torch.tensor(numbers)).flatten().numpy())
        clip = pa.FixedSizeListArray.from_arrays(values, DIM)
        return pa.table({"id": pa.array(numbers), "clip": clip})

    table = lancedb.connect(tmp_path).create_table("theirs", rows(range(0, 90, 3)))
    table.add(rows(range(90, 91)))
    with pytest.raises(ValueError, match="which encoder made its vectors: give fingerprint="):
        LanceDatabase.open(tmp_path, "theirs", vector="clip")
    theirs = LanceDatabase.open(tmp_path, "theirs", vector="clip", fingerprint=MARK)
    assert theirs.column("id").tolist() == list(range(0, 91, 3))
    same(theirs.search(queries(4), 7), ours.subset(range(0, 91, 3)).search(queries(4), 7))
    check_database(theirs)


def test_tables_of_someone_else_are_told_apart(tmp_path):
    import pyarrow as pa

    def opened(folder: str) -> str:
        theirs = LanceDatabase.open(tmp_path / folder, "t", vector="clip", fingerprint=MARK)
        return theirs.fingerprint.rows

    for seed, folder in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        values = pa.array(torch.randn(5 * DIM, generator=generator).numpy())
        clip = pa.FixedSizeListArray.from_arrays(values, DIM)
        (tmp_path / folder).mkdir()
        lancedb.connect(tmp_path / folder).create_table("t", pa.table({"clip": clip}))
    before = opened("a")
    assert before == opened("a") != opened("b")
    table = lancedb.connect(tmp_path / "a").open_table("t")
    table.add(table.to_arrow().slice(0, 1))
    table.delete("true")
    table.restore(1)
    assert len(table) == 5
    assert opened("a") != before  # another version, though the rows are the same


def test_a_vector_index_is_used_and_ranked_again(tmp_path, ours, lance):
    table = lancedb.connect(tmp_path / "lance").open_table("photos")
    ivf = lancedb.index.IvfPq(distance_type="cosine", num_partitions=4, num_sub_vectors=4)
    table.create_index("vector", config=ivf)
    indexed = LanceDatabase.open(tmp_path / "lance", "photos")
    found, exact = indexed.search(queries(20), 5), ours.search(queries(20), 5)
    hits = (found.indices.unsqueeze(-1) == exact.indices.unsqueeze(-2)).any(-1).float().mean()
    assert hits > 0.5
    assert bool((found.similarity.diff(dim=-1) <= 0).all())
    cosine = torch.cosine_similarity(queries(20).embedding.unsqueeze(1), found.embeddings, dim=-1)
    torch.testing.assert_close(found.similarity, cosine)


def test_object_storage(ours):
    """LanceDB's store in memory takes the way that object storage does."""
    lance = LanceDatabase.create("memory://", "photos", ours, storage_options={"timeout": "5s"})
    same(lance.search(queries(3), 9), ours.search(queries(3), 9))
    same(
        lance.where("year > 400").search(queries(3), 9),
        ours.where("year > 400").search(queries(3), 9),
    )


def test_a_database_of_our_own_on_disk_is_copied_shard_by_shard(tmp_path):
    from test_databases import RECORDS as FIFTY
    from test_databases import Pooled, pictures

    from retrodiff.databases import Images, build_database, delete_rows

    disk = build_database(
        tmp_path / "d", Images(pictures(50), FIFTY), Pooled(), shard_rows=16, progress=False
    )
    disk = delete_rows(disk.path, [3, 20])
    lance = LanceDatabase.create(tmp_path / "lance", "photos", disk)
    assert lance.table().equals(disk.table())
    assert torch.equal(lance.embeddings(torch.arange(48)), disk.embeddings(torch.arange(48)))


def test_images_come_from_files(tmp_path):
    from PIL import Image

    Image.new("RGB", (5, 4), "red").save(tmp_path / "red.png")
    one = ArrayDatabase(torch.ones(4, DIM), MARK, [{"file": "red.png"}] * 4)
    lance = LanceDatabase.create(tmp_path / "lance", "photos", one, root=tmp_path)
    assert lance.image(2).shape == (3, 4, 5)
    assert lance.where("file = 'red.png'").image(0)[0].min() == 1


def test_refusals(tmp_path, ours, lance):
    import pyarrow as pa

    where = tmp_path / "lance"
    other = Fingerprint(encoder="other", weights="w", preprocessing="none", dim=DIM)
    narrow = Fingerprint(encoder="random", weights="w", preprocessing="none", dim=7)
    named = ArrayDatabase(torch.zeros(2, DIM), MARK, [{"vector": 1}] * 2)
    torn = pa.array([[1.0] * DIM, None], pa.list_(pa.float32(), DIM))
    table = pa.table({"vector": torn})
    lancedb.connect(where).create_table("gaps", table, on_bad_vectors="null")
    gaps = LanceDatabase.open(where, "gaps", fingerprint=MARK)
    for kind, message, ask in (
        (FileNotFoundError, "is no LanceDB folder", lambda: LanceDatabase.open("nowhere", "t")),
        (FileNotFoundError, "'nope'.*not found", lambda: LanceDatabase.open(where, "nope")),
        (ValueError, "'photos' of .*exists", lambda: LanceDatabase.create(where, "photos", ours)),
        (ValueError, "column 'vector' of its own", lambda: LanceDatabase.create(where, "n", named)),
        (
            ValueError,
            "column 'clip' of the table 'photos' is not there.*file, label, year, box, vector",
            lambda: LanceDatabase.open(where, "photos", vector="clip"),
        ),
        (
            ValueError,
            "column 'year' .* is int64, expected a fixed-size list",
            lambda: LanceDatabase.open(where, "photos", vector="year"),
        ),
        (
            ValueError,
            "encoder='other' against encoder='random'",
            lambda: LanceDatabase.open(where, "photos", fingerprint=other),
        ),
        (
            ValueError,
            "dim=7",
            lambda: LanceDatabase.open(where, "gaps", fingerprint=narrow),
        ),
        (ValueError, "filter 'color = 1'.*color", lambda: lance.where("color = 1")),
        (ValueError, "filter 'year >'", lambda: lance.where("year >")),
        (ValueError, "filter \"year = 'x'\"", lambda: lance.where("year = 'x'")),
        (ValueError, "k=501 is more than", lambda: lance.search(queries(1), 501)),
        (ValueError, "some rows .* no 'vector'", lambda: gaps.embeddings(torch.tensor([1]))),
        (ValueError, "found 1 of k=2", lambda: gaps.search(queries(1), 2)),
    ):
        with pytest.raises(kind, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert ".rs:" not in str(caught.value)
    assert len(LanceDatabase.create(where, "photos", ours.subset([1, 2]), overwrite=True)) == 2
    assert not (tmp_path / "nowhere").exists()


def test_without_lancedb_the_way_to_it_is_named(tmp_path, ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ValueError, match=r"pip install 'retrodiff\[lance\]'"):
        LanceDatabase.create(tmp_path, "t", ours)
