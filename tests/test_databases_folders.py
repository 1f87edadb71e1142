"""Folders of pictures: links, other file types, names that are no UTF-8, databases inside."""

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_databases import Pooled, pictures

from retrodiff.databases import (
    ImageFolder,
    Images,
    append_to_database,
    build_database,
    open_database,
)
from retrodiff.databases.sources.skipped import SkippedPictures, skipped_message

IMAGES = pictures(20, 12)


def fill(folder, names, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names, first):
        Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy()).save(folder / name, "PNG")


def test_linked_folders_are_entered_once(tmp_path):
    fill(tmp_path / "store/cats", ["a.png", "b.png"])
    fill(tmp_path / "store/dogs", ["c.png"])
    library = tmp_path / "library"
    fill(library / "birds", ["d.png"])
    (library / "cats").symlink_to(tmp_path / "store/cats")
    (library / "dogs").symlink_to(tmp_path / "store/dogs")
    (library / "again").symlink_to(library / "birds")  # where it lies it is called birds
    (library / "more").symlink_to(tmp_path / "store/dogs")
    (library / "birds/round").symlink_to(library)
    (library / "one.png").symlink_to(tmp_path / "store/dogs/c.png")
    (library / "lost.png").symlink_to(tmp_path / "nowhere.png")
    source = ImageFolder(library)
    assert source.files == [
        *("birds/d.png", "cats/a.png", "cats/b.png", "dogs/c.png", "lost.png", "one.png")
    ]
    assert source.read(1)[0].record == {"file": "cats/a.png", "label": "cats"}
    (tmp_path / "only").mkdir()
    (tmp_path / "only/cats").symlink_to(tmp_path / "store/cats")
    assert ImageFolder(tmp_path / "only").files == ["cats/a.png", "cats/b.png"]
    (tmp_path / "top").symlink_to(tmp_path / "store")
    assert len(ImageFolder(tmp_path / "top")) == 3


def test_what_is_no_file_is_named_and_never_opened(tmp_path):
    fill(tmp_path / "p", ["a.png"])
    os.mkfifo(tmp_path / "p/pipe.png")
    (tmp_path / "p/zero.png").symlink_to("/dev/zero")
    (tmp_path / "p/x.png").mkdir()
    signal.alarm(20)  # a pipe that is opened waits for ever
    try:
        with pytest.warns(SkippedPictures, match="2 skipped") as seen:
            build_database(tmp_path / "d", ImageFolder(tmp_path / "p"), Pooled(), progress=False)
    finally:
        signal.alarm(0)
    assert "pipe.png (a pipe, not a file), zero.png (a device, not a file)" in str(seen[0].message)


def test_a_folder_that_cannot_be_entered_is_named(tmp_path, monkeypatch):
    fill(tmp_path / "p", ["a.png"])
    fill(tmp_path / "p/closed", ["b.png"])
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    source = ImageFolder(tmp_path / "p")
    with pytest.warns(SkippedPictures, match=r"closed/ \(the folder cannot be opened: Permission"):
        assert len(build_database(tmp_path / "d", source, Pooled(), progress=False)) == 1


def latin(name: bytes) -> str:
    return os.fsdecode(name)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_names_that_are_no_utf8_are_kept_escaped_and_found_again(tmp_path):
    name = latin(b"caf\xe9.png")
    fill(tmp_path / "p", ["a.png", name])
    fill(tmp_path / latin(b"p/\xe9t\xe9"), ["b.png"], 3)
    with open(tmp_path / "p" / latin(b"caf\xe9.txt"), "w") as file:
        file.write("no picture")
    with pytest.warns(SkippedPictures, match=r"caf\\xe9\.txt \(not an image\)"):
        database = build_database(
            tmp_path / "d", ImageFolder(tmp_path / "p"), Pooled(), progress=False
        )
    assert database.column("file").tolist() == ["a.png", r"caf\xe9.png", r"\xe9t\xe9/b.png"]
    assert database.labels.tolist() == [None, None, r"\xe9t\xe9"]
    assert torch.equal(database.image(1), IMAGES[1] / 127.5 - 1)
    assert torch.equal(database.image(2), IMAGES[3] / 127.5 - 1)
    assert open_database(tmp_path / "d").manifest.skipped[0][0] == r"caf\xe9.txt"


def test_names_with_escape_sequences_do_not_reach_the_terminal(tmp_path):
    fill(tmp_path / "p", ["a.png"])
    (tmp_path / "p/\x1b[2J\nx.png").write_text("no picture")
    with pytest.warns(SkippedPictures, match=r"\\x1b\[2J\\nx\.png \(not an image\)"):
        build_database(tmp_path / "d", ImageFolder(tmp_path / "p"), Pooled(), progress=False)
    assert "\x1b" not in skipped_message([("a\x1b", "b\x1b")])


class Dies(Pooled):
    calls = 0

    def encode_image(self, images):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().encode_image(images)


def test_a_database_inside_the_folder_of_its_pictures(tmp_path):
    photos, out = tmp_path / "p", tmp_path / "p/library.rdb"
    options = {"shard_rows": 4, "batch_size": 4, "progress": False}
    fill(photos, [f"{i:02}.png" for i in range(12)])
    with pytest.raises(KeyboardInterrupt):
        build_database(out, ImageFolder(photos), Dies(), **options)
    assert any("partial" in path.name for path in photos.iterdir())
    database = build_database(out, ImageFolder(photos), Pooled(), resume=True, **options)
    assert len(database) == 12
    assert len(build_database(out, ImageFolder(photos), Pooled(), overwrite=True, **options)) == 12
    fill(photos / "new", ["n.png"], 12)
    with_new = append_to_database(out, ImageFolder(photos / "new"), Pooled(), progress=False)
    assert len(with_new) == 13
    second = build_database(tmp_path / "second", ImageFolder(photos), Pooled(), progress=False)
    assert len(second) == 13
    assert second.manifest.skipped == ()
    with pytest.raises(ValueError, match=r"library\.rdb is a database, not pictures"):
        ImageFolder(out)


def test_a_folder_called_partial_that_holds_pictures_is_named(tmp_path):
    fill(tmp_path / "p", ["a.png"])
    fill(tmp_path / "p/trip.partial", ["b.png"])
    with pytest.warns(SkippedPictures, match=r"trip\.partial/ \(unfinished work"):
        build_database(tmp_path / "d", ImageFolder(tmp_path / "p"), Pooled(), progress=False)


def test_pictures_replaced_under_their_names_end_a_resume(tmp_path):
    photos = tmp_path / "p"
    fill(photos, [f"{i:02}.png" for i in range(12)])
    with pytest.raises(KeyboardInterrupt):
        build_database(
            tmp_path / "d", ImageFolder(photos), Dies(), shard_rows=4, batch_size=4, progress=False
        )
    Image.new("RGB", (99, 99)).save(photos / "07.png")
    with pytest.raises(ValueError, match="was begun with bytes="):
        build_database(
            tmp_path / "d", ImageFolder(photos), Pooled(), shard_rows=4, batch_size=4,
            resume=True, progress=False,
        )  # fmt: skip


def test_images_of_any_kind(tmp_path):
    fill(tmp_path, ["a.png", "b.png"])
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    mixed = [tmp_path / "a.png", str(tmp_path / "b.png"), IMAGES[2], IMAGES[3].long().numpy()]
    with pytest.warns(SkippedPictures, match=r"1 skipped: image 1 \(.*image"):
        database = build_database(
            tmp_path / "d", Images(mixed), Pooled(), thumbnails=16, progress=False
        )
    assert database.column("number").tolist() == [0, 2, 3]
    for row, i in enumerate((0, 2, 3)):
        assert torch.equal(database.image(row), IMAGES[i] / 127.5 - 1)
    with pytest.raises(ValueError, match="images holds floats from 0 to 255"):
        Images(IMAGES.float())
    with pytest.raises(ValueError, match=r"images has shape \(3, 12, 12\)"):
        Images(IMAGES[0])
    assert Images(IMAGES).images is IMAGES  # no copy of what is right already
