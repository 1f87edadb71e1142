"""Files and folders that appear whole, replace only what is theirs, and take turns."""

import ctypes
import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import threading
import time
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from retrodiff.disk import files, locks
from retrodiff.disk.files import atomic_write, check_free, place, plain_json, write_folder
from retrodiff.disk.locks import write_lock
from retrodiff.disk.tensors import write_tensors

MARKER = "things.json"


def own(folder: Path) -> set[str]:
    return {MARKER, "part/a.txt", "b.txt"} & {
        file.relative_to(folder).as_posix() for file in folder.rglob("*")
    }


def writer(text: str = "new"):
    def write(folder: Path) -> None:
        (folder / MARKER).write_text(text)
        (folder / "part").mkdir()
        (folder / "part/a.txt").write_text(text)

    return write


def save(path, text: str = "new", overwrite: bool = False) -> Path:
    return write_folder(path, writer(text), marker=MARKER, own=own, overwrite=overwrite)


def tree(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


WHOLE = {MARKER: "new", "part/a.txt": "new"}


# --- plain values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (np.bool_(False), False),
        (np.int64(3), 3),
        (2**70, 2**70),
        (np.float32(0.5), 0.5),
        (math.nan, None),
        (np.float64("inf"), None),
        (torch.tensor(2), 2),
        (torch.tensor([1.0, math.nan]), [1.0, None]),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.array(["2026-01-02"], "datetime64[ns]"), ["2026-01-02T00:00:00.000000000"]),
        (np.datetime64("2026-01-02"), "2026-01-02"),
        (date(2026, 1, 2), "2026-01-02"),
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05"),
        (timedelta(hours=1), "1:00:00"),
        (Decimal("1.50"), "1.50"),
        (b"\x00\xff", "00ff"),
        (memoryview(b"\x01"), "01"),
        ("caf\udce9", "caf\\xe9"),
        (PurePosixPath("a/caf\udce9"), "a/caf\\xe9"),
        ({1: (2, {3})}, {"1": [2, [3]]}),
        ({"k\udce9": {"deep": [b"a"]}}, {"k\\xe9": {"deep": ["61"]}}),
        ({"b", "a"}, ["a", "b"]),
    ],
)
def test_plain_json(value, plain):
    assert plain_json(value) == plain
    assert type(plain_json(value)) is type(plain)
    text = json.dumps(plain_json(value), allow_nan=False, ensure_ascii=False)
    assert json.loads(text.encode("utf-8")) == plain


def test_plain_json_of_something_very_deep():
    value: list = []
    for _ in range(20_000):
        value = [value]
    assert "nested deeper than 64 levels" in json.dumps(plain_json(value))


# --- places --------------------------------------------------------------------------------------


def test_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nothing/there")
    assert place("~/x/") == tmp_path / "x"
    assert place("x") == tmp_path / "x"
    assert place("link/y") == tmp_path / "real/y"
    assert place("dangling") == tmp_path / "nothing/there"
    for bad in ("", ".", "./", "/", "real/..", str(tmp_path)):
        with pytest.raises(ValueError, match="give the name of a new one"):
            place(bad)
    with pytest.raises(ValueError, match=r"caf\\xe9 is not valid UTF-8"):
        place("caf\udce9")
    with pytest.raises(ValueError, match="is no path"):
        place("a\0b")


def test_names_that_are_too_long_are_refused_before_the_work(tmp_path):
    def never(_: Path) -> None:
        raise AssertionError

    with pytest.raises(OSError, match=r"cannot write into .* \(File name too long\)"):
        write_folder(tmp_path / ("n" * 250), never, marker=MARKER, own=own)


# --- overwriting ---------------------------------------------------------------------------------


def test_a_folder_is_written_and_overwritten(tmp_path):
    path = tmp_path / "out"
    assert save(path, "old") == path
    with pytest.raises(FileExistsError, match=r"out exists: choose another path, or overwrite it"):
        save(path)
    assert tree(path) == {MARKER: "old", "part/a.txt": "old"}
    save(path, overwrite=True)
    assert tree(tmp_path) == {f"out/{name}": text for name, text in WHOLE.items()}


@pytest.mark.parametrize(
    ("inside", "named"),
    [
        ("notes.txt", "notes.txt"),
        ("chosen/1.png", "chosen"),
        ("part/mine.txt", "part/mine.txt"),
        ("deep/a/b/c.txt", "deep"),
    ],
)
def test_what_is_not_ours_is_never_removed(inside, named, tmp_path):
    path = tmp_path / "out"
    save(path, "old")
    file = path / inside
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    before = tree(tmp_path)
    for refuse in (
        lambda: check_free(path, MARKER, True, own),
        lambda: save(path, overwrite=True),
    ):
        with pytest.raises(FileExistsError, match=rf"also holds {named}, which would be lost"):
            refuse()
    assert tree(tmp_path) == before


def test_empty_folders_and_links_of_others_count_too(tmp_path):
    path = tmp_path / "out"
    save(path, "old")
    (path / "empty").mkdir()
    (path / "linked").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match="also holds empty, linked, which"):
        save(path, overwrite=True)
    (path / "empty").rmdir()
    (path / "linked").unlink()
    (path / ".DS_Store").touch()  # nobody's
    save(path, overwrite=True)
    assert tree(path) == WHOLE
    for i in range(5):
        (path / f"{i}.txt").touch()
    with pytest.raises(FileExistsError, match=r"0\.txt, 1\.txt, 2\.txt and 2 more"):
        check_free(path, MARKER, True, own)


def test_folders_of_another_kind_are_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match=r"has no things\.json, so it is not ours"):
            save(tmp_path / name, overwrite=True)
    assert tree(tmp_path) == {"out/mine.txt": "mine", "file": "mine"}
    for overwrite in (False, True):
        (tmp_path / f"empty {overwrite}").mkdir()
        save(tmp_path / f"empty {overwrite}", overwrite=overwrite)
        assert tree(tmp_path / f"empty {overwrite}") == WHOLE


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    save(tmp_path / "link", "old")
    save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "disk/out") == WHOLE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    def fails(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError(28, "No space left on device")

    for overwrite in (False, True):
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / "out", fails, marker=MARKER, own=own, overwrite=overwrite)
        assert list(tmp_path.iterdir()) == []
    save(tmp_path / "out", "old")
    with pytest.raises(OSError, match="No space left"):
        write_folder(tmp_path / "out", fails, marker=MARKER, own=own, overwrite=True)
    assert tree(tmp_path) == {f"out/{MARKER}": "old", "out/part/a.txt": "old"}


def test_what_appears_meanwhile_is_not_replaced_and_the_work_is_kept(tmp_path):
    path = tmp_path / "out"

    def slow(folder: Path) -> None:
        writer()(folder)
        path.mkdir()
        (path / "theirs.txt").write_text("theirs")

    with pytest.raises(
        FileExistsError, match=r"out exists: .*what was made is kept in .*\.partial"
    ):
        write_folder(path, slow, marker=MARKER, own=own)
    assert tree(path) == {"theirs.txt": "theirs"}
    assert tree(tmp_path / "out.partial") == WHOLE
    (path / "theirs.txt").unlink()
    path.rmdir()
    save(path)  # the kept one does not stand in the way of the next
    assert tree(tmp_path) == {f"out/{name}": text for name, text in WHOLE.items()}


def test_the_place_of_the_work_may_be_taken(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial is in the way"):
        save(tmp_path / "out")
    assert tree(tmp_path) == {"out.partial/mine.txt": "mine"}


def test_a_file_that_comes_during_the_exchange_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "out"
    save(path, "old")
    exchanged = files._exchanged

    def late(partial: Path, target: Path) -> bool:
        (target / "late.txt").write_text("mine")
        return exchanged(partial, target)

    monkeypatch.setattr(files, "_exchanged", late)
    save(path, overwrite=True)
    assert tree(tmp_path) == {
        **{f"out/{name}": text for name, text in WHOLE.items()},
        "out/late.txt": "mine",
    }


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from retrodiff.disk import files
from test_files import save
path, step, slow = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "slow"
if slow:
    files._exchanged = lambda *_: False
names = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")
def counted(real):
    def call(*args, **kwargs):
        global step
        step -= 1
        if step < 0:
            os._exit(9)
        return real(*args, **kwargs)
    return call
for name in names:
    setattr(os, name, counted(getattr(os, name)))
save(path, overwrite=True)
"""


@pytest.mark.parametrize("kind", ["exchange", "slow"])
def test_a_save_killed_anywhere_is_mended_by_the_next(kind, tmp_path):
    """Killed before each call that changes names; forked from one process, which has imported."""
    path = tmp_path / "out"
    seen = set()
    for step in range(60):
        save(path, "old", overwrite=path.exists())
        if (child := os.fork()) == 0:
            sys.argv = ["", str(Path(__file__).parent), str(path), str(step), kind]
            try:
                exec(KILLED, {})
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        left = tree(path) if path.exists() else None
        ours = {MARKER: "old", "part/a.txt": "old"}
        there = None if left is None else {k: v for k, v in left.items() if "partial" not in k}
        assert there in (ours, WHOLE, None)
        assert there is not None or kind == "slow"
        seen.add(None if there is None else there[MARKER])
        save(path, "again", overwrite=True) if path.exists() else None
        if there is None:
            with pytest.raises(FileExistsError, match="exists"):  # the old one is put back
                save(path)
            assert tree(path) == ours
            save(path, "again", overwrite=True)
        assert tree(tmp_path) == {f"out/{MARKER}": "again", "out/part/a.txt": "again"}
        if os.waitstatus_to_exitcode(status) == 0:
            break
    else:
        raise AssertionError("never got through")
    assert seen == {"old", "new"} | ({None} if kind == "slow" else set())


def test_folders_change_places_in_one_step(tmp_path):
    if not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("no renameat2")
    save(tmp_path / "a", "a")
    save(tmp_path / "b", "b")
    if not files._exchanged(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "a" / MARKER).read_text() == "b"


# --- single files --------------------------------------------------------------------------------


def test_files_appear_whole(tmp_path):
    with pytest.raises(AttributeError), atomic_write(tmp_path / "a/b.txt") as partial:
        partial.write_text("half").fails()
    assert list((tmp_path / "a").iterdir()) == []
    with atomic_write(tmp_path / "a/b.txt") as partial:
        partial.write_text("whole")
    assert tree(tmp_path) == {"a/b.txt": "whole"}


def test_tensors_are_as_readable_as_other_files(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    files.write_json(tmp_path / "a.json", {})
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1


def test_files_and_renames_are_made_to_last(tmp_path, monkeypatch):
    """Each file and its folder are synced, before and after the rename that makes it true."""
    order = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def moved(real):
        def call(a, b):
            order.append(f"-> {Path(b).name}")
            real(a, b)

        return call

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved(replace))
    monkeypatch.setattr(os, "rename", moved(rename))
    files.write_json(tmp_path / "a.json", {})
    assert order == ["a.json.partial", "-> a.json", tmp_path.name]
    order.clear()
    save(tmp_path / "out")
    at = order.index("-> out")
    assert set(order[:at]) == {MARKER, "a.txt", "part", "out.partial", files.UNFINISHED}
    assert order[at + 1] == tmp_path.name


# --- locks ---------------------------------------------------------------------------------------


def hold(path: Path, seconds: float = 0.0) -> subprocess.Popen:
    code = (
        "import sys, time; from pathlib import Path; from retrodiff.disk.locks import write_lock\n"
        f"with write_lock(Path({str(path)!r})):\n"
        "    print('held', flush=True); time.sleep(float(sys.argv[1])); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    return child


def test_one_writer_at_a_time(tmp_path):
    with (
        write_lock(tmp_path),
        pytest.raises(BlockingIOError, match="is being written by another process: wait"),
        write_lock(tmp_path),
    ):
        pass
    child = hold(tmp_path)
    with pytest.raises(BlockingIOError), write_lock(tmp_path):
        pass
    child.kill()  # a killed writer leaves no lock
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with write_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EINVAL", "EBADF", "EPERM"])
def test_file_systems_without_locks(code, tmp_path, monkeypatch):
    """A marker file beside the folder stands in for the lock; it goes with its writer."""
    folder = tmp_path / "d"
    folder.mkdir()

    def no_lock(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with write_lock(folder):
        assert (tmp_path / ".d.lock").is_file()
        with pytest.raises(BlockingIOError, match="being written by another process"):
            with write_lock(folder):
                pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    save(tmp_path / "out", "old")
    save(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == WHOLE
    # The marker of a process that was killed on this machine is in nobody's way.
    (tmp_path / ".d.lock").write_text(f"{2**22 + 1}\n{__import__('socket').gethostname()}\n")
    with write_lock(folder, 10):
        pass


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch):
    import filelock

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(filelock.SoftFileLock, "acquire", refused)
    with pytest.warns(UserWarning, match=r"cannot be locked here \(Read-only file system\)"):
        with write_lock(tmp_path):
            pass


def test_the_lock_is_of_what_is_at_the_path_now(tmp_path):
    """Who waits for a folder that is replaced meanwhile gets the lock of the new one."""
    path, held = tmp_path / "d", threading.Event()
    path.mkdir()
    inodes = []

    def wait():
        held.set()
        with write_lock(path, 10):
            inodes.append(path.stat().st_ino)
            with pytest.raises(BlockingIOError), write_lock(path):
                pass

    with write_lock(path):
        thread = threading.Thread(target=wait)
        thread.start()
        held.wait()
        time.sleep(3 * locks.PAUSE)
        path.rename(tmp_path / "old")
        path.mkdir()
    thread.join()
    assert inodes == [path.stat().st_ino]


def test_two_saves_take_turns(tmp_path):
    """Eight at once: without overwrite one is kept and seven are told; else the last one wins."""
    path = tmp_path / "out"
    for overwrite in (False, True):
        told: list[str] = []

        def run(i: int, overwrite: bool = overwrite, told: list[str] = told) -> None:
            try:
                save(path, str(i), overwrite)
                told.append("saved")
            except FileExistsError as error:
                told.append("refused" if "exists: choose another" in str(error) else str(error))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told.count("saved") == (8 if overwrite else 1)
        assert set(told) <= {"saved", "refused"}
        assert len(set(tree(path).values())) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
