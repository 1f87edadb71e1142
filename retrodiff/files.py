"""Files appear whole or not at all: written under a temporary name, then renamed. One writer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON that is the same for the same value."""
    with replacing(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        partial.write_text(text + "\n", "utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Tensors and a header of strings."""
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, header)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, or says in one line why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(f"cannot write into {folder} ({reason}): choose another folder") from None


def check_free(path: Path, marker: str, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is a folder of the same kind to overwrite.

    Args:
        path: the folder to be written.
        marker: a file that only folders of this kind have, so that no other is ever deleted.
        overwrite: whether replacing such a folder was asked for.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another path, or overwrite it (overwrite=True, --overwrite)"
        )
    if not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists()):
        raise FileExistsError(
            f"{path} has no {marker}, so it is not ours to overwrite: choose another path"
        )


def write_folder(
    path: Path, write: Callable[[Path], None], *, marker: str, overwrite: bool = False
) -> None:
    """A folder that ``write`` fills and that appears whole; see `check_free` for ``marker``."""
    check_free(path, marker, overwrite)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        write(partial)
        if path.exists():
            old = path.with_name(path.name + ".old.partial")
            os.replace(path, old)
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The only writer of a folder until the end of the block; readers are not disturbed."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock on a folder
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BlockingIOError(
                f"{folder} is being written by another process: wait until it has finished"
            ) from error
        yield
    finally:
        os.close(descriptor)
