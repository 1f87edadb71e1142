"""Databases from embeddings that exist: arrays, published layouts, interruption; unions of them."""

import collections
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_databases import Pooled, files_of, pictures

from retrodiff.databases import (
    ArrayDatabase,
    Images,
    Part,
    Union,
    append_to_database,
    build_database,
    clip_retrieval_parts,
    import_embeddings,
    nn_memory_counts,
    npy_parts,
    open_database,
    open_parts,
    rdm_parts,
)
from retrodiff.databases.build.readers import NpzArray, ParquetRows
from retrodiff.interfaces import Database, Fingerprint, Query
from retrodiff.retrieval import NeighborCounts

MARK = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=6)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float16)


def unit_vectors(n: int, seed: int = 0) -> np.ndarray:
    rows = vectors(n, seed).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


# --- embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_rows", [4, 7, 1000])
def test_rows_are_neither_lost_nor_reordered(tmp_path, shard_rows):
    arrays = [vectors(n, n) for n in (5, 1, 30, 8)]
    parts = [Part(a, [{"at": f"{i} {j}"} for j in range(len(a))]) for i, a in enumerate(arrays)]
    database = import_embeddings(tmp_path / "d", parts, MARK, shard_rows=shard_rows, progress=False)
    whole = np.concatenate(arrays)
    assert np.array_equal(database.embeddings(torch.arange(44)).numpy(), whole.astype(np.float32))
    at = [f"{i} {j}" for i, a in enumerate(arrays) for j in range(len(a))]
    assert database.column("at").tolist() == at
    assert [r["at"] for r in database.records(torch.arange(43, -1, -1))] == at[::-1]
    assert database.verify() == []


def save_rdm(folder, numbers, save=np.savez, kind=np.float16) -> None:
    for part in numbers:
        ids = np.array([f"img{part}-{i}" for i in range(3)])
        boxes = np.arange(12).reshape(3, 4) + part
        save(
            folder / f"3x6-part_{part}.npz",
            embedding=vectors(3, part).astype(kind),
            img_id=ids,
            patch_coords=boxes,
        )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("first", [0, 1])
def test_rdm_layout_by_number_not_by_name(save, first, tmp_path):
    numbers = list(range(first, 12))
    save_rdm(tmp_path, numbers[::-1], save, np.float32)
    parts = rdm_parts(tmp_path)
    database = import_embeddings(tmp_path / "d", parts, MARK, shard_rows=7, progress=False)
    assert database.column("image_id").tolist() == [f"img{n}-{i}" for n in numbers for i in "012"]
    assert [r["box"] for r in database.records(torch.tensor([0, len(database) - 1]))] == [
        [first, first + 1, first + 2, first + 3],
        [19, 20, 21, 22],
    ]
    expected = np.concatenate([vectors(3, n) for n in numbers]).astype(np.float32)
    assert np.array_equal(database.embeddings(torch.arange(len(expected))).numpy(), expected)


def test_a_missing_part_and_other_widths_are_named(tmp_path):
    save_rdm(tmp_path, [0, 1, 4, 5])
    with pytest.raises(ValueError, match=r"lacks 3x6-part_2\.npz, 3x6-part_3\.npz, though it goes"):
        rdm_parts(tmp_path)
    save_rdm(tmp_path, [2, 3])
    os.remove(tmp_path / "3x6-part_0.npz")
    assert len(rdm_parts(tmp_path)) == 5
    os.remove(tmp_path / "3x6-part_1.npz")
    with pytest.raises(ValueError, match=r"lacks 3x6-part_1\.npz, though"):
        rdm_parts(tmp_path)
    save_rdm(tmp_path, [1])
    np.savez(tmp_path / "9x5-part_6.npz", embedding=vectors(3)[:, :5])
    with pytest.raises(ValueError, match=r"part_1.npz holds .*\(3, 6\), .*9x5-part_6.npz of .*5\)"):
        rdm_parts(tmp_path)
    np.savez(tmp_path / "9x5-part_6.npz", embedding=vectors(3), img_id=np.arange(2))
    with pytest.raises(ValueError, match=r"part_6\.npz: 3 embeddings, but 2 img_id"):
        rdm_parts(tmp_path)
    os.rename(tmp_path / "9x5-part_6.npz", tmp_path / "9x5-part_05.npz")
    with pytest.raises(ValueError, match="are both part"):
        rdm_parts(tmp_path)


def test_damaged_parts_are_named(tmp_path):
    path = tmp_path / "3x6-part_0.npz"
    save_rdm(tmp_path, [0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"part_0\.npz is truncated, or no npz"):
        rdm_parts(tmp_path)
    np.savez(path, other=vectors(3))
    with pytest.raises(ValueError, match="no npz file with an array 'embedding'"):
        rdm_parts(tmp_path)
    np.savez(path, embedding=vectors(3000))
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[: at + 7] + b"x" + whole[at + 8 :])
    with pytest.raises(ValueError, match=r"part_0\.npz is damaged \(Bad CRC"):
        import_embeddings(tmp_path / "d", rdm_parts(tmp_path), MARK, progress=False)
    assert not (tmp_path / "d").exists()


def test_npz_arrays_read_any_piece(tmp_path):
    arrays = {
        "plain": vectors(50).astype(np.float64),
        "fortran": np.asfortranarray(vectors(50)),
        "flat": np.arange(50),
        "text": np.array([f"{i}" for i in range(50)]),
        "objects": np.array([f"a{i}" for i in range(50)], object),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays, allow_pickle=True)
    for name, array in arrays.items():
        stored = NpzArray(tmp_path / "a.npz", name)
        assert (len(stored), stored.shape) == (50, array.shape)
        for start, end in [(0, 3), (3, 4), (30, 50), (7, 20), (0, 50)]:
            assert np.array_equal(stored[start:end], array[start:end]), name


def test_parquet_rows_read_any_piece(tmp_path):
    table = pa.table({"a": list(range(20_000)), "image_path": ["x"] * 20_000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=9_000)
    rows = ParquetRows(tmp_path / "a.parquet", {"image_path": "file"})
    assert len(rows) == 20_000
    for start, end in [(0, 5), (5, 8_192), (8_192, 8_200), (17_000, 20_000), (1, 3)]:
        piece = rows(start, end)
        assert piece["a"].to_pylist() == list(range(start, end))
        assert piece.column_names == ["a", "file"]


def save_clip_retrieval(folder, numbers) -> None:
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for i in numbers:
        np.save(folder / f"img_emb/img_emb_{i}.npy", unit_vectors(4, i))
        names = [f"{i}/{j}.jpg" for j in range(4)]
        table = pa.table({"image_path": names, "caption": ["c"] * 4})
        pq.write_table(table, folder / f"metadata/metadata_{i}.parquet")


def test_clip_retrieval_layout(tmp_path):
    save_clip_retrieval(tmp_path / "clip", range(11))
    mark = replace(MARK, scale="unit")
    parts, scale = open_parts(tmp_path / "clip")
    assert scale == "unit"
    database = import_embeddings(tmp_path / "d", parts, mark, shard_rows=5, progress=False)
    assert database.column("file")[::4].tolist() == [f"{i}/0.jpg" for i in range(11)]
    assert database.fingerprint.scale == "unit"
    assert database.where("caption == 'c'").rows.tolist() == list(range(44))
    os.remove(tmp_path / "clip/metadata/metadata_10.parquet")
    with pytest.raises(ValueError, match=r"img_emb has a part 10, .*metadata has none"):
        clip_retrieval_parts(tmp_path / "clip")
    os.remove(tmp_path / "clip/img_emb/img_emb_7.npy")
    with pytest.raises(ValueError, match=r"lacks img_emb_7\.npy"):
        clip_retrieval_parts(tmp_path / "clip")


def test_the_unit_scale_is_not_taken_on_trust(tmp_path):
    mark = replace(MARK, scale="unit")
    rows = np.concatenate([unit_vectors(5), vectors(1)])
    with pytest.raises(ValueError, match=r"x\.npy, row 5 has norm .* says scale='unit'"):
        import_embeddings(tmp_path / "d", [Part(rows, name="x.npy")], mark, progress=False)


def test_npy_files_take_the_parquet_files_beside_them(tmp_path):
    for i in (0, 1, 10):
        np.save(tmp_path / f"{i}.npy", vectors(2, i))
        pq.write_table(pa.table({"n": [i, i]}), tmp_path / f"{i}.parquet")
    parts, scale = open_parts(tmp_path)
    assert scale is None
    database = import_embeddings(tmp_path / "d", parts, MARK, progress=False)
    assert database.column("n").tolist() == [0, 0, 1, 1, 10, 10]
    os.remove(tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"1\.parquet is missing"):
        open_parts(tmp_path)
    assert open_parts(tmp_path / "0.npy")[0][0].records is not None
    (tmp_path / "0.npy").write_bytes((tmp_path / "0.npy").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"0\.npy is no whole npy file"):
        open_parts(tmp_path / "0.npy")


def test_big_endian_and_float64_npy(tmp_path):
    np.save(tmp_path / "a.npy", vectors(3).astype(">f8"))
    database = import_embeddings(
        tmp_path / "d", npy_parts([tmp_path / "a.npy"]), MARK, progress=False
    )
    assert np.array_equal(
        database.embeddings(torch.arange(3)).numpy(), vectors(3).astype(np.float32)
    )
    assert database.column("number").tolist() == [0, 1, 2]


def test_imports_refuse(tmp_path):
    bad = vectors(3)
    bad[2, 1] = np.nan
    for parts, message in [
        ([Part(vectors(2)), Part(bad, name="b.npy")], r"b\.npy, row 2 by e holds NaN"),
        ([Part(vectors(2)[:, :5], name="b.npy")], r"b\.npy holds .*dim=6"),
        ([Part(vectors(2), [{}], "b.npy")], "2 embeddings, but 1 records"),
        ([], "at least one row"),
    ]:
        with pytest.raises(ValueError, match=message):
            import_embeddings(tmp_path / "d", parts, MARK, progress=False)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"no \.npz files"):
        rdm_parts(tmp_path)


def test_an_id_that_is_there_twice_is_refused(tmp_path):
    parts = [
        Part(vectors(3), [{"id": "a"}, {"id": "b"}, {}]),
        Part(vectors(2), pa.table({"id": [None, "b"]})),
    ]
    with pytest.raises(ValueError, match="rows 1 and 4 both have id 'b'"):
        import_embeddings(tmp_path / "d", parts, MARK, shard_rows=2, progress=False)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("shard_rows", [3, 100])
def test_columns_of_two_types_are_text(shard_rows, tmp_path):
    parts = [
        Part(vectors(3), pa.table({"n": [1, 2, 3], "s": ["a", "b", "c"]})),
        Part(vectors(2), pa.table({"n": ["1", "2"], "s": ["d", "e"]})),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = import_embeddings(
            tmp_path / "d", parts, MARK, shard_rows=shard_rows, progress=False
        )
    assert found.column("n").tolist() == ["1", "2", "3", "1", "2"]
    assert found.where("n == '1'").rows.tolist() == [0, 3]
    if shard_rows == 3:
        [warning] = caught
        assert "column 'n' is stored as text: it is int64 in" in str(warning.message)


FEW_FILES = """
import resource, sys
import numpy as np, pyarrow.dataset, torch
from pathlib import Path
from retrodiff.databases import import_embeddings, npy_parts, open_database
from retrodiff.interfaces import Fingerprint, Query
import retrodiff.indexes.exact
folder, count = Path(sys.argv[1]), 150
used = len(list(Path("/proc/self/fd").iterdir()))
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
names = [folder / f"{i}" for i in range(count)]
parts = npy_parts([f"{n}.npy" for n in names], [f"{n}.parquet" for n in names])
mark = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=6)
import_embeddings(folder / "d", parts, mark, shard_rows=2, progress=False)
database = open_database(folder / "d")
assert len(database.vectors.parts) == count
assert database.search(Query(torch.randn(2, 6)), 3).indices.shape == (2, 3)
assert database.column("n").tolist() == [i for i in range(count) for _ in range(2)]
assert database.verify() == []
"""


def test_more_parts_and_shards_than_files_may_be_open(tmp_path):
    for i in range(150):
        np.save(tmp_path / f"{i}.npy", vectors(2, i))
        pq.write_table(pa.table({"n": [i, i]}), tmp_path / f"{i}.parquet")
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_npz_arrays_that_are_read_whole_are_let_go(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(vectors(20)))
    array = NpzArray(tmp_path / "a.npz", "x")
    assert np.array_equal(array[0:12], vectors(20)[:12])
    held = weakref.ref(array._whole)
    assert np.array_equal(array[12:20], vectors(20)[12:])
    assert held() is None
    assert np.array_equal(array[3:5], vectors(20)[3:5])


def test_pictures_can_be_appended_to_what_was_imported(tmp_path):
    mark = Pooled().fingerprint
    rows = Pooled().encode_image(pictures(3) / 127.5 - 1).numpy()
    import_embeddings(tmp_path / "d", [Part(rows)], mark, progress=False)
    database = append_to_database(tmp_path / "d", Images(pictures(2)), Pooled(), progress=False)
    assert len(database) == 5
    assert database.verify() == []


# --- interruption --------------------------------------------------------------------------------

KILL = """
import os, signal, sys
from retrodiff.disk import files
from retrodiff.databases import import_embeddings, rdm_parts
from retrodiff.databases import row_files as shards
from retrodiff.databases.build import work
from retrodiff.interfaces import Fingerprint

os.fsync = lambda descriptor: None  # a killed process loses no written pages
mark = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=6)
for folder, out, point, nth in {jobs!r}:
    child = os.fork()
    if child == 0:
        def reached(name, left=[nth]):
            left[0] -= name == point
            if name == point and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        shards.fault_point = work.fault_point = files.fault_point = reached
        import_embeddings(out, rdm_parts(folder), mark, shard_rows=4, progress=False)
        os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), (point, nth, status)
"""


def test_killed_imports_resume_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    source = tmp_path / "parts"
    source.mkdir()
    save_rdm(source, range(1, 8), np.savez_compressed)
    import_embeddings(tmp_path / "whole", rdm_parts(source), MARK, shard_rows=4, progress=False)
    expected = files_of(tmp_path / "whole")
    points = [("vectors written", 1), ("records written", 3), ("shard recorded", 4)]
    points += [("manifest written", 1), ("ready to move", 1)]
    jobs = {(point, n): tmp_path / point for point, n in points}
    code = KILL.format(jobs=[(str(source), str(out), *job) for job, out in jobs.items()])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for (point, _), out in jobs.items():
        assert not out.exists(), point
        with pytest.raises(FileExistsError, match="--resume"):
            import_embeddings(out, rdm_parts(source), MARK, shard_rows=4, progress=False)
        again = import_embeddings(
            out, rdm_parts(source), MARK, shard_rows=4, resume=True, progress=False
        )
        assert files_of(out) == expected, point
        assert len(again) == 21
        assert not out.with_name(out.name + ".partial").exists()


def test_resume_refuses_other_parts_and_opens_what_is_finished(tmp_path):
    def imported(n, mark=MARK, **options):
        parts = [Part(vectors(n), name=f"{n}.npy")]
        return import_embeddings(
            tmp_path / "d", parts, mark, shard_rows=4, resume=True, progress=False, **options
        )

    assert len(imported(9)) == len(imported(9)) == 9
    with pytest.raises(ValueError, match="was begun with rows=9, now rows=10"):
        imported(10)
    with pytest.raises(ValueError, match="was begun with another encoder: weights='v'"):
        imported(9, replace(MARK, weights="v"))


def test_resume_reads_no_finished_part_again(tmp_path, monkeypatch):
    whole = [Part(vectors(6, i), name=f"{i}.npy") for i in range(4)]
    import_embeddings(tmp_path / "whole", whole, MARK, shard_rows=4, progress=False)

    class Rows:
        def __init__(self, rows, breaks):
            self.rows, self.breaks, self.shape, self.first = rows, breaks, rows.shape, None

        def __getitem__(self, piece):
            if self.breaks:
                raise KeyboardInterrupt
            self.first = piece.start if self.first is None else self.first
            return self.rows[piece]

    parts = [Part(Rows(p.embeddings, i == 3), name=p.name) for i, p in enumerate(whole)]
    options = {"shard_rows": 4, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        import_embeddings(tmp_path / "d", parts, MARK, **options)
    again = [Part(Rows(p.embeddings, False), name=p.name) for p in whole]
    import_embeddings(tmp_path / "d", again, MARK, resume=True, **options)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "whole")
    assert again[0].embeddings.first is None


# --- nn_memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", [int, np.int64, "array"])
def test_nn_memory_becomes_a_proposal(kind, protocol, tmp_path):
    counts = {7: 3, 0: 5, 3: 1}
    listed = [0, 7, 3]
    if kind is np.int64:
        counts = {np.int64(k): np.int64(v) for k, v in counts.items()}
    content = {
        "nn_memory": np.array(listed) if kind == "array" else listed,
        "id_count": collections.Counter(counts) if kind is int else counts,
    }
    (tmp_path / "nn_memory.p").write_bytes(pickle.dumps(content, protocol))
    database = import_embeddings(tmp_path / "d", [Part(vectors(8))], MARK, progress=False)
    rows, times = nn_memory_counts(tmp_path / "nn_memory.p", database)
    proposal = NeighborCounts(rows, times, database.fingerprint)
    support, weights = proposal.support(database)
    assert support.tolist() == [0, 3, 7]
    assert weights.tolist() == [5, 1, 3]


def test_nn_memory_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "m"
    database = ArrayDatabase(torch.randn(4, 6), MARK)
    for content, message in [
        ([1], "is no nn_memory"),
        ({"id_count": {}}, "is no nn_memory"),
        ({"id_count": {4: 1}}, "counts row 4, the database has 4 rows"),
        ({"id_count": {-1: 1}}, "counts row -1"),
        ({"id_count": {"a": 1}}, "no whole numbers"),
        ({"id_count": {1: 1}, "nn_memory": [1, 2]}, "lists other rows"),
    ]:
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            nn_memory_counts(path, database)
    path.write_bytes(pickle.dumps({"id_count": {1: 1}})[:-3])
    with pytest.raises(ValueError, match="is damaged, or no pickle"):
        nn_memory_counts(path, database)


@pytest.mark.parametrize("call", [os.system, eval, exec, subprocess.Popen, np.load, open, getattr])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_carries_code_is_refused(call, protocol, tmp_path):
    witness = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return call, (f"touch {witness}",)

    path = tmp_path / "m"
    path.write_bytes(pickle.dumps({"id_count": {0: 1}, "nn_memory": Trap()}, protocol))
    with pytest.raises(ValueError, match=r"wants to call .*: refused, nothing was run") as error:
        nn_memory_counts(path, ArrayDatabase(torch.randn(4, 6), MARK))
    assert "\n" not in str(error.value)
    assert not witness.exists()
    # The same hidden in an array of objects of a released part.
    trapped = np.empty(3, object)
    trapped[:] = [Trap(), 1, 2]
    np.savez(tmp_path / "3x6-part_0.npz", embedding=vectors(3), img_id=trapped, allow_pickle=True)
    with pytest.raises(ValueError, match="wants to call"):
        import_embeddings(tmp_path / "d", rdm_parts(tmp_path), MARK, progress=False)
    assert not witness.exists()


# --- union ---------------------------------------------------------------------------------------


def test_union_is_searched_as_one(tmp_path):
    images = pictures(30)
    records = [{"file": f"f{i}", "label": "ab"[i % 2]} for i in range(30)]
    first = build_database(
        tmp_path / "a", Images(images[:12], records[:12]), Pooled(), thumbnails=8, progress=False
    )
    embeddings = Pooled().encode_image(images / 127.5 - 1)
    second = ArrayDatabase(embeddings[12:], Pooled().fingerprint, [{"year": i} for i in range(18)])
    union = Union(first, second)
    whole = ArrayDatabase(embeddings, Pooled().fingerprint)
    assert isinstance(union, Database)
    assert len(union) == 30
    query = Query(torch.randn(8, 48))
    for k in (1, 5, 30):
        mine, theirs = union.search(query, k), whole.search(query, k)
        assert torch.equal(mine.indices, theirs.indices)
        assert torch.equal(mine.similarity, theirs.similarity)
        assert torch.equal(mine.embeddings, theirs.embeddings)
    assert union.records(torch.tensor([13, 2])) == [{"year": 1}, records[2]]
    assert union.columns == ("file", "label", "year")
    assert union.where("label == 'a'").rows.tolist() == list(range(0, 12, 2))
    assert union.where("year == 17").rows.tolist() == [29]
    assert torch.equal(union.image(3), first.image(3))
    sub = union.subset([29, 0, 12])
    found = sub.search(query, 3).indices
    assert found.sort().values.tolist() == [[0, 1, 2]] * 8
    assert torch.equal(sub.embeddings(torch.tensor([0])), whole.embeddings(torch.tensor([29])))


def test_union_refuses_another_encoder():
    one = ArrayDatabase(torch.randn(3, 48), Pooled().fingerprint)
    other = ArrayDatabase(torch.randn(3, 6), MARK)
    with pytest.raises(ValueError, match="databases 0 and 1 of the union disagree: dim=48 against"):
        Union(one, other)


def test_opening_is_quick_and_reads_nothing(tmp_path):
    rows = np.broadcast_to(vectors(1), (200_000, 6))
    import_embeddings(tmp_path / "d", [Part(rows)], MARK, shard_rows=1000, progress=False)
    database = open_database(tmp_path / "d")
    assert len(database.vectors.parts) == 200
    assert database.vectors.parts[0].dtype == torch.float16
    assert database.search(Query(torch.randn(2, 6)), 3).indices.tolist() == [[0, 1, 2]] * 2
