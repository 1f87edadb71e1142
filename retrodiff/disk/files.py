"""Writes files and folders so that they appear whole or not at all, and nothing else is lost.

A file is written under a temporary name, then renamed. A folder is written beside its place and put
there when it is finished. What was there before goes only where overwriting was asked for, and of
it only the files that the format itself wrote.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from retrodiff.disk.locks import write_lock
from retrodiff.disk.plain import plain_json as plain_json

Own = Callable[[Path], set[str]]
"""Folder -> names of the files in it that its format wrote, relative to it, with slashes."""

WAIT = 60.0
"""Seconds that a save waits for another one at the same place."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNFINISHED = "unfinished.partial"
REPLACED = "replaced.partial"
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file managers leave in folders; nobody misses it."""


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with write_lock(partial, WAIT, Path.touch):
        try:
            yield partial
            with partial.open("rb+") as file:
                sync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON that is the same for the same value."""
    with atomic_write(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", "utf-8")


def sync(descriptor: int) -> None:
    """Makes a file's bytes last if the power fails, on file systems that know how."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder last if the power fails, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Makes every file below a folder last if the power fails."""
    for root, _, names in os.walk(folder):
        for name in names:
            with Path(root, name).open("rb") as file:
                sync(file.fileno())
        sync_folder(Path(root))


# --- places --------------------------------------------------------------------------------------


def place(path: str | Path) -> Path:
    """Resolves a path for writing: ``~`` and links are followed.

    Raises:
        ValueError: it is empty, the root, the working folder, or no valid text.
    """
    given = Path(path)
    try:
        found = Path(os.path.realpath(given.expanduser()))
        str(found).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{plain_json(str(path))} is not valid UTF-8: choose another path"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no path ({error}): choose another one") from None
    if found == found.parent or found == Path.cwd():
        raise ValueError(f"{str(path)!r} is the folder {found} itself: give the name of a new one")
    return found


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, or says in one line why that cannot be."""
    _make(folder)
    probe = folder / ".probe.partial"
    with _one_line(folder):
        probe.touch()
        probe.unlink(missing_ok=True)


def _make(folder: Path) -> None:
    with _one_line(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            # Another writer may have moved it meanwhile: then the next try makes it.
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(folder.stat().st_mode):
                    raise


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write into {folder} ({reason}): choose another folder") from None


def listed(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """One file, or several, as paths; ``~`` is the home folder."""
    if isinstance(files, (str, Path)):
        files = [files]
    return [Path(file).expanduser() for file in files]


def given(path: str | Path) -> Path:
    """Resolves a path for reading, with ``~`` as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # a user that there is not: a file may have that name
        return Path(path)


def check_free(path: str | Path, marker: str, overwrite: bool, own: Own | None) -> None:
    """Refuses a place where something is, unless it is a folder of the same kind to overwrite.

    An empty folder is in nobody's way.

    Args:
        path: the folder to be written.
        marker: a file that only folders of this kind have.
        overwrite: whether replacing such a folder was asked for.
        own: names of the files that this format wrote; the folder may hold no others. None: the
            writer replaces single files and removes nothing.
    """
    _check_free(place(path), marker, overwrite, own)


def _check_free(path: Path, marker: str, overwrite: bool, own: Own | None) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir() and not any(path.iterdir()):
        return  # nothing can be lost
    if not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another path, or overwrite it (overwrite=True, --overwrite)"
        )
    if not (path / marker).is_file():
        raise FileExistsError(
            f"{path} has no {marker}, so it is not ours to overwrite: choose another path"
        )
    if own is not None and (others := foreign(path, own(path))):
        named = ", ".join(plain_json(name) for name in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise FileExistsError(
            f"{path} also holds {named}{more}, which would be lost: move that away, or choose "
            "another path"
        )


def foreign(folder: Path, own: set[str]) -> list[str]:
    """What a folder holds besides its own files: names relative to it, whole folders as one."""
    found: list[str] = []
    parents = {str(parent.as_posix()) for name in own for parent in Path(name).parents}
    for root, folders, names in os.walk(folder):
        below = Path(root).relative_to(folder)
        for name in [*folders]:
            inside = (below / name).as_posix()
            if Path(root, name).is_symlink() or inside not in parents | own:
                folders.remove(name)
                names.append(name)
        for name in names:
            inside = (below / name).as_posix()
            if inside not in own and name not in (*LITTER, UNFINISHED, REPLACED):
                found.append(inside)
    return sorted(found)


# --- folders -------------------------------------------------------------------------------------


def write_folder(
    path: str | Path,
    write: Callable[[Path], None],
    *,
    marker: str,
    own: Own,
    overwrite: bool = False,
) -> Path:
    """Makes a folder that ``write`` fills and that appears whole or not at all.

    A second writer of the same path waits for its turn, then finds what the first one wrote.

    Args:
        path: the folder; links are followed.
        write: fills the folder that it is given, which lies beside ``path``.
        marker: a file that only folders of this kind have.
        own: folder -> names of the files that this format wrote there; nothing else is removed.
        overwrite: replace an earlier folder of this kind.

    Returns:
        Where the folder is.

    Raises:
        FileExistsError: something is there; see `check_free`.
        BlockingIOError: another process has been writing there for a minute.
    """
    path = place(path)
    check_free(path, marker, overwrite, None)
    partial = beside(path)
    with write_lock(partial, WAIT, _make):
        repair(path, marker, own)
        try:
            with write_lock(path, WAIT) if path.exists() else nullcontext():
                check_free(path, marker, overwrite, own)
                _clear(partial, marker)
                with room_for(partial, f"make room, then try again; {path} is as it was"):
                    write(partial)
                    put(partial, path, marker, own, overwrite)
        except BaseException:
            # Unfinished, or nothing. A finished folder that could not be put in its place is kept.
            if (partial / UNFINISHED).exists():
                shutil.rmtree(partial, ignore_errors=True)
            elif partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
            raise
    return path


def beside(path: Path) -> Path:
    """Temporary path of a folder until it is moved into place."""
    return path.with_name(path.name + ".partial")


def put(partial: Path, path: Path, marker: str, own: Own, overwrite: bool) -> None:
    """Moves a finished folder into place; the one it replaces is removed afterwards.

    Where the system can, the two change places in one step, so that a reader finds one of them at
    any moment. Otherwise a kill between two steps is mended by `repair`.

    Raises:
        FileExistsError: something is there that may not be replaced; the new folder is kept.
    """
    sync_tree(partial)
    (partial / UNFINISHED).unlink(missing_ok=True)
    fault_point("ready to move")
    kept = f"what was made is kept in {partial}"
    if not os.path.lexists(path):
        try:
            os.rename(partial, path)
        except OSError as error:
            if os.path.lexists(path):
                raise FileExistsError(f"{path} has appeared meanwhile: {kept}") from None
            raise type(error)(f"{path}: {error.strerror}: {kept}") from None
        sync_folder(path.parent)
        return
    try:
        _check_free(path, marker, overwrite, own)
        if path.is_symlink():
            raise FileExistsError(f"{path} has become a link meanwhile: move it away")
    except FileExistsError as error:
        raise FileExistsError(f"{error}; {kept}") from None
    (path / REPLACED).touch()
    old = partial
    if not _exchanged(partial, path):
        old = _old(path)
        try:
            os.rename(path, old)
        except OSError as error:
            (path / REPLACED).unlink()
            raise type(error)(f"{path} cannot be moved ({error.strerror}): {kept}") from None
        fault_point("old folder moved")
        os.rename(partial, path)
    sync_folder(path.parent)
    fault_point("folders exchanged")
    with suppress(OSError):
        discard(old, own(old), path)


def repair(path: Path, marker: str, own: Own) -> None:
    """Restores a folder after its writer was killed while replacing it."""
    old = _old(path)
    if not (old / REPLACED).is_file():
        return
    if not os.path.lexists(path):
        (old / REPLACED).unlink()
        os.rename(old, path)
    else:
        discard(old, own(old), path)


def discard(folder: Path, own: set[str], into: Path) -> None:
    """Removes a replaced folder; a file that is not its own moves to the new one."""
    for name in foreign(folder, own):
        target = into / name
        if not os.path.lexists(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder / name, target)
    for name in own:
        if not (folder / name).is_dir() or (folder / name).is_symlink():
            (folder / name).unlink(missing_ok=True)
    for root, _, names in os.walk(folder, topdown=False):
        for name in set(names) & {*LITTER, UNFINISHED}:
            Path(root, name).unlink(missing_ok=True)
        if Path(root) != folder:
            with suppress(OSError):
                Path(root).rmdir()
    if {entry.name for entry in folder.iterdir()} <= {REPLACED}:
        (folder / REPLACED).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def room_for(folder: Path, way_out: str) -> Iterator[None]:
    """A full disk ends the block with one line that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = os.strerror(error.errno)
        raise OSError(f"no room to write into {folder} ({reason}): {way_out}") from error


def fault_point(point: str) -> None:
    """A named moment of a write; fault tests end the process here."""


def _clear(partial: Path, marker: str) -> None:
    """Empties the folder of an unfinished write, and marks it as one."""
    found = {entry.name for entry in partial.iterdir()}
    if found and not found & {UNFINISHED, REPLACED, marker}:
        raise FileExistsError(
            f"{partial} is in the way and holds no unfinished write: move it away"
        )
    (partial / UNFINISHED).touch()
    for name in found - {UNFINISHED}:
        entry = partial / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old.partial")


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two folders could change places in one step: Linux, where the file system can."""
    import ctypes

    try:
        change = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return change(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
