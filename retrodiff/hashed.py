"""JSON files that carry a hash of themselves, so that a changed character is found on opening.

The hash is the last entry, ``"sha256"``, over the others without white space. A file without it is
read as it is: earlier versions wrote none, and whoever edits a file by hand takes the entry out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

from retrodiff.files import write_json
from retrodiff.untrusted import read_json

HASH = "sha256"

MOST = 256 * 1024**2
"""Bytes of the largest file that is read; in memory it is about ten times that."""


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
