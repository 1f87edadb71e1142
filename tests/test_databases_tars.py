"""Tars of any kind give every picture a row or name it: dots, links, endings, compression."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_databases import Pooled, pictures

from retrodiff.databases import Tars, build_database, open_source
from retrodiff.databases.sources.skipped import SkippedPictures

IMAGES = pictures(9)


def encoded(i: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image = Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy())
    if kind == "ICO":  # Pillow below 13 leaves smaller ones out of the file
        image = image.resize((16, 16))
    image.save(out, kind)
    return out.getvalue()


def tar_bytes(*members, **options) -> bytes:
    """Members are (name, bytes), (name, link type, target) or (name, bytes, tarinfo changes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as tar:
        for name, data, *more in members:
            about = tarfile.TarInfo(name)
            if data in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                about.type, about.linkname = data, more[0] if more else ""
                data = b""
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return out.getvalue()


def opened(tmp_path, *members, **options) -> Tars:
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members, **options))
    return Tars([tmp_path / "a.tar"])


def keys(source) -> list[str]:
    return [source.name(i).partition(":")[2] for i in range(len(source))]


def test_keys_end_at_the_last_dot_where_the_first_gives_no_sample(tmp_path):
    about = json.dumps({"n": 1}).encode()
    source = opened(
        tmp_path,
        ("a.png", encoded(0)),
        ("IMG_2020.01.02.png", encoded(1)),
        ("IMG_2020.01.02.json", about),
        ("22.05.png", encoded(2)),
        ("v1.5 final.jpg", encoded(3, "JPEG")),
        ("v1.5/b.png", encoded(4)),
        ("v1.5/b.txt", b"text"),
    )
    assert keys(source) == ["a", "IMG_2020.01.02", "22.05", "v1.5 final", "v1.5/b"]
    assert torch.equal(source.read(1)[0].image, IMAGES[1])
    assert source.read(1)[0].record == {"key": "a.tar:IMG_2020.01.02", "n": 1}
    assert source.read(4)[0].record["caption"] == "text"


def test_second_pictures_of_a_sample_are_named(tmp_path):
    with pytest.warns(SkippedPictures, match=r"4 pictures not taken: ") as seen:
        source = opened(
            tmp_path,
            ("a.seg.png", encoded(1)),
            ("a.jpg", encoded(0, "JPEG")),
            ("a.png", encoded(2)),
            ("a.JPG", encoded(2, "JPEG")),
            ("b.jpg", encoded(3, "JPEG")),
            ("c.png", tarfile.SYMTYPE, "../elsewhere.png"),
        )
    assert keys(source) == ["a", "b"]
    text = str(seen[0].message)
    for name in ("a.seg.png", "a.png", "a.JPG"):
        assert f"a.tar:{name} (a second picture of a.jpg)" in text
    assert "a.tar:c.png (a link to ../elsewhere.png, which the tar does not hold)" in text


def test_tars_within_a_tar_are_named(tmp_path):
    inner = tar_bytes(("a.png", encoded(0)))
    members = [("a.png", encoded(1)), ("x/b.tar", inner), ("c.tgz", gzip.compress(inner))]
    with pytest.warns(SkippedPictures, match=r"2 .*x/b\.tar \(a tar within the tar: unpack it\)"):
        assert keys(opened(tmp_path, *members)) == ["a"]


def test_hidden_members_are_passed_over(tmp_path):
    source = opened(
        tmp_path,
        ("._a.png", b"\0\5\26\7mac"),
        (".DS_Store", b"x"),
        ("x/.gitkeep", b""),
        (".cache/b.png", encoded(0)),
        ("./c.png", encoded(1)),
        ("x", tarfile.DIRTYPE),
    )
    assert keys(source) == ["c"]


def test_links_are_followed(tmp_path):
    with pytest.warns(SkippedPictures, match=r"3 pictures not taken"):
        source = opened(
            tmp_path,
            ("x/a.png", encoded(0)),
            ("x/a.txt", b"text"),
            ("hard.png", tarfile.LNKTYPE, "x/a.png"),
            ("x/soft.png", tarfile.SYMTYPE, "a.png"),
            ("y/up.png", tarfile.SYMTYPE, "../x/soft.png"),
            ("hard.txt", tarfile.LNKTYPE, "x/a.txt"),
            ("loop.png", tarfile.SYMTYPE, "loop.png"),
            ("round.png", tarfile.SYMTYPE, "loop.png"),
            ("pipe.png", tarfile.FIFOTYPE),
        )
    assert keys(source) == ["x/a", "hard", "x/soft", "y/up"]
    assert all(torch.equal(source.read(i)[0].image, IMAGES[0]) for i in range(4))
    assert [source.read(i)[0].record.get("caption") for i in range(3)] == ["text", "text", None]


def test_pictures_of_other_endings_and_of_none(tmp_path):
    kinds = {
        "b.avif": "AVIF",
        "c.jfif": "JPEG",
        "d.ppm": "PPM",
        "E.JPG": "JPEG",
        "f.jp2": "JPEG2000",
    }
    kinds |= {"g": "PNG", "h.ico": "ICO", "i.unknown": "WEBP"}
    members = [(name, encoded(i, kind)) for i, (name, kind) in enumerate(kinds.items())]
    source = opened(tmp_path, *members, ("notes", b"no picture"), ("film.mp4", encoded(0)))
    assert keys(source) == ["b", "c", "d", "E", "f", "g", "h", "i.unknown"]
    assert all(source.read(i)[0].image.shape[0] == 3 for i in range(8))


COMPRESSED = {
    "a.tar.gz": gzip.compress,
    "a.tgz": gzip.compress,
    "a.tar.bz2": bz2.compress,
    "a.tar.xz": lzma.compress,
    "a.tar.zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    "a.tar": gzip.compress,  # the bytes count, not the name
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tars_are_read_in_any_order(tmp_path, name):
    noise = np.random.default_rng(0).bytes(200_000)
    data = tar_bytes(
        *[(f"{i}.png", encoded(i)) for i in range(4)],
        ("big.bin", noise),
        *[(f"{i}.png", encoded(i)) for i in range(4, 9)],
    )
    (tmp_path / name).write_bytes(COMPRESSED[name](data))
    source = open_source(tmp_path / name)
    for i in (0, 7, 3, 8, 0):
        assert torch.equal(source.read(i)[0].image, IMAGES[i])
    database = build_database(
        tmp_path / "d", source, Pooled(), workers=2, batch_size=4, progress=False
    )
    assert database.column("key").tolist() == [f"{name}:{i}" for i in range(9)]
    whole = (tmp_path / name).read_bytes()
    for cut in (40, len(whole) // 2, len(whole) * 3 // 4):
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name} is not a whole tar"):
            Tars([tmp_path / name])


def test_a_folder_of_tars_of_every_depth(tmp_path):
    for number, name in enumerate(["0.tar", "1.tar.gz", "2.tgz", "sub/10.tar", "sub/9.tar"]):
        path = tmp_path / "tars" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = tar_bytes((f"p{number}.png", encoded(number)))
        path.write_bytes(data if name.endswith(".tar") else gzip.compress(data))
    (tmp_path / "tars/00000_stats.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(tmp_path / "tars")
    assert keys(source) == ["p0", "p1", "p2", "p4", "p3"]
    (tmp_path / "tars/more.zip").write_bytes(b"PK")
    with pytest.warns(SkippedPictures, match=r"more\.zip \(an archive, but no tar"):
        open_source(tmp_path / "tars")
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"image": [encoded(0)]}), tmp_path / "tables/a.parquet")
    (tmp_path / "tables/more.rar").write_bytes(b"Rar!")
    with pytest.warns(
        SkippedPictures, match=r"more\.rar \(an archive, but no parquet file: unpack"
    ):
        assert len(open_source(tmp_path / "tables")) == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "tars/sub/a.png")  # now it is a folder of pictures
    with pytest.warns(SkippedPictures, match=r"0\.tar \(a tar: open it by its own path\)"):
        database = build_database(
            tmp_path / "d", open_source(tmp_path / "tars"), Pooled(), progress=False
        )
    assert len(database) == 1
    skipped = {str(one) for one in database.manifest.skipped}
    assert len(skipped) == 7
    assert any("more.zip" in one and "an archive: unpack it, or open" in one for one in skipped)


@pytest.mark.parametrize(
    "text",
    [
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b"{broken",
        b"\xff\xfe",
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_broken_description_never_costs_the_picture(tmp_path, text):
    source = opened(tmp_path, ("a.png", encoded(0)), ("a.json", text), ("a.txt", b"t\xff"))
    [item] = source.read(0)
    assert torch.equal(item.image, IMAGES[0])
    assert item.record["json_error"].startswith("broken json")
    assert item.record["caption"] == "t\ufffd"
    assert len(build_database(tmp_path / "d", source, Pooled(), progress=False)) == 1


def test_texts_that_are_no_unicode_can_be_stored(tmp_path):
    about = json.dumps({"v": "\ud800", "\udfff": "w", "n": 1}).encode()
    source = opened(
        tmp_path,
        ("caf\xe9.png", encoded(0)),
        ("caf\xe9.json", about),
        encoding="latin-1",
        format=tarfile.GNU_FORMAT,
    )
    assert keys(source) == [r"caf\xe9"]
    database = build_database(tmp_path / "d", source, Pooled(), progress=False)
    record = database.records(torch.tensor([0]))[0]
    assert record["v"] == r"\ud800"
    assert record[r"\udfff"] == "w"


def patched(data: bytes, at: int, size: bytes) -> bytes:
    """A tar whose header at a place claims another size, with its checksum mended."""
    header = bytearray(data[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + 512 :]


def test_sizes_that_a_header_only_claims(tmp_path):
    plain = tar_bytes(("a.png", encoded(0)), ("b.png", encoded(1)))
    for size in (b"77777777777\0", b"\x80" + bytes(5) + b"\x01" + bytes(5), b"\xff" * 12):
        for data in (patched(plain, 0, size), gzip.compress(patched(plain, 0, size))):
            (tmp_path / "a.tar").write_bytes(data)
            with pytest.raises(ValueError, match="is not a whole tar"):
                Tars([tmp_path / "a.tar"])
    long = tar_bytes(("n" * 300 + ".png", encoded(0)), format=tarfile.GNU_FORMAT)
    for data in (patched(long, 0, b"77777777777\0"), patched(long, 0, b"\xff" * 12)):
        (tmp_path / "a.tar").write_bytes(gzip.compress(data))
        with pytest.raises(ValueError, match="is not a whole tar"):
            Tars([tmp_path / "a.tar"])


def test_a_process_that_was_forked_reads_by_itself(tmp_path):
    (tmp_path / "a.tgz").write_bytes(
        gzip.compress(tar_bytes(*[(f"{i}.png", encoded(i)) for i in range(9)]))
    )
    source = Tars([tmp_path / "a.tgz"])
    source.read(4)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(source.read(8)[0].image, IMAGES[8]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(source.read(5)[0].image, IMAGES[5])
