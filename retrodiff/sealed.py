"""JSON files that carry a hash of themselves, so that a changed character is found on opening.

The hash is the last entry, ``"sha256"``, over the others as `_text` writes them: white space does
not matter. A file without it is read as it is: earlier versions wrote none, and whoever edits a
file by hand takes the entry out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn, cast

from retrodiff.files import write_json

SEAL = "sha256"

MOST = 256 * 1024**2
"""Largest file in bytes that is read; in memory it is about ten times that."""


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as indented JSON with its hash, all at once."""
    write_json(path, {**value, SEAL: _seal(value)})


def read_sealed(path: Path, what: str, again: str, *, most: int = MOST) -> dict[str, Any]:
    """The object of a file, without the hash.

    Args:
        path: of the file.
        what: what errors say that it should be.
        again: what to do about a damaged file, the end of the error.
        most: largest size in bytes that is read.

    Raises:
        ValueError: it is no JSON object, too large or nested too deep, or was changed since it was
            written.
        FileNotFoundError: there is no such file.
    """
    value = read_json(path, what, again, most=most)
    if (seal := value.pop(SEAL, None)) is not None and seal != _seal(value):
        raise ValueError(
            f"{path} was changed since it was written, its SHA-256 differs: {again}; if you edited "
            f"it yourself, take out its last entry, {SEAL!r}"
        )
    return value


def read_json(path: Path, what: str, again: str, *, most: int = MOST) -> dict[str, Any]:
    """The object that a JSON file holds, refused in one line if it is none; see `read_sealed`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {again}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: {again}")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most:,} bytes, too many for {what}: {again}")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{path} is not {what} (nested too deep): {again}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not {what} ({error}): {again}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not {what} (no JSON object): {again}")
    return cast("dict[str, Any]", value)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(_text(value).encode("utf-8", "backslashreplace")).hexdigest()


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)
