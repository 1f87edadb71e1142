"""Rows of tables and datasets: broken ones are skipped, paths are read or explained."""

import datetime
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from memory_peak import at_most
from PIL import Image
from test_databases import Pooled, pictures

from retrodiff.databases import DatasetImages, ParquetImages, SavedDataset, build_database
from retrodiff.databases.sources.skipped import SkippedPictures
from retrodiff.pictures.converting import PixelRange
from retrodiff.pictures.decoding import UnreadableImage

IMAGES = pictures(8)
HWC = [image.permute(1, 2, 0).numpy() for image in IMAGES]
# Of 8 x 8 x 3 both layouts are clear; the pictures are exact.


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(HWC[i]).save(out, "PNG")
    return out.getvalue()


class Lazy:
    """Decodes when it is asked, as `datasets` does."""

    def __init__(self, *data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image = Image.open(io.BytesIO(self.data[i]))
        image.load()
        return {"image": image, "t": "x"}


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_raise_are_skipped(tmp_path, workers):
    source = DatasetImages(Lazy(png(0), png(1)[:60], png(2), b"<html>"))
    with pytest.warns(SkippedPictures, match=r"2 skipped: row 1 \(.*row 3 \(Unidentified") as seen:
        database = build_database(tmp_path / "d", source, Pooled(), workers=workers, progress=False)
    assert database.column("number").tolist() == [0, 2]
    assert "0x" not in str(seen[0].message)  # the same at every run


def test_the_first_row_may_be_broken(tmp_path):
    source = DatasetImages(Lazy(b"<html>", png(1)))
    with pytest.warns(SkippedPictures, match="1 skipped: row 0"):
        assert len(build_database(tmp_path / "d", source, Pooled(), progress=False)) == 1


def test_rows_without_the_column_and_without_a_value(tmp_path):
    rows = [{"image": HWC[0], "t": 1}, {"t": 2}, {"image": None}, {"image": HWC[3], "t": 3}]
    with pytest.warns(SkippedPictures, match=r"row 1 \(the row has no column 'image'\), row 2"):
        database = build_database(tmp_path / "d", DatasetImages(rows), Pooled(), progress=False)
    assert database.column("t").tolist() == [1, 3]
    assert len(DatasetImages(rows, keep=["t"]).read(0)[0].record) == 2
    with pytest.raises(ValueError, match="has no length"):
        DatasetImages(iter(rows))


def test_pixels_of_every_kind_in_a_dataset(tmp_path):
    Image.fromarray(HWC[7]).save(tmp_path / "a.png")
    kinds = {
        "int64": HWC[7].astype(np.int64),
        "float": HWC[7].astype(np.float64) / 127.5 - 1,
        "uint16": HWC[7].astype(np.uint16) * 257,
        "lists": HWC[7].tolist(),
        "tensor": IMAGES[7],
        "path": str(tmp_path / "a.png"),
        "Path": tmp_path / "a.png",
        "dict of a path": {"bytes": None, "path": str(tmp_path / "a.png")},
        "dict of bytes": {"bytes": png(7), "path": "elsewhere"},
        "memoryview": memoryview(png(7)),
        "PIL": Image.fromarray(HWC[7]),
    }
    source = DatasetImages([{"image": value} for value in kinds.values()])
    for i, kind in enumerate(kinds):
        image = source.read(i)[0].image
        image = image if image.dtype == torch.uint8 else ((image + 1) * 127.5).round()
        assert torch.equal(image, IMAGES[7].to(image.dtype)), kind
    gray = DatasetImages([{"image": HWC[7][..., 0]}, {"image": HWC[7][..., :1]}])
    assert all(torch.equal(gray.read(i)[0].image[2], IMAGES[7, 0]) for i in range(2))
    for wrong, message in [
        (HWC[7].astype(np.float32), "floats from .* expected -1 to 1"),
        ("iVBORw0KGgo" * 50, "No such file|too long"),
        ({"bytes": None, "path": None}, "is empty"),
        ([{"bytes": png(0)}], "array of object|expected a picture"),
    ]:
        with pytest.raises(UnreadableImage, match=message):
            DatasetImages([{"image": wrong}]).read(0)
    with pytest.warns(PixelRange, match="column 'image' holds floats from"):
        DatasetImages([{"image": HWC[7].astype(np.float32) / 255}]).read(0)


def test_values_that_become_records():
    day = datetime.date(2020, 1, 2)
    row = {"image": HWC[0], "n": np.int64(3), "x": np.float32(0.5), "day": day, "s": "\ud800"}
    record = DatasetImages([row]).read(0)[0].record
    assert record == {"number": 0, "n": 3, "x": 0.5, "day": day, "s": r"\ud800"}
    assert type(record["n"]) is int


def test_tables_of_paths(tmp_path):
    home = tmp_path / "home"
    (home / "p").mkdir(parents=True)
    for i in range(3):
        (home / f"p/{i}.png").write_bytes(png(i))
    (tmp_path / "secret.png").write_bytes(png(5))
    (home / "p/link.png").symlink_to(tmp_path / "secret.png")
    paths = ["p/0.png", str(home / "p/1.png"), "p/none.png", "../secret.png", "p/link.png"]
    paths += [str(tmp_path / "secret.png"), "https://example.com/a.png", "", "a\0b"]
    structs = [{"bytes": None, "path": path} for path in paths]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for column in (pa.array(paths), pa.array(structs, kind)):
        pq.write_table(pa.table({"image": column}), home / "a.parquet")
        source = ParquetImages([home / "a.parquet"])
        for i in range(2):
            assert torch.equal(source.read(i)[0].image, IMAGES[i])
        for i, message in [
            (2, "No such file"),
            (3, "lies outside"),
            (4, "lies outside"),
            (5, "lies outside"),
            (6, "No such file"),
            (7, "holds no bytes"),
            (8, "null|no bytes"),
        ]:
            with pytest.raises(UnreadableImage, match=message):
                source.read(i)


def test_parquet_rows_in_any_order_and_workers(tmp_path):
    table = pa.table({"image": [png(i) for i in range(8)], "n": list(range(8))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    source = pickle.loads(pickle.dumps(ParquetImages([tmp_path / "a.parquet"])))
    for i in (7, 0, 5, 4, 4, 1):
        assert torch.equal(source.read(i)[0].image, IMAGES[i])
        assert source.read(i)[0].record == {"n": i}
    database = build_database(tmp_path / "d", source, Pooled(), workers=2, progress=False)
    assert database.column("n").tolist() == list(range(8))


def test_a_damaged_row_group_costs_its_rows_only(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), np.uint8)
    data = []
    for array in noise:
        out = io.BytesIO()
        Image.fromarray(array).save(out, "PNG")
        data.append(out.getvalue())
    options = {"row_group_size": 3, "compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"image": data}), tmp_path / "a.parquet", **options)
    about = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(0)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    start = about.data_page_offset
    damaged[start : start + 200] = bytes(200)
    (tmp_path / "a.parquet").write_bytes(damaged)
    source = ParquetImages([tmp_path / "a.parquet"])
    with pytest.warns(SkippedPictures, match="3 skipped: row 3"):
        database = build_database(tmp_path / "d", source, Pooled(), progress=False)
    assert len(database) == 6


def test_columns_that_python_has_no_value_for(tmp_path):
    times = pa.array([1, 2_000_000_001], pa.timestamp("ns"))
    words = pa.Array.from_buffers(
        pa.string(), 2, pa.array(["ok", "caf\xe9"], pa.binary()).buffers()
    )
    bad = pa.array([b"ok", b"caf\xe9"], pa.binary()).buffers()
    words = pa.Array.from_buffers(pa.string(), 2, bad)
    pq.write_table(
        pa.table({"image": [png(0), png(1)], "time": times, "word": words}), tmp_path / "a.parquet"
    )
    source = ParquetImages([tmp_path / "a.parquet"])
    records = [source.read(i)[0].record for i in range(2)]
    assert [record["word"] for record in records] == ["ok", r"caf\xe9"]
    assert str(records[1]["time"]).endswith("02.000000001")


# --- what a file may unfold to -------------------------------------------------------------------


def test_a_small_parquet_file_that_stands_for_gigabytes(tmp_path, monkeypatch):
    big = png(0) + bytes(20_000_000)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), pa.array([big]))
    pq.write_table(
        pa.table({"image": column}), tmp_path / "a.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "a.parquet").stat().st_size < 20_000  # for 8 GB
    source = ParquetImages([tmp_path / "a.parquet"])
    with at_most(300):
        assert torch.equal(source.read(0)[0].image, IMAGES[0])
        assert torch.equal(source.read(3)[0].image, IMAGES[0])
    monkeypatch.setattr("retrodiff.databases.sources.limits.LARGE", 2**22)
    pq.write_table(
        pa.table({"image": [bytes(5_000_000)]}), tmp_path / "b.parquet", compression="zstd"
    )
    with pytest.raises(ValueError, match=r"column image would decompress \d+ bytes to 5000"):
        ParquetImages([tmp_path / "b.parquet"])


def save_stream(folder, table, **options) -> None:
    folder.mkdir()
    with pa.ipc.new_stream(folder / "a.arrow", table.schema, **options) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))


def test_arrow_streams(tmp_path):
    table = pa.table({"image": [png(0), png(1)]})
    save_stream(tmp_path / "plain", table)
    assert torch.equal(SavedDataset(tmp_path / "plain").read(1)[0].image, IMAGES[1])
    for codec in ("zstd", "lz4"):
        save_stream(tmp_path / codec, table, options=pa.ipc.IpcWriteOptions(compression=codec))
        with pytest.raises(ValueError, match="is compressed, which cannot be mapped"):
            SavedDataset(tmp_path / codec)
    coded = pa.table({"image": [png(0)], "label": pa.array(["a"]).dictionary_encode()})
    save_stream(tmp_path / "coded", coded)
    assert SavedDataset(tmp_path / "coded").read(0)[0].record == {"label": "a"}
    (tmp_path / "plain/a.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.arrow is missing, which state\.json names"):
        SavedDataset(tmp_path / "plain")
    for text in ("[" * 100_000, '{"_data_files": 3}', ""):
        (tmp_path / "plain/state.json").write_text(text)
        with pytest.raises(ValueError, match="is no dataset of save_to_disk"):
            SavedDataset(tmp_path / "plain")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_tables_end_in_one_line(tmp_path, seed):
    rng = np.random.default_rng(seed)
    save_stream(tmp_path / "s", pa.table({"image": [png(0)] * 5, "t": list("abcde")}))
    pq.write_table(pa.table({"image": [png(0)] * 5, "t": list("abcde")}), tmp_path / "a.parquet")
    for file, make in (
        (tmp_path / "s/a.arrow", lambda: SavedDataset(tmp_path / "s")),
        (tmp_path / "a.parquet", lambda: ParquetImages([tmp_path / "a.parquet"])),
    ):
        whole = file.read_bytes()
        for _ in range(25):
            broken = bytearray(whole)
            for at in rng.integers(0, len(whole), 3):
                broken[at] = rng.integers(0, 256)
            cut = len(broken) if rng.random() < 0.7 else int(rng.integers(1, len(broken)))
            file.unlink()  # a mapped file must not change below its map
            file.write_bytes(broken[:cut])
            lines = []
            try:
                source = make()
            except ValueError as error:
                lines.append(str(error))
            else:
                for i in range(min(len(source), 5)):
                    try:
                        source.read(i)
                    except UnreadableImage as error:
                        lines.append(str(error))
            assert not any("\n" in line for line in lines)
        file.unlink()
        file.write_bytes(whole)
