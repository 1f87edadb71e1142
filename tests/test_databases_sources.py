"""Pictures in tars, parquet files and saved datasets; what a path holds; ids that repeat."""

import hashlib
import io
import json
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_databases import Pooled, pictures

from retrodiff.databases import (
    DatasetImages,
    ImageFolder,
    Images,
    ParquetImages,
    Patchify,
    SavedDataset,
    Tars,
    UnreadableImage,
    append_to_database,
    build_database,
    open_parts,
    open_source,
)
from retrodiff.databases.sources.folders import first_duplicate


def png(image: torch.Tensor) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(out, "PNG")
    return out.getvalue()


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
    source = Tars([tmp_path / "0.tar", tmp_path / "1.tar"], {"license": "CC0"})
    with pytest.warns(UserWarning, match=r"1 skipped: 0\.tar:a/001 \(not an image\)"):
        database = build_database(tmp_path / "d", source, Pooled(), thumbnails=8, progress=False)
    record = database.records(torch.tensor([0]))[0]
    assert {name: value for name, value in record.items() if value is not None} == {
        "key": "0.tar:a/000",
        "width": 8,
        "url": "u",
        "caption": "a dog",
        "license": "CC0",
    }
    assert database.column("label").tolist() == [None, "7"]
    assert torch.equal(database.image(1), images[1] / 127.5 - 1)


def test_the_names_of_tars_are_hashed_as_one_list(tmp_path):
    keys = {"0.tar": [], "1.tar": ["a", "b"], "2.tar": [], "3.tar": ["c"]}
    for name, samples in keys.items():
        write_tar(tmp_path / name, [(f"{key}.png", png(pictures(1)[0])) for key in samples])
    names = [f"{name}:{key}" for name, samples in keys.items() for key in samples]
    expected = hashlib.sha256("\0".join(names).encode()).hexdigest()[:32]
    assert Tars([tmp_path / name for name in keys]).describe()["names"] == expected


def test_tars_refuse(tmp_path):
    for name in ("../a.png", "/etc/a.png"):
        write_tar(tmp_path / "x.tar", [(name, png(pictures(1)[0]))])
        with pytest.raises(ValueError, match="points outside the archive"):
            Tars([tmp_path / "x.tar"])
    write_tar(tmp_path / "x.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.png", b"3")])
    with pytest.raises(ValueError, match=r"'a\.png' is there twice"):
        Tars([tmp_path / "x.tar"])
    whole = (tmp_path / "x.tar").read_bytes()
    for cut in (600, 1024 + 200):
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a whole tar"):
            Tars([tmp_path / "x.tar"])
    (tmp_path / "x.tar").write_bytes(b"not a tar at all")
    with pytest.raises(ValueError, match="not a whole tar"):
        Tars([tmp_path / "x.tar"])
    write_tar(tmp_path / "x.tar", [("a.txt", b"1")])
    with pytest.raises(ValueError, match="no pictures"):
        Tars([tmp_path / "x.tar"])


def test_tars_of_one_name_have_keys_of_their_own(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "0.tar", [("a.png", png(pictures(1)[0]))])
    files = [tmp_path / "train/0.tar", tmp_path / "val/0.tar"]
    source = pickle.loads(pickle.dumps(Tars(files)))
    assert [source.name(i) for i in range(2)] == ["train/0.tar:a", "val/0.tar:a"]
    assert source.read(1)[0].record["key"] == "val/0.tar:a"
    with pytest.raises(ValueError, match=r"train/0\.tar is given twice"):
        Tars([*files, files[0]])


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
    for one in (tmp_path / "a.parquet", str(tmp_path / "a.parquet")):
        assert len(ParquetImages(one)) == 5
    database = build_database(tmp_path / "d", source, Pooled(), workers=1, progress=False)
    assert database.labels.tolist() == list("abcde")
    with pytest.raises(ValueError, match="no column 'picture'; columns: image, label, boxes"):
        ParquetImages([tmp_path / "a.parquet"], "picture")
    pq.write_table(table.drop(["label"]), tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b\.parquet has no column 'label'; columns: image, boxes"
    ):
        ParquetImages([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet is no whole parquet file") as error:
        ParquetImages([tmp_path / "b.parquet"])
    assert "\n" not in str(error.value)


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


# --- datasets that save_to_disk wrote ------------------------------------------------------------


def save_dataset(folder, images, labels) -> None:
    """The files that ``datasets.Dataset.save_to_disk`` writes, in two arrow streams."""
    folder.mkdir(parents=True)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = json.dumps({"info": {"features": features}})
    names = []
    for i in range(2):
        part = slice(i, None, 2)
        column = [{"bytes": png(image), "path": None} for image in images[part]]
        table = pa.table({"image": column, "label": labels[part], "boxes": [[1]] * len(column)})
        table = table.replace_schema_metadata({"huggingface": about})
        names.append({"filename": f"data-{i:05d}-of-00002.arrow"})
        with pa.ipc.new_stream(folder / names[-1]["filename"], table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    state = {"_data_files": names, "_fingerprint": "abc", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def test_saved_dataset(tmp_path):
    images = pictures(7)
    save_dataset(tmp_path / "all/train", images, [0, 1, 1, 0, -1, 1, 0])
    source = pickle.loads(pickle.dumps(SavedDataset(tmp_path / "all/train")))
    order = [0, 2, 4, 6, 1, 3, 5]
    assert len(source) == 7
    for i in (6, 0, 3, 4):
        assert torch.equal(source.read(i)[0].image, images[order[i]])
    names = [source.read(i)[0].record for i in range(4)]
    assert names == [{"label": "cat"}, {"label": "dog"}, {"label": None}, {"label": "cat"}]
    assert open_source(tmp_path / "all/train").describe() == source.describe()
    with pytest.raises(ValueError, match="no column 'img'; columns: image, label, boxes"):
        SavedDataset(tmp_path / "all/train", "img")
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"several datasets, give one of them: .*all/train"):
        open_source(tmp_path / "all")
    file = tmp_path / "all/train/data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match="is no whole arrow stream"):
        SavedDataset(tmp_path / "all/train")
    with pytest.raises(ValueError, match="is no dataset of save_to_disk"):
        SavedDataset(tmp_path)


def test_what_is_written_into_every_row_belongs_to_the_source(tmp_path):
    images = pictures(3)
    pq.write_table(pa.table({"image": [png(i) for i in images]}), tmp_path / "a.parquet")
    save_dataset(tmp_path / "saved", images, [0, 1, 1])
    for make in (
        lambda columns: ParquetImages([tmp_path / "a.parquet"], columns=columns),
        lambda columns: SavedDataset(tmp_path / "saved", columns=columns),
    ):
        out = tmp_path / type(make({})).__name__
        build_database(out, make({"license": "CC0"}), Pooled(), progress=False)
        again = build_database(out, make({"license": "CC0"}), Pooled(), resume=True, progress=False)
        assert again.column("license").tolist() == ["CC0"] * 3
        with pytest.raises(ValueError, match=r"begun with columns=\{'license': 'CC0'\}, now"):
            build_database(out, make({"license": "CC-BY"}), Pooled(), resume=True, progress=False)


# --- what a path holds ---------------------------------------------------------------------------


def test_open_source_tells_formats_apart(tmp_path):
    image = pictures(1)[0]
    table = pa.table({"image": [png(image)]})
    (tmp_path / "tars").mkdir()
    for number in (10, 9):
        write_tar(tmp_path / f"tars/{number}.tar", [("a.png", png(image))])
    pq.write_table(table, tmp_path / "tars/00009.parquet")  # img2dataset puts one beside each tar
    (tmp_path / "tables").mkdir()
    pq.write_table(table, tmp_path / "tables/b.parquet")
    (tmp_path / "tables/README.md").write_text("a table")
    (tmp_path / "photos/00000").mkdir(parents=True)
    pq.write_table(table, tmp_path / "photos/00000.parquet")
    (tmp_path / "photos/00000/a.png").write_bytes(png(image))
    for path, kind, names in [
        ("tars", Tars, ["9.tar:a", "10.tar:a"]),
        ("tars/10.tar", Tars, ["10.tar:a"]),
        ("tars/*.tar", Tars, ["9.tar:a", "10.tar:a"]),
        ("tables", ParquetImages, ["row 0"]),
        ("tables/b.parquet", ParquetImages, ["row 0"]),
        ("photos", ImageFolder, ["00000/a.png", "00000.parquet"]),
    ]:
        source = open_source(tmp_path / path, columns={"license": "CC0"})
        assert type(source) is kind, path
        assert sorted(source.name(i) for i in range(len(source))) == sorted(names), path
        first = next(i for i in range(len(source)) if "parquet" not in source.name(i))
        assert source.read(first)[0].record["license"] == "CC0"
    (tmp_path / "clip/img_emb").mkdir(parents=True)
    for path, error in [
        ("clip", "import it"),
        ("photos/00000/a.png", "no source of pictures"),
        ("none", "does not exist"),
        ("*.tar", "nothing fits"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            open_source(tmp_path / path)
    with pytest.raises(ValueError, match="holds no embeddings"):
        open_parts(tmp_path / "photos")


# --- ids -----------------------------------------------------------------------------------------


def test_first_duplicate_where_hashes_collide():
    assert first_duplicate(lambda: []) is None
    assert first_duplicate(lambda: ["a", None, "b", None]) is None
    assert first_duplicate(lambda: [-1, 5, -2]) is None  # both have hash -2
    assert first_duplicate(lambda: [-1, -2, "x", -2, "x"]) == (-2, 1, 3)
    assert first_duplicate(lambda: ["x", 1, 2, 2.0, "x"]) == (2.0, 2, 3)


def test_an_id_that_is_there_twice_is_refused_before_anything_is_encoded(tmp_path):
    images = pictures(4)
    table = pa.table({"image": [png(image) for image in images], "id": ["a", "b", None, "a"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    source = ParquetImages([tmp_path / "a.parquet"])

    class Unused(Pooled):
        def encode_image(self, images):
            raise AssertionError("nothing is to be encoded")

    for doubled in (source, Patchify(size=4).over(source), DatasetImages(table.to_pylist())):
        with pytest.raises(ValueError, match="row 3 has id 'a', which row 0 has too"):
            build_database(tmp_path / "d", doubled, Unused(), progress=False)
    with pytest.raises(ValueError, match="image 1 has id 7, which image 0 has too"):
        build_database(
            tmp_path / "d", Images(images[:2], [{"id": 7}] * 2), Unused(), progress=False
        )
    assert not (tmp_path / "d").exists()


def test_an_appended_id_that_is_there_already_is_refused(tmp_path):
    images, records = pictures(4, 8), [{"id": f"p{i}"} for i in range(4)]
    first = Patchify(size=4).over(Images(images[:2], records[:2]))
    assert len(build_database(tmp_path / "d", first, Pooled(), progress=False)) == 8
    again = Images(images[1:], records[1:])
    with pytest.raises(ValueError, match="image 0 has id 'p1', which a row of the database has"):
        append_to_database(tmp_path / "d", again, Pooled(), progress=False)
    more = Images(images[2:], records[2:])
    assert len(append_to_database(tmp_path / "d", more, Pooled(), progress=False)) == 10
    foreign = Images(images[2:])  # pictures that know of no ids may be added
    assert len(append_to_database(tmp_path / "d", foreign, Pooled(), progress=False)) == 12
