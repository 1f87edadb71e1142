"""Zips give every picture a row or name it: folders, hidden members, bombs, encryption, damage."""

import os
import pickle
import stat
import struct
import warnings
import zipfile

import pytest
import torch
from memory_peak import at_most
from test_databases import Pooled
from test_databases_tars import IMAGES, encoded, keys

from retrodiff.databases import (
    Patchify,
    UnreadableImage,
    Zips,
    append_to_database,
    build_database,
    open_source,
)
from retrodiff.databases.sources.limits import LARGE
from retrodiff.databases.sources.skipped import SkippedPictures

DEFLATED = zipfile.ZIP_DEFLATED


def written(path, *members, method=DEFLATED):
    """Members are (name, bytes), or (`zipfile.ZipInfo`, bytes)."""
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in members:
            opened.writestr(name, data)
    return path


def patched(path, *changes) -> None:
    """Changes fields of every local header and directory entry: (offset there, here, format, n)."""
    data = bytearray(path.read_bytes())
    for local, central, form, value in changes:
        for magic, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
            at = -1
            while (at := data.find(magic, at + 1)) >= 0:
                struct.pack_into(form, data, at + offset, value)
    path.write_bytes(data)


FLAGS, METHOD, SMALL, LARGER = (6, 8), (8, 10), (18, 20), (22, 24)


def test_folders_are_labels_and_names_sort_as_people_count(tmp_path):
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = written(
        tmp_path / "a.zip",
        ("cat/img10.png", encoded(0)),
        ("cat/img2.png", encoded(1)),
        ("dog/", b""),
        ("./dog/deep/é.jpg", encoded(2, "JPEG")),
        ("root.webp", encoded(3, "WEBP")),
        ("bird/no_ending", encoded(4)),
        ("bird/readme", b"no picture at all"),
        ("bird\\windows.png", encoded(5)),
        ("notes.txt", b"text"),
        ("cat/._img2.png", b"\0\5\26\7mac"),
        ("__MACOSX/cat/img2.png", b"mac"),
        (".git/b.png", encoded(0)),
        (link, b"img2.png"),
    )
    source = Zips([path], {"license": "CC0"})
    assert keys(source) == [
        *("bird/no_ending", "bird/windows.png", "cat/img2.png", "cat/img10.png"),
        *("cat/link.png", "dog/deep/é.jpg", "root.webp"),
    ]
    [item] = source.read(2)
    assert torch.equal(item.image, IMAGES[1])
    assert item.record == {"key": "a.zip:cat/img2.png", "label": "cat", "license": "CC0"}
    assert source.read(6)[0].record["label"] is None
    with pytest.warns(UserWarning, match=r"1 skipped: a\.zip:cat/link\.png \(a link, which is not"):
        database = build_database(tmp_path / "d", source, Pooled(), progress=False)
    assert database.labels.tolist() == ["bird", "bird", "cat", "cat", "dog", None]


def test_several_zips_and_what_a_path_holds(tmp_path):
    for number, name in enumerate(["10.zip", "9.ZIP", "sub/1.zip"]):
        (tmp_path / "zips/sub").mkdir(parents=True, exist_ok=True)
        written(tmp_path / "zips" / name, (f"p{number}.png", encoded(number)))
    (tmp_path / "zips/README.md").write_text("pictures")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path, expected in (
            ("zips", ["p1", "p0", "p2"]),
            ("zips/10.zip", ["p0"]),
            ("zips/*.zip", ["p0"]),
        ):
            source = open_source(tmp_path / path, columns={"license": "CC0"})
            assert type(source) is Zips
            assert [key.removesuffix(".png") for key in keys(source)] == expected
            assert source.read(0)[0].record["license"] == "CC0"
    with pytest.raises(ValueError, match=r"10\.zip is given twice"):
        Zips([tmp_path / "zips/10.zip"] * 2)
    inner = written(
        tmp_path / "outer.zip", ("a.png", encoded(0)), ("x/b.zip", b"PK"), ("c.tar", b"x")
    )
    with pytest.warns(SkippedPictures, match=r"zips: 2 .*outer\.zip:x/b\.zip \(an archive within"):
        assert keys(open_source(inner)) == ["a.png"]
    (tmp_path / "zips/a.7z").write_bytes(b"7z")
    with pytest.warns(SkippedPictures, match=r"a\.7z \(an archive, but no zip: unpack it\)"):
        open_source(tmp_path / "zips")


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/a.png", "C:/a.png", "..\\a.png"]
)
def test_members_that_point_outside_refuse_the_zip(tmp_path, name):
    path = written(tmp_path / "a.zip", ("b.png", encoded(0)), (name, encoded(1)))
    with pytest.raises(ValueError, match=r"a\.zip: member .* points outside the archive"):
        Zips([path])


def test_refusals(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = written(tmp_path / "a.zip", ("a.png", encoded(0)), ("a.png", encoded(1)))
    with pytest.raises(ValueError, match=r"'a\.png' is there twice"):
        Zips([twice])
    for path, match in (
        (written(tmp_path / "b.zip", ("a.txt", b"1")), "no pictures in .*b.zip"),
        (written(tmp_path / "c.zip"), "no pictures in .*c.zip"),
    ):
        with pytest.raises(ValueError, match=match):
            Zips([path])
    with pytest.raises(ValueError, match="no pictures in no zips"):
        Zips([])
    whole = written(tmp_path / "d.zip", *[(f"{i}.png", encoded(i)) for i in range(5)]).read_bytes()
    for cut in (b"", whole[:40], whole[: len(whole) // 2], whole[:-5], b"no zip"):
        (tmp_path / "d.zip").write_bytes(cut)
        with pytest.raises(ValueError, match=r"d\.zip is not a whole zip archive") as error:
            open_source(tmp_path / "d.zip")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Zips([tmp_path / "nowhere.zip"])
    long = written(tmp_path / "e.zip", ("9" * 5000 + ".png", encoded(0)), ("a.png", encoded(1)))
    with pytest.warns(SkippedPictures, match=r"9\.\.\. \(a name of more than 1024 letters\)"):
        assert keys(Zips([long])) == ["a.png"]


def test_encrypted_and_foreign_members_are_skipped_by_name(tmp_path):
    for change, reason in (
        ((*FLAGS, "<H", 1), "encrypted: unpack the archive with its password"),
        ((*METHOD, "<H", 9), "compressed by method 9: write the archive again with deflate"),
        ((*METHOD, "<H", zipfile.ZIP_BZIP2), "compressed by method 12"),
    ):
        path = written(tmp_path / "a.zip", ("a.png", encoded(0)), ("no_ending", encoded(0)))
        patched(path, change)
        source = Zips([path])
        assert keys(source) == ["a.png"]
        with pytest.raises(UnreadableImage, match=reason):
            source.read(0)


def test_a_broken_member_costs_itself_only(tmp_path):
    path = written(
        tmp_path / "a.zip",
        *[(f"{i}.png", encoded(i)) for i in range(4)],
        ("4.png", b"broken"),
        ("5.png", b""),
        method=zipfile.ZIP_STORED,
    )
    data = bytearray(path.read_bytes())
    data[data.find(encoded(1)) + 60] ^= 0xFF  # its checksum tells
    at = data.find(b"PK\x03\x04", data.find(b"2.png"))  # the local header of the fourth
    data[at + 30] = ord("x")
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="4 skipped") as seen:
        database = build_database(
            tmp_path / "d", Zips([path]), Pooled(), workers=2, batch_size=2, progress=False
        )
    assert database.column("key").tolist() == ["a.zip:0.png", "a.zip:2.png"]
    text = next(str(w.message) for w in seen if issubclass(w.category, UserWarning))
    for part in (
        "a.zip:1.png (damaged in the archive: Bad CRC-32",
        "a.zip:3.png (damaged in the archive: File name in directory",
        "a.zip:4.png (not an image)",
        "a.zip:5.png (not an image)",
    ):
        assert part in text


def test_bombs_take_no_memory(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", DEFLATED, compresslevel=1) as opened:
        with opened.open("bomb.png", "w") as member:
            for _ in range(2 * LARGE // 2**24):
                member.write(bytes(2**24))
        opened.writestr("good.png", encoded(0))
    source = Zips([path])
    with (
        at_most(64),
        pytest.raises(UnreadableImage, match=r"would unfold from \d+ bytes to 536870912"),
    ):
        source.read(0)
    assert torch.equal(source.read(1)[0].image, IMAGES[0])
    # A header that claims a small size unfolds to that size only.
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", LARGER[0]), (b"PK\x01\x02", LARGER[1])):
        struct.pack_into("<I", data, data.find(magic) + offset, 1000)
    path.write_bytes(data)
    with at_most(64), pytest.raises(UnreadableImage, match="damaged in the archive"):
        Zips([path]).read(0)
    claims = written(tmp_path / "b.zip", ("a.png", encoded(0)))
    patched(claims, (*LARGER, "<I", 2**31))
    with at_most(64), pytest.raises(UnreadableImage, match="2147483648 bytes, more than 536870912"):
        Zips([claims]).read(0)
    patched(claims, (*LARGER, "<I", 2**20))
    with pytest.raises(UnreadableImage, match="the archive ends within it"):
        Zips([claims]).read(0)


def test_workers_and_forked_processes_read_by_themselves(tmp_path):
    path = written(tmp_path / "a.zip", *[(f"x/{i}.png", encoded(i)) for i in range(9)])
    source = Zips([path])
    source.read(4)
    again = pickle.loads(pickle.dumps(source))
    assert again.describe() == source.describe()
    assert torch.equal(again.read(7)[0].image, IMAGES[7])
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(source.read(8)[0].image, IMAGES[8]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    alone, shared = (
        build_database(
            tmp_path / f"d{n}",
            Patchify(size=4).over(source),
            Pooled(),
            workers=n,
            batch_size=4,
            progress=False,
        )
        for n in (0, 2)
    )
    assert alone.fingerprint == shared.fingerprint
    assert alone.table().equals(shared.table())


def test_builds_go_on_and_notice_another_zip(tmp_path):
    path = written(tmp_path / "a.zip", *[(f"{i}.png", encoded(i)) for i in range(9)])

    class Killed(Pooled):
        seen = 0

        def encode_image(self, images):
            self.seen += len(images)
            if self.seen > 6:
                raise KeyboardInterrupt
            return super().encode_image(images)

    ask = {"shard_rows": 2, "batch_size": 2, "progress": False}
    whole = build_database(tmp_path / "whole", Zips([path]), Pooled(), **ask)
    for out in ("d", "e"):
        with pytest.raises(KeyboardInterrupt):
            build_database(tmp_path / out, Zips([path]), Killed(), **ask)
    done = build_database(tmp_path / "d", Zips([path]), Pooled(), resume=True, **ask)
    assert done.fingerprint == whole.fingerprint
    assert done.table().equals(whole.table())
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="the pictures have changed since"):
        build_database(tmp_path / "e", Zips([path]), Pooled(), resume=True, **ask)
    more = Zips([written(tmp_path / "b.zip", ("b.png", encoded(2)))])
    assert len(append_to_database(tmp_path / "d", more, Pooled(), progress=False)) == 10
