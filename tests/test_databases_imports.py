"""Databases from what users have: arrays, published layouts, tars, parquet; unions of them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_databases import Pooled, pictures

from retrodiff.databases import (
    ArrayDatabase,
    DatasetImages,
    Images,
    ParquetImages,
    Part,
    Tars,
    Union,
    UnreadableImage,
    build_database,
    clip_retrieval_parts,
    import_embeddings,
    npy_parts,
    open_database,
    rdm_parts,
)
from retrodiff.interfaces import Database, Fingerprint, Query

MARK = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=6)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float16)


def png(image: torch.Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()


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


def test_rdm_layout_by_number_not_by_name(tmp_path):
    order = []
    for part in (10, 2, 0, 1):
        rows = vectors(3, part)
        ids = [f"img{part}-{i}" for i in range(3)]
        boxes = np.arange(12).reshape(3, 4) + part
        name = tmp_path / f"3x6-part_{part}.npz"
        np.savez(name, embedding=rows, img_id=ids, patch_coords=boxes)
    for part in (0, 1, 2, 10):
        order += [f"img{part}-{i}" for i in range(3)]
    database = import_embeddings(tmp_path / "d", rdm_parts(tmp_path), MARK, progress=False)
    assert database.column("image_id").tolist() == order
    assert database.records(torch.tensor([11]))[0]["box"] == [18, 19, 20, 21]
    last = database.embeddings(torch.tensor([9, 10, 11]))
    assert np.array_equal(last.numpy(), vectors(3, 10).astype(np.float32))


def test_clip_retrieval_layout(tmp_path):
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    for i in (0, 1, 10, 2):
        np.save(tmp_path / f"img_emb/img_emb_{i}.npy", vectors(4, i))
        names = [f"{i}/{j}.jpg" for j in range(4)]
        table = pa.table({"image_path": names, "caption": ["c"] * 4})
        pq.write_table(table, tmp_path / f"metadata/metadata_{i}.parquet")
    mark = Fingerprint(**{**MARK.__dict__, "scale": "unit"})
    parts = clip_retrieval_parts(tmp_path)
    database = import_embeddings(tmp_path / "d", parts, mark, shard_rows=5, progress=False)
    assert database.column("file")[[0, 4, 8, 12]].tolist() == [f"{i}/0.jpg" for i in (0, 1, 2, 10)]
    assert database.fingerprint.scale == "unit"
    assert database.where("caption == 'c'").rows.tolist() == list(range(16))


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
        list(rdm_parts(tmp_path))


# --- archives ------------------------------------------------------------------------------------


def write_tar(path, members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def test_tars(tmp_path):
    images = pictures(4)
    about = json.dumps({"width": 8, "url": "u", "exif": {"a": 1}}).encode()
    write_tar(
        tmp_path / "0.tar",
        [
            ("a/000.png", png(images[0])),
            ("a/000.txt", b"a dog\n"),
            ("a/000.json", about),
            ("a/001.png", b"broken"),
            ("a/002.json", b"{}"),
        ],
    )
    write_tar(tmp_path / "1.tar", [("000.png", png(images[1])), ("000.cls", b"7")])
    source = Tars([tmp_path / "0.tar", tmp_path / "1.tar"], {"licence": "CC0"})
    with pytest.warns(UserWarning, match=r"1 skipped: 0\.tar:a/001 \(not an image\)"):
        database = build_database(tmp_path / "d", source, Pooled(), thumbnails=8, progress=False)
    record = database.records(torch.tensor([0]))[0]
    assert {name: value for name, value in record.items() if value is not None} == {
        "key": "0.tar:a/000",
        "width": 8,
        "url": "u",
        "caption": "a dog",
        "licence": "CC0",
    }
    assert database.column("label").tolist() == [None, "7"]
    assert torch.equal(database.image(1), images[1] / 127.5 - 1)


def test_tars_refuse(tmp_path):
    for name in ("../a.png", "/etc/a.png"):
        write_tar(tmp_path / "x.tar", [(name, png(pictures(1)[0]))])
        with pytest.raises(ValueError, match="points outside the archive"):
            Tars([tmp_path / "x.tar"])
    write_tar(tmp_path / "x.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.png", b"3")])
    with pytest.raises(ValueError, match=r"'a\.png' is there twice"):
        Tars([tmp_path / "x.tar"])
    (tmp_path / "x.tar").write_bytes(b"not a tar at all")
    with pytest.raises(ValueError, match="not a whole, uncompressed tar"):
        Tars([tmp_path / "x.tar"])
    write_tar(tmp_path / "x.tar", [("a.txt", b"1")])
    with pytest.raises(ValueError, match="no pictures"):
        Tars([tmp_path / "x.tar"])


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_column(tmp_path, struct):
    images = pictures(5)
    data = [png(image) for image in images]
    column = [{"bytes": d, "path": None} for d in data] if struct else data
    table = pa.table({"image": column, "label": list("abcde"), "boxes": [[1]] * 5})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = ParquetImages([tmp_path / "a.parquet"])
    items = [source.read(i)[0] for i in (4, 0, 1, 2, 3)]
    assert [item.record for item in items] == [{"label": c} for c in "eabcd"]
    assert torch.equal(items[0].image, images[4])
    database = build_database(tmp_path / "d", source, Pooled(), workers=1, progress=False)
    assert database.labels.tolist() == list("abcde")
    with pytest.raises(ValueError, match="no column 'picture'; columns: image, label, boxes"):
        ParquetImages([tmp_path / "a.parquet"], "picture")


def test_dataset_rows():
    images = pictures(4)
    array = images[1].permute(1, 2, 0).numpy()
    rows = [
        {"image": Image.fromarray(images[0].permute(1, 2, 0).numpy()), "label": 3, "extra": [1]},
        {"image": array, "label": 4, "extra": [1]},
        {"image": {"bytes": png(images[2])}, "label": 5, "extra": [1]},
        {"image": None, "label": 6, "extra": [1]},
    ]
    source = DatasetImages(rows)
    for i in range(3):
        [item] = source.read(i)
        assert torch.equal(item.image, images[i])
        assert item.record == {"number": i, "label": 3 + i}
    with pytest.raises(UnreadableImage, match="is empty"):
        source.read(3)
    with pytest.raises(ValueError, match="no column 'img'; columns: image, label, extra"):
        DatasetImages(rows, "img")


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
