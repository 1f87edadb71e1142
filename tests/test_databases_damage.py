"""Damaged and hostile files of databases, indexes, tables: one clear line, never wrong rows."""

import functools
import hashlib
import importlib.util
import json
import operator
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_databases import RECORDS, Pooled, pictures

from retrodiff.databases import (
    ArrayDatabase,
    ImageFolder,
    Images,
    Union,
    append_to_database,
    build_database,
    delete_rows,
    open_database,
)
from retrodiff.databases.filters import parse_filter
from retrodiff.databases.manifest import Manifest
from retrodiff.databases.record_files import RecordFiles
from retrodiff.databases.sql import check_condition
from retrodiff.databases.storable import storable
from retrodiff.disk.hashed import about_file, read_hashed, write_hashed
from retrodiff.disk.tensors import map_file, map_tensors, write_hashed_tensors, write_tensors
from retrodiff.indexes import Annoy, Exact, Faiss, USearch
from retrodiff.indexes.saved import UncheckedIndex
from retrodiff.interfaces import Query
from retrodiff.retrieval import NearestNeighbors, NeighborCounts, open_neighbor_table
from retrodiff.retrieval import neighbor_table as make_table
from retrodiff.testing import small_database

ASKED = Query(torch.randn(4, 48, generator=torch.Generator().manual_seed(1)))


def one_line(caught) -> str:
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A database of four shards, with deleted rows, thumbnails and two indexes."""
    path = tmp_path_factory.mktemp("whole") / "d.rdb"
    source = Images(pictures(40), RECORDS[:40])
    options = {"shard_rows": 16, "thumbnails": 8, "progress": False}
    build_database(path, source, Pooled(), **options)
    append_to_database(path, Images(pictures(6), RECORDS[:6]), Pooled(), progress=False)
    database = delete_rows(path, [3, 20])
    database.build_index(Annoy(trees=4, components=8), progress=False)
    database.build_index(USearch(), progress=False)
    return path


@pytest.fixture
def path(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "d.rdb")
    return tmp_path / "d.rdb"


def rewrite(path: Path, change) -> None:
    """Changes a manifest as somebody who knows how to hash would."""
    file = path / "manifest.json"
    value = read_hashed(file, "a manifest", "")
    change(value)
    write_hashed(file, value)


def change_byte(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


# --- manifests -----------------------------------------------------------------------------------


def test_a_changed_character_of_a_manifest_is_found(path):
    file = path / "manifest.json"
    data = file.read_bytes()
    wrong = "was changed since|is not a database manifest|a damaged database manifest|upgrade"
    for at in range(0, len(data), 41):
        for bit in (1, 4):
            broken = bytearray(data)
            broken[at] ^= bit
            if json_of(broken) in (None, json_of(data)):
                continue
            file.write_bytes(broken)
            with pytest.raises(ValueError, match=wrong) as caught:
                Manifest.read(file)
            one_line(caught)


def json_of(data: bytes):
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return None if not isinstance(value, dict) or "sha256" not in value else value


def set_to(*keys, value):
    def change(manifest):
        inner = manifest
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


SHA = "a" * 64
WRONG = {
    "fingerprint": [None, [], "x", {}, {"encoder": "e"}],
    ("fingerprint", "dim"): [None, "48", 48.0, True, 0, -1, 2**70],
    ("fingerprint", "encoder"): [None, 3, ["pooled"]],
    ("fingerprint", "scale"): [None, "other", 1],
    ("fingerprint", "extra"): ["x"],
    "rows": [None, "46", 45, 2**70, -1],
    "shards": [None, {}, "x", [None], [[]]],
    ("shards", 0, "rows"): [None, "16", 0, -16, 16.0, True, 2**70],
    ("shards", 0, "digest"): [None, 3, "x", SHA[:-1]],
    ("shards", 0, "next"): [None, [], [1], [1, 2, 3], [-1, 0], ["1", 0], 7],
    ("shards", 0, "source"): [None, -1, 2, "0", 10**9],
    ("shards", 0, "files"): [None, [], {}, "x"],
    ("shards", 0, "files", "../x"): [{"bytes": 1, "sha256": SHA}],
    ("shards", 0, "files", "/etc/passwd"): [{"bytes": 1, "sha256": SHA}],
    ("shards", 0, "files", "vectors-9.safetensors"): [{"bytes": 1, "sha256": SHA}],
    ("shards", 0, "files", "vectors-000000.safetensors", "bytes"): [None, -1, "1", 2**70],
    ("shards", 0, "files", "vectors-000000.safetensors", "sha256"): [None, "", SHA + "\n"],
    "settings": [None, [], "x"],
    "sources": [None, {}, [], [None]],
    "skipped": [None, {}, [3], [["a"]], [["a", "b", "c"]], [["a", 3]]],
    "deleted": [3, [], {}, {"file": "../x", "rows": 1, "bytes": 1, "sha256": SHA}],
    ("deleted", "rows"): [None, 0, -1, 10**9, "2"],
    "shared": [3, [], {}, {"columns": [3], "indexes": {}}, {"columns": [], "indexes": {"..": {}}}],
    "seals": [3, [], "x"],
    "format": [None, "1", [], 1.0, -1],
}


@pytest.mark.parametrize("keys", WRONG, ids=str)
def test_manifests_of_wrong_types(keys, path):
    file = path / "manifest.json"
    good = file.read_bytes()
    for value in WRONG[keys]:
        file.write_bytes(good)
        rewrite(path, set_to(*(keys if isinstance(keys, tuple) else (keys,)), value=value))
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            open_database(path)
        assert len(one_line(caught)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": NaN}',
        '{"format": 1e999}',
        '{"format": ' + "9" * 10_000 + "}",
        '"x"',
        "",
        "\0\0",
    ],
    ids=range(8),
)
@pytest.mark.parametrize("name", ["manifest.json", "indexes/annoy/index.json"])
def test_hostile_json(text, name, path):
    (path / name).write_text(text)
    with pytest.raises(ValueError, match="is not a") as caught:
        open_database(path, "annoy")
    one_line(caught)


def test_a_file_by_hand_is_read_without_its_hash(path):
    file = path / "manifest.json"
    value = json.loads(file.read_text())
    del value["sha256"]
    file.write_text(json.dumps(value | {"skipped": [["a", "b"]]}))
    assert open_database(path).manifest.skipped == (("a", "b"),)


# --- files of a database -------------------------------------------------------------------------


def test_verify_looks_at_every_file(path):
    database = open_database(path)
    assert database.verify() == []
    for file in files_below(path):
        if file.name == "manifest.json":
            continue
        name = file.relative_to(path).as_posix()
        good = file.read_bytes()
        shorter = functools.partial(os.truncate, length=len(good) - 2)
        for change in (change_byte, shorter, Path.unlink):
            change(file)
            found = database.verify()
            assert any(file.name in line or name in line for line in found), (name, found)
            file.write_bytes(good)
    assert database.verify() == []


def test_verify_finds_files_that_do_not_fit_each_other(path):
    """Whoever changes a file and its hash is found by what the file holds."""

    def replaced(name, write):
        write(path / name)
        rewrite(path, lambda v: find(v, name).update(about_file(path / name)))
        found = open_database(path).verify()
        assert len(found) == 1, found
        return found[0]

    def find(manifest, name):
        return next(shard["files"][name] for shard in manifest["shards"] if name in shard["files"])

    vectors = map_tensors(path / "vectors-000001.safetensors")
    wrong = {**vectors, "norms": vectors["norms"] * 1.01}
    found = replaced("vectors-000001.safetensors", lambda f: write_tensors(f, wrong))
    assert "norms of other rows" in found
    write_tensors(path / "vectors-000001.safetensors", vectors)
    rewrite(path, lambda v: find(v, "vectors-000001.safetensors").update(
        about_file(path / "vectors-000001.safetensors")))  # fmt: skip
    small = map_tensors(path / "thumbnails-000000.safetensors")
    far = {**small, "offsets": small["offsets"] * 2}
    found = replaced("thumbnails-000000.safetensors", lambda f: write_tensors(f, far))
    assert "pictures that lie outside" in found
    with pytest.raises(ValueError, match=r"thumbnails-000000.safetensors is damaged"):
        open_database(path).image(9)


def test_records_are_compared_before_they_are_read(path):
    file = path / "records-000001.parquet"
    change_byte(file, 40)
    database = open_database(path)
    assert database.records(torch.tensor([0]))[0]["file"] == "f0.png"
    for ask in (lambda: database.records(torch.tensor([18])), lambda: database.where("year > 3")):
        with pytest.raises(ValueError, match=r"records-000001.*SHA-256 differs") as caught:
            ask()
        one_line(caught)


def test_deleted_rows_are_compared_when_a_database_is_opened(path):
    (file,) = path.glob("deleted-*")
    change_byte(file)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        open_database(path)
    for rows in ([20, 3], [3, 3], [-1, 3], [3, 46], [3]):
        write_tensors(file, {"rows": torch.tensor(rows)})
        rewrite(path, lambda v, f=file: v["deleted"].update(about_file(f)))
        with pytest.raises(ValueError, match="deleted-") as caught:
            open_database(path)
        one_line(caught)


def records_of(tmp_path, table, rows=None, **options) -> RecordFiles:
    from retrodiff.databases.manifest import Shard

    pq.write_table(table, tmp_path / "records", **options)
    shard = Shard(rows or len(table), SHA, {"vectors": {}, "records": {}}, (0, 0), 0)
    return RecordFiles([shard], lambda name: tmp_path / name)


def test_records_come_back_as_they_were_written(tmp_path):
    table = pa.table(
        {
            "text": ["a", None, "a"], "n": [1, None, 3], "x": [0.5, 1.5, None], "b": [True] * 3,
            "list": [["p", "q"], [], None], "struct": [{"u": "v"}, None, {"u": None}],
            "bytes": [b"1", b"", None],
        }
    )  # fmt: skip
    read = records_of(tmp_path, table).read(0)
    assert read.to_pylist() == table.to_pylist()
    assert read.schema.equals(pq.read_table(tmp_path / "records").schema)


def test_records_do_not_unfold_to_gigabytes(tmp_path):
    long, n = "x" * 200_000, 20_000
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * n, pa.int32()), [long])
    for column in (
        texts,
        pa.ListArray.from_arrays([0, n], texts),
        pa.StructArray.from_arrays([texts], ["u"]),
    ):
        table = pa.table({"a": column})
        files = records_of(tmp_path, table, compression="zstd", store_schema=False)
        before = pa.total_allocated_bytes()
        with pytest.raises(ValueError, match=r"unfold to more than 2,147,483,648 bytes") as caught:
            files.read(0)
        one_line(caught)
        assert pa.total_allocated_bytes() - before < 2**20
    shared = pa.table({"a": [f"{long}{i}" for i in range(50)]})
    options = {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}
    with pytest.raises(ValueError, match="DELTA_BYTE_ARRAY, as no record is"):
        records_of(tmp_path, shared, **options).read(0)
    with pytest.raises(ValueError, match="records of 3 rows, its manifest says 5"):
        records_of(tmp_path, pa.table({"a": [1, 2, 3]}), rows=5).read(0)


# --- files of tensors ----------------------------------------------------------------------------

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "overlap": {"a": F32, "b": F32 | {"data_offsets": [4, 12]}},
    "hole": {"a": F32, "b": F32 | {"data_offsets": [12, 20]}},
    "negative": {"a": F32 | {"data_offsets": [-8, 0]}},
    "backward": {"a": F32 | {"data_offsets": [8, 0]}},
    "beyond the end": {"a": F32 | {"data_offsets": [0, 2**40], "shape": [2**38]}},
    "not to the end": {"a": F32},
    "shape of another size": {"a": F32 | {"shape": [3]}},
    "shape without end": {"a": F32 | {"shape": [2**62, 2**62]}},
    "negative shape": {"a": F32 | {"shape": [-2]}},
    "unknown type": {"a": F32 | {"dtype": "F99"}},
    "numbers in metadata": {"__metadata__": {"a": 1}, "a": F32},
    "no object": [1, 2],
    "text for offsets": {"a": F32 | {"data_offsets": "08"}},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_have_the_rules_of_the_library(kind, tmp_path):
    text = json.dumps(HEADERS[kind]).encode()
    data = bytes(8 if kind != "not to the end" else 9)
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=r"is damaged or no file of tensors .*: restore it") as one:
        map_file(tmp_path / "x")
    one_line(one)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 10**8, 101])
def test_a_header_longer_than_its_file(length, tmp_path):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 99)
    with pytest.raises(ValueError, match="108 bytes cannot hold the header that it claims"):
        map_file(tmp_path / "x")
    one = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    two = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    for text in (one + two, b"[" * 100_000, b'{"a":' * 100_000):
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(ValueError, match="is damaged or no file of tensors") as caught:
            map_file(tmp_path / "x")
        one_line(caught)
    for name in ("", "nothing"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"not a file|is missing"):
            map_file(tmp_path / name)


def test_every_byte_of_a_hashed_file_counts(tmp_path):
    tensors = {"a": torch.randn(3, 2).half(), "é": torch.arange(5, dtype=torch.uint8)}
    write_hashed_tensors(tmp_path / "x", tensors, {"k": "v"})
    found = map_file(tmp_path / "x", hashed=True)
    assert found.metadata == {"k": "v"}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    data = (tmp_path / "x").read_bytes()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 2
        (tmp_path / "y").write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged"):
            map_file(tmp_path / "y", hashed=True)


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: read.append(1) or digest(*a))
    from retrodiff.disk.hashed import check_file

    (tmp_path / "x").write_bytes(b"abc")
    about = about_file(tmp_path / "x")
    read.clear()
    check_file(tmp_path / "x", about, "")
    check_file(tmp_path / "x", about, "")
    assert len(read) == 1
    (tmp_path / "y").write_bytes(b"abd")
    (tmp_path / "y").replace(tmp_path / "x")
    with pytest.raises(ValueError, match="SHA-256 differs"):
        check_file(tmp_path / "x", about, "")


# --- indexes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Annoy(trees=4), USearch(), Faiss()], ids=lambda r: r.name)
def test_a_damaged_index_is_refused_before_its_library_reads_it(recipe, path, monkeypatch):
    database = open_database(path).build_index(recipe, progress=False)
    expected = database.search(ASKED, 5).indices
    monkeypatch.setattr(type(recipe), "load", None)
    for file in files_below(path / "indexes" / recipe.name):
        good = file.read_bytes()
        for data in (good[:-1], good[: len(good) // 2], b"", good + b"x", good[:8] + b"\xff" * 8):
            file.write_bytes(data)
            with pytest.raises(ValueError, match="build the index again") as caught:
                open_database(path, recipe.name)
            one_line(caught)
        file.unlink()
        with pytest.raises(FileNotFoundError):
            open_database(path, recipe.name)
        file.write_bytes(good)
    monkeypatch.undo()
    assert torch.equal(open_database(path, recipe.name).search(ASKED, 5).indices, expected)


def test_an_index_of_an_earlier_version_says_that_it_is_not_checked(path):
    about = path / "indexes" / "annoy" / "index.json"
    value = {k: v for k, v in json.loads(about.read_text()).items() if k not in ("files", "sha256")}
    about.write_text(json.dumps(value))
    with pytest.warns(UncheckedIndex, match="build it again"):
        assert open_database(path, "annoy").recipe == Annoy(trees=4, components=8)
    assert any(
        "index annoy: was saved without hashes" in line for line in open_database(path).verify()
    )


def test_an_index_of_other_rows_under_these_hashes_is_refused(path, tmp_path):
    """A file that is whole, and holds the wrong number of rows."""
    few = build_database(tmp_path / "few", Images(pictures(9)), Pooled(), progress=False)
    few.build_index(USearch(), progress=False)
    mine = path / "indexes" / "usearch"
    shutil.copy(few.path / "indexes" / "usearch" / "graph.usearch", mine)
    value = read_hashed(mine / "index.json", "", "")
    value["files"]["graph.usearch"] = about_file(mine / "graph.usearch")
    write_hashed(mine / "index.json", value)
    with pytest.raises(ValueError, match="holds 9 rows of width 48, the database 46"):
        open_database(path, "usearch")


def test_files_of_an_index_lie_beside_it(path):
    about = path / "indexes" / "usearch" / "index.json"
    for name in ("../../manifest.json", "/etc/passwd", "scann/../x.npy"):
        value = read_hashed(about, "", "")
        value["files"] = {name: {"bytes": 1, "sha256": SHA}}
        write_hashed(about, value)
        with pytest.raises(ValueError, match="is no file of an index"):
            open_database(path, "usearch")


# --- tables and proposals ------------------------------------------------------------------------


def table_in(path, **options):
    data = torch.randn(23, 8, generator=torch.Generator().manual_seed(0))
    options = {"batch_size": 5, **options}
    return make_table(Query(data), small_database(), 3, NearestNeighbors(), path=path, **options)


def test_a_changed_byte_of_a_table_or_proposal_is_found(tmp_path):
    table_in(tmp_path / "n")
    NeighborCounts.from_table(table_in(None), small_database()).save(tmp_path / "p")
    readers = {"n": lambda f: open_neighbor_table(f, small_database()), "p": NeighborCounts.load}
    for name, read in readers.items():
        whole = read(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        key = data.index(b'"sha256"')  # without it, a file is one of an earlier version
        for at in range(0, len(data), 3):
            (tmp_path / "x").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            if key < at < key + 7:
                found = read(tmp_path / "x")
                assert torch.equal(*(getattr(one, "counts", one) for one in (found, whole)))
                continue
            with pytest.raises(ValueError, match="x") as caught:
                read(tmp_path / "x")
            one_line(caught)


@pytest.mark.parametrize("damage", ["data", "log", "cut", "no log", "header"])
def test_an_unfinished_table_goes_on_after_its_last_intact_batch(damage, tmp_path, monkeypatch):
    retrieve, calls = NearestNeighbors.retrieve, []

    def stopped(self, query, database, k):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(query))
        return retrieve(self, query, database, k)

    monkeypatch.setattr(NearestNeighbors, "retrieve", stopped)
    with pytest.raises(KeyboardInterrupt):
        table_in(tmp_path / "n")
    partial, log = tmp_path / "n.partial", tmp_path / "n.batches.partial"
    if damage == "data":
        change_byte(partial, -4 * 3 * 4)
    elif damage == "log":
        change_byte(log, 70)
    elif damage == "cut":
        partial.write_bytes(partial.read_bytes()[:-4])
    elif damage == "no log":
        log.unlink()
    else:
        change_byte(partial, 20)
    calls.clear()
    monkeypatch.setattr(
        NearestNeighbors,
        "retrieve",
        lambda self, query, database, k: (
            calls.append(len(query)) or retrieve(self, query, database, k)
        ),
    )
    if damage == "header":
        with pytest.raises(ValueError, match=r"n\.partial (is damaged|was made with)") as caught:
            table_in(tmp_path / "n", resume=True)
        one_line(caught)
        return
    if damage == "no log":
        table_in(tmp_path / "n", resume=True)
    else:
        with pytest.warns(UserWarning, match="rows from (5|10) on are computed again"):
            table_in(tmp_path / "n", resume=True)
    assert sum(calls) == {"data": 13, "log": 18, "cut": 13, "no log": 23}[damage]
    assert [file.name for file in tmp_path.iterdir()] == ["n"]
    assert torch.equal(open_neighbor_table(tmp_path / "n", small_database()), table_in(None))


# --- pictures of rows ----------------------------------------------------------------------------


def test_pictures_are_read_only_below_folders_that_the_user_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RETRODIFF_STATE", str(tmp_path / "state"))
    for folder in ("photos", "private"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / folder / "a.png")
    path, private = tmp_path / "d", tmp_path / "private"
    build_database(path, ImageFolder(tmp_path / "photos"), Pooled(), progress=False)
    assert open_database(path).image(0).shape == (3, 8, 8)

    rewrite(path, lambda v: v["sources"][0].update(root=str(private)))
    refused = r"the pictures lie in .*private, says the manifest.*root="
    with pytest.raises(ValueError, match=refused) as caught:
        open_database(path).image(0)
    one_line(caught)
    delete_rows(
        append_to_database(path, ImageFolder(tmp_path / "photos"), Pooled(), progress=False).path,
        [],
    )
    assert open_database(path).image(1).shape == (3, 8, 8)  # what was appended is the user's own
    with pytest.raises(ValueError, match=refused):  # and does not vouch for the rest
        open_database(path).image(0)
    assert open_database(path, root=private).image(0).shape == (3, 8, 8)
    monkeypatch.setenv("RETRODIFF_STATE", str(tmp_path / "another user"))
    with pytest.raises(ValueError, match="root="):
        open_database(path).image(1)

    for name in (str(private / "a.png"), "../private/a.png", "x/../../private/a.png"):
        other = build_database(
            tmp_path / "e",
            Images(pictures(1), [{"file": name}]),
            Pooled(),
            overwrite=True,
            progress=False,
        )
        for opened in (other, open_database(other.path, root=tmp_path / "photos")):
            with pytest.raises(ValueError, match=r"in no folder that you have named.*root="):
                opened.image(0)
    assert ArrayDatabase(
        torch.ones(1, 48), Pooled().fingerprint, [{"file": str(private / "a.png")}]
    ).image(0).shape == (3, 8, 8)  # fmt: skip


# --- filters -------------------------------------------------------------------------------------

DEEP = {
    "names": lambda n: "flag" + " and flag" * n,
    "not": lambda n: "not " * n + "flag",
    "parentheses": lambda n: "(flag and " * n + "flag" + ")" * n,
    "comparisons": lambda n: "a" + " < a" * n,
    "minus": lambda n: "a == " + "-" * n + "1",
    "plus": lambda n: "a == 1" + "+1" * n,
    "attributes": lambda n: "a" + ".b" * n + " == 1",
    "calls": lambda n: "f(" * n + ")" * n,
    "lists": lambda n: "a in " + "[" * n + "]" * n,
    "lambdas": lambda n: "lambda: " * n + "1",
    "ifs": lambda n: "1 if a else " * n + "1",
    "powers": lambda n: "2**" * n + "2",
}


@pytest.mark.parametrize("kind", DEEP)
def test_filters_are_limited_in_depth_and_length(kind):
    table = pa.table({"a": [1, 2], "flag": [True, False]})
    for n in (20, 60, 400, 5_000, *([100_000] if kind in ("names", "not") else [])):
        text, found = DEEP[kind](n), None
        try:
            expression, _ = parse_filter(text, table.column_names)
            found = len(table.filter(expression))
        except ValueError as error:
            said = str(error)
        if found is None:
            assert len(said) < 1000
            assert "\n" not in said
        else:
            assert n <= 400


def test_a_list_of_a_filter_may_be_long():
    rows = ", ".join(map(str, range(50_000)))
    expression, _ = parse_filter(f"a in [{rows}]", ["a"])
    assert len(pa.table({"a": [1, 60_000]}).filter(expression)) == 1
    with pytest.raises(ValueError, match="more than 1,048,576: select the rows by number"):
        parse_filter(f"a in [{rows * 5}]", ["a"])
    with pytest.raises(ValueError, match="a filter is a text"):
        parse_filter(3, ["a"])


ESCAPES = [
    "true) OR (true", "true) OR (true) OR (true", ")", "(", "a = 1 -- x", "a = 1 /* x", "a = 1; b",
    "a = 'x", 'a = "x', "a = `x", "true) --", "a = 'x\\') OR (true OR a = \\'", "[1)", "", "  ",
    "true)\nOR\n(true", "'a' = '') OR ('' = '", "a = $$x$$", "NOT " * 2000 + "true",
    "(" * 17 + "true" + ")" * 17, "a = 1" + " OR a = 1" * 600, "x" * (2**20 + 1), 3, None,
]  # fmt: skip


@pytest.mark.parametrize("text", ESCAPES, ids=range(len(ESCAPES)))
def test_conditions_stand_by_themselves(text):
    with pytest.raises(ValueError, match=r"cannot use the filter|a condition is SQL") as caught:
        check_condition(text)
    assert len(one_line(caught)) < 500


def test_conditions_that_are_whole():
    for text in ("label = 'it''s (' AND year > 2000", '(a OR b) AND "c d" IN (1, 2)', "a IS NULL"):
        check_condition(text)
    check_condition(f"a IN ({', '.join(map(str, range(100_000)))})")


def test_a_view_of_a_lance_table_is_not_left(tmp_path):
    pytest.importorskip("lancedb")
    from retrodiff.databases.lance import LanceDatabase

    lance = LanceDatabase.create(tmp_path, "t", small_database())
    view = lance.where("label = '1'")
    few = len(view)
    assert 0 < few < len(lance)
    for text in (*ESCAPES[:5], "true ORDER BY label", "true LIMIT 100", "true GROUP BY label"):
        with pytest.raises(ValueError, match=r"filter") as caught:
            view.where(text)
        one_line(caught)
    assert len(view.where("true OR true")) == few
    assert len(view.where("label = '1' OR label = '2'")) == few
    again = pickle.loads(pickle.dumps(view))
    assert len(again) == few
    assert again.fingerprint == view.fingerprint


# --- numbers -------------------------------------------------------------------------------------


def test_rows_that_float16_cannot_hold_are_refused():
    def store(row):
        return storable(torch.tensor([[1.0] * 48, row]), "e", lambda i: f"row {i}")

    for scale in (1e-6, 1e-8, 1e-20, 1e-40):
        row = (torch.arange(48) % 7 - 3.3) * scale / 3
        with pytest.raises(ValueError, match=r"row 1 by e has norm .*too small for the float16"):
            store(row.tolist())
    stored, _ = store([0.0] * 48)
    assert not stored[1].any()
    row = torch.randn(48, dtype=torch.float64) * 1e-3
    stored, norms = storable(row[None], "e", str)
    assert float((stored[0].double() - row).norm() / row.norm()) < 0.01
    assert abs(float(norms[0]) / float(row.norm()) - 1) < 0.01
    with pytest.raises(ValueError, match="too small for the float16"):
        storable(torch.full((1, 4), 1e-200, dtype=torch.float64), "e", str)
    with pytest.raises(ValueError, match="too small for the float16"):
        ArrayDatabase(torch.full((3, 48), 1e-9), Pooled().fingerprint)


def test_neighbors_and_rows_are_whole_numbers(path):
    database = open_database(path)
    part = database.where("year < 10")
    everything = (
        database,
        part,
        Union(database, part),
        ArrayDatabase(torch.randn(20, 48), Pooled().fingerprint),
    )
    for one in everything:
        expected = one.search(ASKED, 3).indices
        for k in (np.int64(3), np.uint8(3), torch.tensor(3)):
            assert torch.equal(one.search(ASKED, k).indices, expected)
        for k in (0, -1, len(one) + 1, 2.0, float("nan"), "3", None, True - 1):
            with pytest.raises(ValueError, match="k=") as caught:
                one.search(ASKED, k)
            one_line(caught)
        rows = [0, 2]
        for given in (
            rows,
            np.array(rows),
            torch.tensor(rows),
            np.array(rows, np.int32),
            range(0, 3, 2),
        ):
            assert len(one.records(given)) == len(one.subset(given)) == 2
            assert one.embeddings(given).shape == (2, 48)
        for given in ([0.5], torch.tensor([True, False]), [float("nan")], [1 + 2j]):
            for ask in (one.records, one.embeddings, one.subset):
                with pytest.raises(ValueError, match="row numbers") as caught:
                    ask(given)
                one_line(caught)
        for given in ([-1], [len(one)], [2**40], [-(2**40)]):
            for ask in (one.records, one.embeddings, one.subset, lambda r, d=one: d.image(r[0])):
                with pytest.raises(IndexError) as caught:
                    ask(given)
                one_line(caught)
        assert one.image(np.int64(1)).shape[0] == 3 if one is not everything[-1] else True
    none = database.where("year > 1000")
    assert len(none) == 0
    assert none.records([]) == []
    with pytest.raises(ValueError, match="0 rows: there is nothing to search in it"):
        none.search(ASKED, 1)


# --- other processes -----------------------------------------------------------------------------


class Searches(torch.utils.data.Dataset):
    """Searches of every database that it is given, in whatever process."""

    def __init__(self, databases):
        self.databases = databases

    def __len__(self):
        return len(self.databases)

    def __getitem__(self, i):
        return self.databases[i].search(ASKED, 3).indices


def test_databases_go_to_worker_processes(path):
    exact = open_database(path)
    annoy = Annoy(trees=4, components=8)
    array = ArrayDatabase(torch.randn(20, 48), Pooled().fingerprint, index=annoy)
    databases = [
        exact, open_database(path, "annoy"), open_database(path, "usearch"),
        exact.build_index(annoy, save=False, progress=False), open_database(path, Exact(block=7)),
        exact.where("year > 10"), Union(exact, array, weights=[1, 2]), array,
        array.subset([3, 4, 5, 1]),
    ]  # fmt: skip
    expected = Searches(databases)
    loader = torch.utils.data.DataLoader(
        expected, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    for i, found in enumerate(loader):
        assert torch.equal(found, expected[i]), databases[i]
    assert len(pickle.dumps(databases[:6])) < 20_000  # rows are opened again, not sent


# --- at random -----------------------------------------------------------------------------------


def fuzzer():
    file = Path(__file__).parents[1] / "benchmarks" / "damaged_files.py"
    spec = importlib.util.spec_from_file_location("damaged_files", file)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["damaged_files"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    ["database", "index annoy", "index usearch", "neighbor table", "proposal", "unfinished table",
     "unfinished build", "unfinished append", "training checkpoint", "encoder"],
)  # fmt: skip
def test_files_damaged_at_random_end_well(name, tmp_path):
    """A sample of `benchmarks/damaged_files.py`."""
    found = fuzzer().run(name, 8, seed=operator.index(1), work=tmp_path)
    assert found["faults"] == {}
    assert found["refused"] + found["found"] + found["right"] == 8
