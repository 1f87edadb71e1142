"""Builds, appends and overwrites: nothing of others is removed, nothing finished is lost."""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import signal
import threading
import time
import warnings
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_databases import Pooled, files_of, pictures

from retrodiff.databases import (
    EmbeddingDatabase,
    ImageFolder,
    Images,
    Part,
    append_to_database,
    build_database,
    delete_rows,
    import_embeddings,
    open_database,
)
from retrodiff.databases.build import edit, work
from retrodiff.databases.build.work import MixedColumn, read_work
from retrodiff.databases.manifest import BUILD, LOG, MANIFEST
from retrodiff.indexes import Annoy, Exact, Faiss, ScaNN, USearch, Vectors, recipe, save_index
from retrodiff.indexes.interruptible import heard
from retrodiff.indexes.recipe import Recall
from retrodiff.indexes.saved import load_index
from retrodiff.interfaces import Query

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(pictures(9, 12)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"p{i}.bmp")
    return folder


class Killed(BaseException):
    """Ends a build as a kill does: nothing is tidied up afterwards."""


class Failing(Pooled):
    """Ends the process's work at the nth batch."""

    def __init__(self, calls: int, error: type[BaseException] = Killed):
        super().__init__()
        self.calls, self.error = calls, error

    def encode_image(self, images):
        self.calls -= 1
        if self.calls < 0:
            raise self.error
        return super().encode_image(images)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


# --- what is not ours ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside", ["notes.txt", "photos/a.png", "indexes/mine/x", "vectors-1.safetensors", "model.json"]
)
def test_overwriting_refuses_to_take_other_files_along(inside, tmp_path):
    path = tmp_path / "d.rdb"
    build_database(path, Images(pictures(4)), Pooled(), **QUIET)
    (path / inside).parent.mkdir(parents=True, exist_ok=True)
    (path / inside).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=r"also holds .*, which would be lost: move that"):
        build_database(path, Images(pictures(3)), Pooled(), overwrite=True, **QUIET)
    parts = [Part(np.ones((2, 48), np.float16))]
    with pytest.raises(FileExistsError, match="also holds"):
        import_embeddings(path, parts, Pooled().fingerprint, overwrite=True, **QUIET)
    assert everything(tmp_path) == before


def test_overwriting_takes_all_that_is_its_own(photos, tmp_path):
    """Indexes, deletions, leftovers of killed appends and index builds among it."""
    path = tmp_path / "d.rdb"
    build_database(path, Images(pictures(40)), Pooled(), **QUIET)
    open_database(path).build_index(Annoy(trees=2), progress=False)
    shutil.copytree(path / "indexes/annoy", path / "indexes/annoy.old.partial")
    delete_rows(path, [1])
    with pytest.raises(Killed):
        append_to_database(path, ImageFolder(photos), Failing(0), **QUIET)
    found = build_database(path, ImageFolder(photos), Pooled(), overwrite=True, **QUIET)
    assert len(found) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.rdb", "photos"]
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "records-000000.parquet", "vectors-000000.safetensors",
    ]  # fmt: skip


def test_pictures_inside_the_folder_that_is_overwritten(tmp_path):
    path = tmp_path / "e.rdb"
    build_database(path, Images(pictures(2)), Pooled(), **QUIET)
    (path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(path / "photos/a.png")
    with pytest.raises(FileExistsError, match="also holds photos"):
        build_database(path, ImageFolder(path / "photos"), Pooled(), overwrite=True, **QUIET)
    assert (path / "photos/a.png").is_file()


def test_other_files_in_the_folder_of_unfinished_work(photos, tmp_path):
    with pytest.raises(Killed):
        build_database(tmp_path / "d", ImageFolder(photos), Failing(0), **QUIET)
    (tmp_path / "d.partial/mine.txt").write_text("mine")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"d\.partial also holds mine\.txt"):
            build_database(tmp_path / "d", ImageFolder(photos), Pooled(), **options, **QUIET)
    assert (tmp_path / "d.partial/mine.txt").read_text() == "mine"


def test_notes_beside_an_index(tmp_path):
    database = build_database(tmp_path / "d", Images(pictures(40)), Pooled(), **QUIET)
    database.build_index(Annoy(trees=2), progress=False)
    (tmp_path / "d/indexes/annoy/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"annoy also holds notes\.txt"):
        database.build_index(Annoy(trees=3), progress=False)
    assert (tmp_path / "d/indexes/annoy/notes.txt").is_file()


def test_links_are_followed_and_stay(photos, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "d.rdb").symlink_to("disk/d.rdb")
    build_database(tmp_path / "d.rdb", ImageFolder(photos), Pooled(), **QUIET)
    build_database(tmp_path / "d.rdb", Images(pictures(3)), Pooled(), overwrite=True, **QUIET)
    assert (tmp_path / "d.rdb").is_symlink()
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["d.rdb"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.rdb", "disk", "photos"]
    assert len(open_database(tmp_path / "d.rdb")) == 3


# --- places --------------------------------------------------------------------------------------


def test_a_home_folder_is_found(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    build_database("~/x.rdb", ImageFolder(photos), Pooled(), **QUIET)
    append_to_database("~/x.rdb", Images(pictures(2)), Pooled(), **QUIET)
    delete_rows("~/x.rdb", [0])
    assert len(open_database("~/x.rdb")) == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "x.rdb"]


@pytest.mark.parametrize("path", [".", "", "/", "photos/.."])
def test_places_that_cannot_be_a_database(path, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give the name of a new one"):
        build_database(path, ImageFolder(photos), Failing(0), **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_a_database_inside_the_folder_of_its_pictures(photos):
    path = photos / "x.rdb"
    with pytest.raises(Killed):
        build_database(path, ImageFolder(photos), Failing(2), batch_size=3, shard_rows=3, **QUIET)
    options = {"batch_size": 3, "shard_rows": 3, "resume": True, **QUIET}
    assert len(build_database(path, ImageFolder(photos), Pooled(), **options)) == 9
    assert len(append_to_database(path, ImageFolder(photos), Pooled(), **QUIET)) == 18
    assert len(build_database(photos / "y.rdb", ImageFolder(photos), Pooled(), **QUIET)) == 9


@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP", "ENOSYS", "EXDEV", "EMLINK"])
def test_file_systems_without_hard_links(code, photos, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    build_database(tmp_path / "d", Images(pictures(3)), Pooled(), **QUIET)
    monkeypatch.setattr(os, "link", no_link)
    found = append_to_database(tmp_path / "d", ImageFolder(photos), Pooled(), **QUIET)
    assert len(found) == 12
    assert found.verify() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "photos"]
    assert not (tmp_path / "d/append.partial").exists()


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EINVAL"])
def test_file_systems_without_locks(code, photos, tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    path = tmp_path / "d"
    build_database(path, Images(pictures(40)), Pooled(), **QUIET)
    append_to_database(path, ImageFolder(photos), Pooled(), **QUIET)
    delete_rows(path, [0])
    open_database(path).build_index(Annoy(trees=2), progress=False)
    assert len(open_database(path)) == 48

    class Meanwhile(Pooled):
        def encode_image(self, images):
            with pytest.raises(BlockingIOError, match="being written by another process"):
                delete_rows(path, [0])
            return super().encode_image(images)

    build_database(path, ImageFolder(photos), Meanwhile(), overwrite=True, **QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "photos"]


@pytest.mark.parametrize("code", ["EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_file_systems_that_cannot_sync(code, photos, tmp_path, monkeypatch):
    def no_sync(descriptor):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", no_sync)
    assert len(build_database(tmp_path / "d", ImageFolder(photos), Pooled(), **QUIET)) == 9
    monkeypatch.setattr(os, "fsync", lambda d: (_ for _ in ()).throw(OSError(errno.EIO, "I/O")))
    with pytest.raises(OSError, match="I/O"):  # a disk that fails is not passed over
        build_database(tmp_path / "e", ImageFolder(photos), Pooled(), **QUIET)


# --- values --------------------------------------------------------------------------------------


def built(records, tmp_path, **options) -> EmbeddingDatabase:
    rows = [{"v": value, "file": f"{i}.png"} for i, value in enumerate(records)]
    return build_database(
        tmp_path / "d", Images(pictures(len(rows)), rows), Pooled(), **options, **QUIET
    )


DEEP: list = []
for _ in range(5000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("values", "stored", "named"),
    [
        ([1, 2, "1a"], ["1", "2", "1a"], "holds 1 in 0.png and '1a' in 2.png"),
        ([True, 1, None], ["true", "1", None], "holds true in 0.png and 1 in 1.png"),
        ([1, 2**70], ["1", str(2**70)], f"holds 1 in 0.png and {2**70} in 1.png"),
        ([2**53 + 1, 0.5], [str(2**53 + 1), "0.5"], "and 0.5 in 1.png"),
        ([1, {"a": [1]}], ["1", '{"a": [1]}'], '{"a": [1]} in 1.png'),
        ([{"a": 1}, {"a": "x"}], ['{"a": 1}', '{"a": "x"}'], '{"a": "x"} in 1.png'),
        ([[1], "x"], ["[1]", "x"], "[1] in 0.png and 'x' in 1.png"),
        ([{}, None], ["{}", None], "{} in 0.png"),
        ([date(2026, 1, 2), datetime(2026, 1, 2, 3)], ["2026-01-02", "2026-01-02T03:00:00"], "03"),
        ([Decimal("1e99"), 1], ["1E+99", "1"], "1E+99 in 0.png"),
        ([10**5000], [hex(10**5000)], "an integer of 5001 digits in 0.png"),
    ],
)
def test_mixed_columns_are_text_and_named(values, stored, named, tmp_path):
    with pytest.warns(MixedColumn, match="column 'v' is stored as text: it holds") as caught:
        database = built(values, tmp_path)
    assert named in str(caught[0].message)
    assert database.column("v").tolist() == stored
    assert database.verify() == []


def test_values_that_no_table_holds(tmp_path):
    values = ["\ud800", "caf\udce9", "b", None]
    assert built(values, tmp_path).column("v").tolist() == ["\\ud800", "caf\\xe9", "b", None]


def test_json_that_is_nested_very_deeply(tmp_path):
    with pytest.warns(MixedColumn, match="nested|\\[\\["):
        database = built([DEEP, 1], tmp_path)
    assert database.column("v").tolist()[1] == "1"
    assert "nested deeper than 64 levels" in database.column("v").tolist()[0]


def test_values_that_a_table_holds_keep_their_type(tmp_path):
    values = [{"a": [1, 2], "b": {"c": "x"}}, {"a": [], "b": None}]
    database = built(values, tmp_path)
    assert database.records(torch.tensor([0]))[0]["v"] == values[0]
    for i, some in enumerate(([1, 0.5, None], ["a", None], [date(2026, 1, 2)], [b"a", None])):
        (tmp_path / str(i)).mkdir()
        found = built(some, tmp_path / str(i))
        assert [r["v"] for r in found.records(torch.arange(len(some)))] == some


def test_a_column_that_changes_from_shard_to_shard(tmp_path):
    """What is encoded stays; a later value makes the column text, with one warning."""
    values = [1, 2, 3, 4, 5, None, "x", "y"]
    with pytest.warns(MixedColumn, match=r"it is int64 in earlier rows, but 'x' in 6\.png") as seen:
        database = built(values, tmp_path, shard_rows=3, batch_size=3)
    assert len(seen) == 1
    assert database.column("v").tolist() == ["1", "2", "3", "4", "5", None, "x", "y"]
    assert database.where("v == '5'").rows.tolist() == [4]
    assert [r["v"] for r in database.records(torch.arange(8))] == database.column("v").tolist()
    more = append_to_database(
        tmp_path / "d", Images(pictures(2), [{"v": 9}] * 2), Pooled(), **QUIET
    )
    assert [r["v"] for r in more.records(torch.tensor([0, 9]))] == ["1", "9"]


# --- work that goes on ---------------------------------------------------------------------------

SHARDS = {"batch_size": 2, "shard_rows": 2, "thumbnails": 8}


def begun(path: Path, source, shards: int = 3) -> Path:
    with pytest.raises(Killed):
        build_database(path, source, Failing(shards), **SHARDS, **QUIET)
    return path.with_name(path.name + ".partial")


def test_a_log_grows_by_one_line_per_shard(photos, tmp_path):
    partial = begun(tmp_path / "d", ImageFolder(photos))
    assert len((partial / LOG).read_bytes().splitlines()) == 4
    assert json.loads((partial / BUILD).read_text())["shards"] == []
    left = read_work(partial)
    assert [shard.rows for shard in left.manifest.shards] == [2, 2, 2]
    build_database(tmp_path / "d", ImageFolder(photos), Pooled(), resume=True, **SHARDS, **QUIET)
    assert not {BUILD, LOG} & {p.name for p in (tmp_path / "d").iterdir()}


@pytest.mark.parametrize("cut", [1, 30, "all"])
def test_a_log_that_was_cut_off(cut, photos, tmp_path):
    """The shard whose line is not whole is made again; the bytes come out the same."""
    build_database(tmp_path / "whole", ImageFolder(photos), Pooled(), **SHARDS, **QUIET)
    partial = begun(tmp_path / "d", ImageFolder(photos))
    data = (partial / LOG).read_bytes()
    (partial / LOG).write_bytes(b"" if cut == "all" else data[:-cut])
    encoder = Failing(5 if cut == "all" else 3)
    build_database(tmp_path / "d", ImageFolder(photos), encoder, resume=True, **SHARDS, **QUIET)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "whole")


def test_unfinished_work_is_checked_before_it_is_trusted(photos, tmp_path):
    """60 random changes of one byte: the same bytes come out in the end, or one clear line."""
    source = ImageFolder(photos)
    build_database(tmp_path / "whole", source, Pooled(), **SHARDS, **QUIET)
    expected = files_of(tmp_path / "whole")
    partial = begun(tmp_path / "d", source)
    shutil.copytree(partial, tmp_path / "kept")
    names = sorted(p.name for p in partial.iterdir())
    draw = np.random.default_rng(0)
    lines, again = [], 0
    for _ in range(60):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", partial)
        file = partial / names[draw.integers(len(names))]
        data = bytearray(file.read_bytes())
        data[draw.integers(len(data))] ^= 1 << draw.integers(8)
        file.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                build_database(tmp_path / "d", source, Pooled(), resume=True, **SHARDS, **QUIET)
            except (ValueError, OSError) as error:
                lines.append(str(error))
                continue
        assert files_of(tmp_path / "d") == expected, file.name
        again += len(caught)
        shutil.rmtree(tmp_path / "d")
    assert len(lines) > 3
    assert not any("\n" in line for line in lines)
    assert all(re.search("start anew|build again|upgrade", line) for line in lines)
    assert again > 15


def test_a_finished_build_that_was_damaged_before_the_move(photos, tmp_path, monkeypatch):
    def killed(point: str) -> None:
        if point == "manifest written":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(work, "fault_point", killed)
        with pytest.raises(Killed):
            build_database(tmp_path / "d", ImageFolder(photos), Pooled(), **SHARDS, **QUIET)
    file = tmp_path / "d.partial/vectors-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="have changed since they were written: start anew"):
        build_database(
            tmp_path / "d", ImageFolder(photos), Pooled(), resume=True, **SHARDS, **QUIET
        )


@pytest.mark.parametrize("kind", ["build", "append"])
def test_pictures_replaced_under_their_names(kind, photos, tmp_path):
    """The same names, sizes and number: only the pixels are others."""
    path = tmp_path / "d"
    if kind == "build":
        begun(path, ImageFolder(photos))
    else:
        build_database(path, Images(pictures(3)), Pooled(), **SHARDS, **QUIET)
        with pytest.raises(Killed):
            append_to_database(path, ImageFolder(photos), Failing(2), **QUIET)
    one, other = photos / "p0.bmp", photos / "p1.bmp"
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    go_on = {"resume": True, **QUIET}
    job, more = (build_database, SHARDS) if kind == "build" else (append_to_database, {})
    with pytest.raises(ValueError, match=r"the pictures have changed since .* was begun: put back"):
        job(path, ImageFolder(photos), Pooled(), **more, **go_on)


def test_work_that_an_earlier_version_began(photos, tmp_path):
    """It kept all shards in ``build.json``."""
    source = ImageFolder(photos)
    build_database(tmp_path / "whole", source, Pooled(), **SHARDS, **QUIET)
    partial = begun(tmp_path / "d", source)
    read_work(partial).manifest.write(partial / BUILD)
    (partial / LOG).unlink()
    encoder = Failing(2)
    build_database(tmp_path / "d", source, encoder, resume=True, **SHARDS, **QUIET)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "whole")


def test_a_build_killed_when_it_had_changed_places(photos, tmp_path, monkeypatch):
    """The old database lies at PATH.partial then; it is never taken for work to go on with."""
    from retrodiff.disk import files

    path = tmp_path / "d"
    build_database(path, Images(pictures(5)), Pooled(), **QUIET)

    def killed(point: str) -> None:
        if point == "folders exchanged":
            raise Killed

    options = {"overwrite": True, **QUIET}
    with monkeypatch.context() as patch:
        patch.setattr(files, "fault_point", killed)
        with pytest.raises(Killed):
            build_database(path, ImageFolder(photos), Pooled(), **options)
    assert len(open_database(path)) == 9
    again = build_database(path, Images(pictures(5)), Pooled(), resume=True, **options)
    assert len(again) in (5, 9)
    build_database(path, Images(pictures(7)), Pooled(), **options)
    assert len(open_database(path)) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "photos"]


# --- appends -------------------------------------------------------------------------------------


def test_an_append_that_has_finished_is_not_done_again(photos, tmp_path):
    path, source = tmp_path / "d", ImageFolder(photos)
    build_database(path, Images(pictures(3)), Pooled(), **QUIET)
    append_to_database(path, source, Pooled(), **QUIET)
    before = files_of(path)
    for _ in range(2):
        found = append_to_database(path, source, Failing(0), resume=True, **QUIET)
        assert len(found) == 12
    assert files_of(path) == before
    assert len(append_to_database(path, source, Pooled(), **QUIET)) == 21  # asked for again


def test_an_append_killed_at_any_file_it_removes(photos, tmp_path, monkeypatch):
    """After the manifest names its rows they are never added again: 12 rows each time."""
    path, source = tmp_path / "d", ImageFolder(photos)
    build_database(path, Images(pictures(3)), Pooled(), **QUIET)
    shutil.copytree(path, tmp_path / "base")
    unlink, rmdir = os.unlink, os.rmdir
    for step in range(12):
        left = [step]
        recorded = []

        def counted(real, left=left, recorded=recorded):
            def call(*args, **kwargs):
                if recorded:
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(
                edit,
                "fault_point",
                lambda p, r=recorded: r.append(p) if p == "append recorded" else 0,
            )
            patch.setattr(os, "unlink", counted(unlink))
            patch.setattr(os, "rmdir", counted(rmdir))
            try:
                append_to_database(path, source, Pooled(), **QUIET)
                done = True
            except Killed:
                done = False
        found = append_to_database(path, source, Pooled(), resume=True, **QUIET)
        assert len(found) == 12, step
        assert found.verify() == []
        assert not (path / "append.partial").exists()
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "base", path)
        if done:
            break
    assert done
    assert step > 3


# --- two at once ---------------------------------------------------------------------------------


def test_an_overwrite_and_an_append_of_one_database(photos, tmp_path):
    path = tmp_path / "d"
    build_database(path, Images(pictures(3)), Pooled(), **QUIET)
    busy = pytest.raises(BlockingIOError, match="is being written by another process")

    class Meanwhile(Pooled):
        def encode_image(self, images):
            with busy:
                append_to_database(path, Images(pictures(2)), Pooled(), **QUIET)
            with busy:
                delete_rows(path, [0])
            with busy:
                open_database(path).build_index(Annoy(trees=2), progress=False)
            return super().encode_image(images)

    class Other(Pooled):
        def encode_image(self, images):
            with busy:
                build_database(path, ImageFolder(photos), Pooled(), overwrite=True, **QUIET)
            return super().encode_image(images)

    assert len(append_to_database(path, Images(pictures(2)), Other(), **QUIET)) == 5
    build_database(path, ImageFolder(photos), Meanwhile(), overwrite=True, **QUIET)
    assert len(open_database(path)) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "photos"]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "database"])
def test_what_appears_while_a_build_runs(kind, photos, tmp_path):
    path = tmp_path / "d"

    class Meanwhile(Pooled):
        def encode_image(self, images):
            if kind == "folder":
                path.mkdir()
                (path / "mine").write_text("mine")
            elif kind == "file":
                path.write_text("mine")
            elif kind == "link":
                path.symlink_to(photos)
            else:
                build_database(tmp_path / "e", Images(pictures(2)), Pooled(), **QUIET)
                (tmp_path / "e").rename(path)
            return super().encode_image(images)

    with pytest.raises(FileExistsError, match=r"d exists: .*; what was made is kept in .*d\.part"):
        build_database(path, ImageFolder(photos), Meanwhile(), **QUIET)
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        path.rename(tmp_path / "theirs")
    # The work is kept and put in its place without encoding anything.
    assert len(build_database(path, ImageFolder(photos), Failing(0), resume=True, **QUIET)) == 9


def test_an_index_is_opened_while_it_is_built_again(tmp_path):
    """Hundreds of openings beside dozens of savings: all find a whole one."""
    build_database(tmp_path / "d", Images(pictures(40)), Pooled(), **QUIET)
    database = open_database(tmp_path / "d").build_index(Annoy(trees=2), progress=False)
    stop = threading.Event()
    saved = []

    def save():
        while not stop.is_set():
            database.save_index()
            saved.append(1)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(150):
            open_database(tmp_path / "d", "annoy")
    finally:
        stop.set()
        thread.join()
    assert len(saved) > 5


# --- indexes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [Annoy(trees=4), USearch(), Faiss(), ScaNN()], ids=lambda r: r.name
)
def test_a_disk_that_fills_up_while_an_index_is_saved(kind, tmp_path):
    vectors = Vectors([torch.randn(500, 32).half()], [torch.ones(500)])
    try:
        index = kind.build(vectors)
    except ValueError as error:
        pytest.skip(str(error))
    folder = tmp_path / kind.name
    save_index(index, kind, folder, "x" * 64, Recall(1.0, 1, 1))
    before = everything(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 4000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="make room") as caught:
                save_index(index, kind, folder, "y" * 64, Recall(1.0, 1, 1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert everything(tmp_path) == before
    assert load_index(folder, vectors, "x" * 64)[1] == kind
    modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert len(modes) == 1


def test_ctrl_c_is_heard_during_native_work():
    """A call that takes no notice of signals, as a native one does, in a thread of its own."""
    over = threading.Event()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        heard(over.wait, 30)
    assert time.monotonic() - start < 10
    over.set()


def test_native_work_returns_and_raises():
    def fails():
        raise RuntimeError("native")

    assert heard(lambda a, b: a + b, 1, b=2) == 3
    with pytest.raises(RuntimeError, match="native"):
        heard(fails)
    with contextlib.suppress(ImportError):
        assert isinstance(heard(recipe.recipe_from_string, "exact"), Exact)


# --- other processes -----------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, database):
        self.database = database

    def __len__(self):
        return len(self.database)

    def __getitem__(self, row):
        found = self.database.search(Query(self.database.embeddings(torch.tensor([row]))), 2)
        return found.indices[0], self.database.records(torch.tensor([row]))[0]["number"]


@pytest.mark.parametrize("kind", ["exact", "annoy", "unsaved", "subset"])
def test_databases_go_to_worker_processes(kind, tmp_path):
    database = build_database(tmp_path / "d", Images(pictures(30)), Pooled(), **QUIET)
    if kind in ("annoy", "unsaved"):
        database = database.build_index(Annoy(trees=4), progress=False, save=kind == "annoy")
    if kind == "subset":
        database = database.where("number > 4")
    sent = pickle.dumps(database)
    assert len(sent) < 2000  # its address, not its rows
    there = pickle.loads(sent)
    assert there.fingerprint == database.fingerprint
    asked = Query(torch.randn(3, 48))
    assert torch.equal(there.search(asked, 4).indices, database.search(asked, 4).indices)
    append_to_database(tmp_path / "d", Images(pictures(1)), Pooled(), **QUIET)
    with pytest.raises(ValueError, match="has changed since it was opened: open it again"):
        pickle.loads(sent)


def test_a_data_loader_that_spawns(tmp_path):
    database = build_database(tmp_path / "d", Images(pictures(6)), Pooled(), **QUIET)
    loader = torch.utils.data.DataLoader(
        Rows(database), batch_size=None, num_workers=1, multiprocessing_context="forkserver"
    )
    found = list(loader)
    assert [int(indices[0]) for indices, _ in found] == list(range(6))
    assert [number for _, number in found] == list(range(6))


def test_the_manifest_is_named_first(tmp_path):
    assert MANIFEST in work.own_files(
        build_database(tmp_path / "d", Images(pictures(1)), Pooled(), **QUIET).path
    )
