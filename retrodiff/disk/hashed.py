"""Files that are compared with their SHA-256 before they are used.

The hash of most files is kept in another one, such as a manifest. A JSON file carries its own as
its last entry, ``"sha256"``, over the others without white space; one without it is read as it is:
earlier versions wrote none, and whoever edits a file by hand takes the entry out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from retrodiff.disk.files import write_json
from retrodiff.disk.untrusted import read_json

HASH = "sha256"
"""Name of the hash, wherever it is kept."""

MOST = 256 * 1024**2
"""Bytes of the largest file that is read; in memory it is about ten times that."""


# --- any file ------------------------------------------------------------------------------------

_compared: set[tuple[object, ...]] = set()
"""States of files that have been compared with their hashes in this process."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def about_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, {"bytes", "sha256"}, as `check_file` takes them."""
    return {"bytes": path.stat().st_size, HASH: file_digest(path)}


def check_file(path: Path, about: Mapping[str, Any], again: str) -> None:
    """Compares a file with the size and hash that were kept of it.

    A file is read for that once per process, and again when its place, size or time has changed.

    Args:
        path: of the file.
        about: {"bytes", "sha256"}.
        again: what to do about a damaged file, the end of the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the one that was written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {again}")
    if (size := path.stat().st_size) != about["bytes"]:
        raise ValueError(f"{path} has {size} bytes, expected {about['bytes']}: {again}")
    if was_compared(path, about[HASH]):
        return
    if file_digest(path) != about[HASH]:
        raise ValueError(
            f"{path} is damaged (it is not as it was written, its SHA-256 differs): {again}"
        )
    compared(path, about[HASH])


def was_compared(path: Path, digest: str) -> bool:
    """Whether a file, as it is now, was found to have this hash."""
    return (digest, *_state(path)) in _compared


def compared(path: Path, digest: str) -> None:
    """Remembers that a file has this hash."""
    _compared.add((digest, *_state(path)))


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


# --- JSON ----------------------------------------------------------------------------------------


def write_hashed(path: Path, value: dict[str, Any]) -> None:
    """Writes an object of plain JSON values with its hash, indented, all at once."""
    write_json(path, {**value, HASH: _hash(value)})


def read_hashed(path: Path, what: str, again: str, *, most: int = MOST) -> dict[str, Any]:
    """The object of a file, without the hash.

    Args:
        path: of the file.
        what: what it should be, such as "a database manifest".
        again: what to do about a damaged file, the end of the error.
        most: bytes of the largest file that is read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, too large, nested too deep, or was changed since it was
            written.
    """
    try:
        value = read_json(path, largest=most)
    except ValueError as error:
        raise ValueError(f"{path} is not {what} ({error}): {again}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what} (no JSON object): {again}")
    value = cast("dict[str, Any]", value)
    if (found := value.pop(HASH, None)) is not None and found != _hash(value):
        raise ValueError(
            f"{path} was changed since it was written, its SHA-256 differs: {again}; if you edited "
            f"it yourself, take out its last entry, {HASH!r}"
        )
    return value


def _hash(value: dict[str, Any]) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
