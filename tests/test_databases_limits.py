"""Files that claim more than they hold are refused before anything is allocated."""

import io
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from memory_peak import at_most

from retrodiff.databases import Part, import_embeddings, npy_parts, open_parts, rdm_parts
from retrodiff.databases.build.readers import NpyArray, NpzArray, ParquetRows, npz_names
from retrodiff.databases.sources.limits import open_parquet, rows_at_a_time
from retrodiff.interfaces import Fingerprint

FINGERPRINT = Fingerprint(encoder="e", weights="w", preprocessing="p", dim=8)


def npy(header: bytes, data: bytes = b"", version: int = 1) -> bytes:
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def described(shape: str, descr: str = "'<f4'", fortran: bool = False) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"
    return text.encode()


HOSTILE = {
    "2^40 rows": npy(described("(1099511627776, 8)"), bytes(320)),
    "2^62 columns": npy(described("(1, 4611686018427387904)"), bytes(320)),
    "beyond 64 bits": npy(described("(99999999999999999999999, 8)"), bytes(320)),
    "negative": npy(described("(-5, 8)"), bytes(320)),
    "negative and even": npy(described("(-5, -8)"), bytes(320)),
    "no rows of many columns": npy(described("(5, 0)"), bytes(320)),
    "2^62 rows of nothing": npy(described("(4611686018427387904, 0)"), bytes(320)),
    "no shape": npy(described("()"), bytes(320)),
    "items of a gigabyte": npy(described("(5, 8)", "'<V1000000000'"), bytes(320)),
    "structures": npy(described("(5,)", "[('a', '<f4', (1000000,))]"), bytes(320)),
    "text for a shape": npy(described("'abc'"), bytes(320)),
    "floats for a shape": npy(described("(5.0, 8)"), bytes(320)),
    "unknown type": npy(described("(5, 8)", "'<q9'"), bytes(320)),
    "nothing": b"",
    "no magic": bytes(100),
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(320),
    "a header cut": npy(described("(5, 8)"))[:30],
    "deep": npy(b"(" * 9000 + b")" * 900, bytes(320)),
    "code": npy(b"{'descr': __import__('os').getcwd(), 'shape': (5, 8)}", bytes(320)),
    "version 9": npy(described("(5, 8)"), bytes(320), 9),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_headers_that_only_claim(tmp_path, kind):
    (tmp_path / "a.npy").write_bytes(HOSTILE[kind])
    with zipfile.ZipFile(tmp_path / "p-part_0.npz", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("embedding.npy", HOSTILE[kind])
    with at_most(64):
        with pytest.raises(ValueError, match=r"a\.npy is no whole npy file") as error:
            npy_parts([tmp_path / "a.npy"])
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=r"part_0\.npz is truncated, or no npz file") as error:
            rdm_parts(tmp_path)
        assert "\n" not in str(error.value)


def test_versions_of_npy_files(tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    for version in (1, 2):
        data = npy(described("(5, 8)"), values.tobytes(), version)
        (tmp_path / "a.npy").write_bytes(data)
        assert np.array_equal(NpyArray(tmp_path / "a.npy")[0:5], values)
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as opened:
            opened.writestr("x.npy", data)
        assert np.array_equal(NpzArray(tmp_path / "a.npz", "x")[0:5], values)


def test_small_zips_of_gigabytes(tmp_path):
    member = npy(described("(1000000, 8)", fortran=True), bytes(32_000_000))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("x.npy", member)
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    with at_most(200):
        assert NpzArray(tmp_path / "a.npz", "x")[0:5].shape == (5, 8)
    whole = (tmp_path / "a.npz").read_bytes()
    size = struct.pack("<I", len(member))
    assert whole.count(size) == 2  # before the member and in the table of contents
    for claim in (2**31, 3 * 2**30):
        (tmp_path / "a.npz").write_bytes(whole.replace(size, struct.pack("<I", claim)))
        with pytest.raises(ValueError, match=r"bytes claim to be \d+"):
            NpzArray(tmp_path / "a.npz", "x")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "b.npz", "w", method) as opened:
            opened.writestr("x.npy", member)
        with pytest.raises(ValueError, match="compressed as numpy never does"):
            NpzArray(tmp_path / "b.npz", "x")


def test_what_must_be_whole_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("retrodiff.databases.build.readers.WHOLE", 1000)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(np.ones((50, 8))), y=np.ones((50, 8)))
    assert NpzArray(tmp_path / "a.npz", "y")[0:50].sum() == 400
    with pytest.raises(ValueError, match="its order asks for all at once: save it in C order"):
        NpzArray(tmp_path / "a.npz", "x")[0:5]


def test_columns_of_an_npz_that_are_none(tmp_path):
    values = np.ones((2, 8), np.float32)
    for wrong in (np.ones((2, 20_000)), np.full(2, "x" * 50_000), np.ones((2, 2, 2))):
        np.savez_compressed(tmp_path / "p-part_0.npz", embedding=values, img_id=wrong)
        with pytest.raises(ValueError, match=r"img_id has the shape .* no column of ids or boxes"):
            rdm_parts(tmp_path)


def test_zips_that_are_damaged(tmp_path):
    np.savez(tmp_path / "whole.npz", embedding=np.ones((20, 8), np.float32), img_id=np.arange(20))
    whole = (tmp_path / "whole.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            broken[at] = rng.integers(0, 256)
        (tmp_path / "a.npz").write_bytes(broken)
        try:
            npz_names(tmp_path / "a.npz")
            NpzArray(tmp_path / "a.npz", "embedding")[0:20]
        except ValueError as error:
            line = str(error)
        else:
            line = ""
        assert "\n" not in line


@pytest.mark.parametrize("kind", [bool, complex, "S3", np.longdouble])
def test_embeddings_that_are_no_numbers(tmp_path, kind):
    part = Part(np.ones((3, 8)).astype(kind), name="mine")
    with pytest.raises(ValueError, match=r"mine holds .*, expected numbers: give floats"):
        import_embeddings(tmp_path / "d", [part], FINGERPRINT, progress=False)


# --- parquet -------------------------------------------------------------------------------------


def test_records_that_unfold(tmp_path):
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), ["x" * 5_000_000])
    options = {"compression": "zstd", "store_schema": False}
    pq.write_table(pa.table({"t": long}), tmp_path / "a.parquet", **options)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000  # for 45 GB
    rows = ParquetRows(tmp_path / "a.parquet")
    with at_most(600), pytest.raises(ValueError, match="has records of more than 268435456"):
        rows(0, 8192)
    assert rows_at_a_time(tmp_path / "a.parquet", 8192) == 13
    plain = pa.table({"t": [f"text {i}" for i in range(9000)], "n": list(range(9000))})
    pq.write_table(plain, tmp_path / "b.parquet", row_group_size=2000)
    assert rows_at_a_time(tmp_path / "b.parquet", 8192) == 8192
    rows = ParquetRows(tmp_path / "b.parquet")
    assert rows(0, 5000).column("n").to_pylist() == list(range(5000))
    assert rows(5000, 9000).column("t")[-1].as_py() == "text 8999"


def test_lists_that_stand_for_billions(tmp_path):
    many = pa.ListArray.from_arrays(
        pa.array([0, 40_000_000], pa.int32()), pa.nulls(40_000_000, pa.int8())
    )
    pq.write_table(pa.table({"v": many}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"column v\.list\.element would decompress"):
        open_parquet(tmp_path / "a.parquet")


def test_metadata_that_is_damaged_ends_in_one_line(tmp_path):
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save(tmp_path / "img_emb/img_emb_0.npy", np.eye(8, dtype=np.float32))
    out = io.BytesIO()
    pq.write_table(pa.table({"image_path": list("abcdefgh")}), out)
    file = tmp_path / "metadata/metadata_0.parquet"
    for data in (b"", b"PAR1", out.getvalue()[:-9], bytes(500)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"metadata_0\.parquet is no whole parquet file"):
            open_parts(tmp_path)
    broken = bytearray(out.getvalue())
    broken[4:60] = bytes(56)
    file.write_bytes(broken)
    parts, scale = open_parts(tmp_path)
    mark = Fingerprint(encoder="e", weights="", preprocessing="", dim=8, scale=scale or "raw")
    with pytest.raises(ValueError, match=r"metadata_0\.parquet is damaged"):
        import_embeddings(tmp_path / "d", parts, mark, progress=False)
    file.write_bytes(out.getvalue())
    database = import_embeddings(tmp_path / "d", open_parts(tmp_path)[0], mark, progress=False)
    assert torch.equal(database.embeddings(torch.arange(8)), torch.eye(8))
