"""Parquet files with an embedding column as databases: the same rows as ours; damage is named."""

import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from memory_peak import at_most
from PIL import Image

from retrodiff.databases import (
    ArrayDatabase,
    LanceDatabase,
    ParquetDatabase,
    Union,
    open_database,
    parquet,
)
from retrodiff.databases.marks import marked
from retrodiff.indexes import Annoy
from retrodiff.interfaces import Database, Fingerprint, Query
from retrodiff.retrieval import ExcludeGroup, NearestNeighbors, NeighborCounts, Uniform
from retrodiff.testing import check_database, check_proposal, check_retriever

DIM, ROWS = 6, 50
MARK = Fingerprint(encoder="random", weights="w", preprocessing="none", dim=DIM)
RECORDS = [
    {"file": f"f{i}.png", "label": "cat dog bird".split()[i % 3], "year": i, "tags": [i, 0]}
    for i in range(ROWS)
]
VALUES = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)) * 7
LIST = pa.list_(pa.float32())
KINDS = {
    "list of float32": LIST,
    "list of float64": pa.list_(pa.float64()),
    "list of float16": pa.list_(pa.float16()),
    "large list": pa.large_list(pa.float32()),
    "fixed-size list": pa.list_(pa.float32(), DIM),
}


def table(rows=slice(None), kind=LIST, values=VALUES) -> pa.Table:
    half = kind.value_type == pa.float16()
    numbers = values[rows].numpy().astype(np.float16 if half else float)
    records = pa.Table.from_pylist(RECORDS[rows])
    return records.append_column("embedding", pa.array(list(numbers), kind))


def files(folder, kind=LIST, mark=None):
    """Twelve rows a file, five a row group; the tenth file comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(5):
        part = table(slice(12 * number, 12 * number + 12), kind)
        if mark is not None:
            part = part.cast(marked(part.schema, mark))
        pq.write_table(part, folder / f"{number + 6}.parquet", row_group_size=5)
    return folder


@pytest.fixture
def ours() -> ArrayDatabase:
    return ArrayDatabase(VALUES, MARK, RECORDS)


@pytest.fixture
def theirs(tmp_path) -> ParquetDatabase:
    return ParquetDatabase.open(files(tmp_path / "p"), fingerprint=MARK)


def queries(n: int) -> Query:
    return Query(torch.randn(n, DIM, generator=torch.Generator().manual_seed(1)))


def same(found, expected) -> None:
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.embeddings, expected.embeddings)
    torch.testing.assert_close(found.similarity, expected.similarity, atol=1e-6, rtol=0)


def test_contracts(theirs):
    assert isinstance(theirs, Database)
    check_database(theirs)
    check_database(theirs.where("label != 'cat'"))
    check_retriever(NearestNeighbors(), theirs)
    check_proposal(Uniform(), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_database(tmp_path, ours, kind):
    theirs = ParquetDatabase.open(files(tmp_path / "p", KINDS[kind]), fingerprint=MARK)
    assert len(theirs) == ROWS
    assert theirs.fingerprint == ours.fingerprint
    rows = torch.tensor([[49, 0, 13], [12, 12, 5]])
    assert torch.equal(theirs.embeddings(rows), ours.embeddings(rows))
    assert theirs.records(rows.flatten()) == ours.records(rows.flatten())
    assert theirs.columns == ours.columns
    assert theirs.table(["year", "file"]).equals(ours.table(["year", "file"]))
    assert theirs.labels.tolist() == ours.labels.tolist()
    for k in (1, 7, ROWS):
        same(theirs.search(queries(9), k), ours.search(queries(9), k))


def test_it_is_a_part_like_any_other(ours, theirs):
    condition = "year > 9 and label == 'dog'"
    few, chosen = theirs.where(condition), ours.where(condition)
    assert few.fingerprint == chosen.fingerprint
    assert few.records([0, 3]) == chosen.records([0, 3])
    both, expected = Union(theirs, ours.subset([5])), Union(ours, ours.subset([5]))
    same(both.search(queries(5), 9), expected.search(queries(5), 9))
    counts = NeighborCounts.fit(queries(5), theirs, 4)
    assert counts.rows.tolist() == NeighborCounts.fit(queries(5), ours, 4).rows.tolist()
    asked = Query(ours.embeddings(torch.tensor([3])), ids=torch.tensor([3]))
    found = ExcludeGroup(NearestNeighbors(), "label").retrieve(asked, theirs, 4)
    assert all(record["label"] != "cat" for record in theirs.records(found.indices[0]))
    again = pickle.loads(pickle.dumps(theirs))
    same(again.search(queries(5), 9), ours.search(queries(5), 9))
    assert again.records([4]) == ours.records([4])


def test_addresses(tmp_path, ours):
    place = files(tmp_path / "p", mark=MARK)
    for database in (
        open_database(f"parquet://{place}"),
        open_database(f"parquet://{place}", "exact", fingerprint=MARK),
        ParquetDatabase.open(place),
    ):
        assert database.fingerprint == ours.fingerprint
    assert len(open_database(f"parquet://{place}/6.parquet")) == 12
    other = Fingerprint(encoder="other", weights="w", preprocessing="none", dim=DIM)
    bare = files(tmp_path / "bare")
    for kind, message, ask in (
        (ValueError, "disagree: encoder='other' against", {"path": place, "fingerprint": other}),
        (ValueError, "6.parquet does not say which encoder made.*fingerprint=", {"path": bare}),
        (ValueError, "is searched exactly", {"path": place, "index": Annoy(trees=2)}),
        (FileNotFoundError, "does not exist", {"path": tmp_path / "nowhere"}),
        (FileNotFoundError, "holds no parquet files", {"path": tmp_path}),
    ):
        ask["path"] = f"parquet://{ask['path']}"
        if kind is FileNotFoundError and ask["path"].endswith(str(tmp_path)):
            (tmp_path / "empty").mkdir()
            ask["path"] += "/empty"
        with pytest.raises(kind, match=message) as error:
            open_database(**ask)
        assert "\n" not in str(error.value)
    later = table(slice(0, 9))
    pq.write_table(later.cast(marked(later.schema, other)), place / "7.parquet")
    with pytest.raises(ValueError, match=r"7\.parquet disagree: encoder='random' against"):
        open_database(f"parquet://{place}")
    with pytest.raises(ValueError, match="write parquet://FOLDER"):
        open_database("parquet:folder")


def test_a_fingerprint_that_is_handed_to_open_database_is_compared(tmp_path):
    from retrodiff.databases import Part, import_embeddings

    import_embeddings(tmp_path / "d", [Part(VALUES.numpy())], MARK, progress=False)
    assert len(open_database(tmp_path / "d", fingerprint=MARK)) == ROWS
    other = Fingerprint(encoder="random", weights="v", preprocessing="none", dim=DIM)
    with pytest.raises(ValueError, match="disagree: weights='v' against weights='w'"):
        open_database(tmp_path / "d", fingerprint=other)


def test_a_lance_table_made_elsewhere_opens_with_a_fingerprint(tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed: retrodiff[lance]")
    rows = table(kind=pa.list_(pa.float32(), DIM)).rename_columns(
        ["file", "label", "year", "tags", "vector"]
    )
    lancedb.connect(tmp_path).create_table("t", rows)
    opened = open_database(f"lance://{tmp_path}/t", fingerprint=MARK)
    assert isinstance(opened, LanceDatabase)
    assert len(opened) == ROWS


def test_files_with_other_columns_and_with_none(tmp_path, ours):
    first = table(slice(0, 10)).drop(["tags", "year"])
    second = table(slice(10, 20)).drop(["tags", "label"])
    second = second.set_column(1, "year", second["year"].cast(pa.string()))
    for name, part in (("1", first), ("2", second)):
        pq.write_table(part, tmp_path / f"{name}.parquet")
    both = ParquetDatabase.open(tmp_path, fingerprint=MARK)
    assert both.records([0, 12]) == [
        {"file": "f0.png", "label": "cat", "year": None},
        {"file": "f12.png", "label": None, "year": "12"},
    ]
    assert both.column("label")[9:11].tolist() == ["cat", None]
    assert len(both.where("label == 'cat'")) == 4
    with pytest.raises(ValueError, match="unknown column 'tags'; columns: file, label, year"):
        both.table(["tags"])
    pq.write_table(table().select(["embedding"]), tmp_path / "1.parquet")
    alone = ParquetDatabase([tmp_path / "1.parquet"], fingerprint=MARK)
    assert alone.records([7]) == [{"number": 7}]
    assert alone.column("number").tolist() == list(range(ROWS))
    category = pa.table(
        {"embedding": table()["embedding"], "c": table()["label"].dictionary_encode()}
    )
    pq.write_table(category, tmp_path / "1.parquet")
    assert ParquetDatabase([tmp_path / "1.parquet"], fingerprint=MARK).records([1]) == [
        {"c": "dog"}
    ]
    pq.write_table(table(slice(0, 0)), tmp_path / "1.parquet")
    assert len(ParquetDatabase([tmp_path / "1.parquet"], fingerprint=MARK)) == 0


def test_images_come_from_files(tmp_path):
    Image.new("RGB", (5, 4), "red").save(tmp_path / "f0.png")
    place = files(tmp_path / "p")
    shown = ParquetDatabase.open(place, fingerprint=MARK, root=tmp_path).image(0)
    assert shown.shape == (3, 4, 5)
    with pytest.raises(ValueError, match="lies in no folder that you have named"):
        ParquetDatabase.open(place, fingerprint=MARK).image(0)


def test_refusals(tmp_path, theirs):
    wide, narrow = ([1.0] * n for n in (DIM + 1, DIM - 1))
    whole = [1.0] * DIM
    lists = {
        "expected a list of floats": pa.array([[1] * DIM] * 2),
        r"holds 12 numbers in 2 rows|holds 7 numbers in row 0": pa.array([wide, narrow]),
        r"holds 7 numbers in 2 rows": pa.array([whole, None]),
        r"lacks a number in one of the rows from 0": pa.array([whole, [*narrow, None]]),
        r"has width 7, fingerprint\.dim=6": pa.array([wide], pa.list_(pa.float32(), DIM + 1)),
        r"row 1 of .* by random holds NaN": pa.array([whole, [*narrow, float("nan")]]),
    }
    for message, column in lists.items():
        pq.write_table(pa.table({"embedding": column}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=message) as error:
            ParquetDatabase([tmp_path / "a.parquet"], fingerprint=MARK)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'clip' of .* is not there.*columns: file, label, year"):
        ParquetDatabase.open(tmp_path / "p", vector="clip", fingerprint=MARK)
    with pytest.raises(ValueError, match="no parquet files"):
        ParquetDatabase([], fingerprint=MARK)
    both = pa.table(
        [table()["embedding"], table()["year"], table()["year"]], ["embedding", "y", "y"]
    )
    pq.write_table(both, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="two columns 'y'"):
        ParquetDatabase([tmp_path / "a.parquet"], fingerprint=MARK)
    with pytest.raises(ValueError, match="k=51 is more than"):
        theirs.search(queries(1), 51)


def test_damage_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, compression="none", row_group_size=10)
    whole = path.read_bytes()
    for cut in (0, 20, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.parquet is no whole parquet file"):
            ParquetDatabase([path], fingerprint=MARK)
    messages = []
    generator = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(whole)
        for at in generator.integers(0, len(whole), 8):
            broken[at] = generator.integers(256)
        path.write_bytes(broken)
        try:
            database = ParquetDatabase([path], fingerprint=MARK)
            database.records(range(0, len(database), 7))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 10
    assert all("a.parquet" in text and "\n" not in text for text in messages)


def test_a_file_that_changes_is_not_read_as_if_it_had_not(tmp_path, theirs):
    place = tmp_path / "p/7.parquet"
    assert theirs.records([0])[0]["year"] == 0
    pq.write_table(table(slice(0, 12)), place)
    os.utime(place, ns=(1, 1))
    with pytest.raises(ValueError, match=r"7\.parquet has changed since it was opened"):
        theirs.records([14])
    same(theirs.search(queries(2), 5), ArrayDatabase(VALUES, MARK).search(queries(2), 5))


def test_files_that_would_take_far_more_memory_than_their_size(tmp_path, monkeypatch):
    path, dim = tmp_path / "a.parquet", 512
    mark = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=dim)

    def write(rows, **options):
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(rows * dim, np.float32)), dim)
        texts = options.pop("texts", None)
        made = pa.table({"embedding": values} | ({} if texts is None else {"t": texts}))
        pq.write_table(made, path, **options)

    write(70_000, row_group_size=70_000)
    with at_most(64), pytest.raises(ValueError, match=r"would decompress \d+ bytes to 286720000"):
        ParquetDatabase([path], fingerprint=mark)
    write(20_000, row_group_size=1000)
    assert len(ParquetDatabase([path], fingerprint=mark)) == 20_000
    monkeypatch.setattr(parquet, "MOST", 2**20)
    with at_most(64), pytest.raises(ValueError, match=r"would unfold from \d+ bytes to 81920000"):
        ParquetDatabase([path], fingerprint=mark)
    monkeypatch.undo()

    def repeated(rows):
        return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 10**6])

    write(20, texts=repeated(20))
    assert len(ParquetDatabase([path], fingerprint=mark).records([0])[0]["t"]) == 10**6
    write(10_000, texts=repeated(10_000))
    with at_most(100), pytest.raises(ValueError, match="its texts unfold to more than"):
        ParquetDatabase([path], fingerprint=mark).records([0])
    encoding = {"t": "DELTA_BYTE_ARRAY"}
    write(1, texts=["x"], use_dictionary=False, column_encoding=encoding)
    with pytest.raises(ValueError, match="column t is stored as DELTA_BYTE_ARRAY"):
        ParquetDatabase([path], fingerprint=mark)
